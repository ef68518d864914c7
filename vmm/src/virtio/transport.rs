//! Virtio over PCI (virtio 1.3 §4.1): one [`VirtioDevice`] as a PCI function with a single BAR.
//!
//! ```text
//! BAR 0 + 0x0000  common configuration (`common_config`)
//!         0x1000  ISR status
//!         0x2000  device configuration
//!         0x3000  doorbells, 4 bytes a queue (ioeventfd: a write there does not leave the kernel)
//!         0x4000  MSI-X table
//!         0x5000  MSI-X pending bits
//! ```

pub mod state;
#[cfg(test)]
mod tests;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, Ordering},
    },
};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Activation, Error, Interrupt, VirtioDevice, capabilities,
    common_config::{CommonConfig, Effect, status},
    queue::Position,
};
use crate::{
    pci::{
        Function, FunctionState,
        config_space::ConfigSpace,
        msix::{Msix, NO_VECTOR},
        wires::Wires,
    },
    say::say,
};

/// Size of the BAR in bytes.
pub const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
/// Size of each of these regions in bytes.
const REGION: u64 = 0x1000;
/// Distance of two queues' doorbells in bytes.
const DOORBELL_STRIDE: u64 = 4;

const VENDOR: u16 = 0x1af4;
/// PCI device id of virtio device 0 (§4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;
/// Not a transitional device.
const REVISION: u8 = 1;

/// Bits of the ISR status (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What CPU threads and the device's thread share.
struct Shared {
    msix: Msix,
    isr: AtomicU8,
    generation: AtomicU8,
    /// NEEDS_RESET, once the device has given up.
    device_status: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Shared {
    fn signal(&self, vector: &AtomicU16, isr: u8) {
        let vector = vector.load(Ordering::Acquire);
        if !self.msix.signal(vector) {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }

    fn forget(&self) {
        self.isr.store(0, Ordering::Release);
        self.device_status.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

impl Interrupt for Shared {
    fn signal_queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.signal(vector, ISR_QUEUE);
        }
    }

    fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.signal(&self.config_vector, ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.device_status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        self.signal(&self.config_vector, ISR_CONFIG);
    }
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    wires: Arc<dyn Wires>,
    space: ConfigSpace,
    msix_control: u16,
    pci_access: u16,
    common: CommonConfig,
    shared: Arc<Shared>,
    /// Of the enabled queues, while the device works: queue, doorbell.
    doorbells: Vec<(u16, EventFd)>,
    /// Where the doorbells are registered.
    doorbells_at: Option<u64>,
    active: bool,
    /// Of a device that a snapshot had at work and that has not gone on yet: how far it had come in its queues.
    restored: Option<Vec<Position>>,
}

/// MSI-X vectors of a device: one a queue, and one for configuration changes.
pub fn vectors(device: &dyn VirtioDevice) -> u16 {
    device.queue_sizes().len() as u16 + 1
}

impl VirtioPci {
    /// Put `device` behind a BAR at `bar`. Its interrupts are `gsi` and, as [`vectors`] says, some after it.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        wires: Arc<dyn Wires>,
        bar: u64,
        gsi: u32,
    ) -> Self {
        let id = device.device_id();
        let mut space = ConfigSpace::new(VENDOR, FIRST_DEVICE + id, class(id), REVISION);
        space.set_subsystem(VENDOR, FIRST_DEVICE + id);
        space.set_bar(BAR_SIZE, bar);
        let queues = device.queue_sizes().len();
        let count = vectors(&*device);
        let layout = capabilities::Bar {
            common: (COMMON, super::common_config::LENGTH as u64),
            isr: (ISR, 1),
            device: (DEVICE, REGION),
            doorbells: (DOORBELLS, queues as u64 * DOORBELL_STRIDE),
            doorbell_stride: DOORBELL_STRIDE as u32,
            msix_table: MSIX_TABLE as u32,
            msix_pending: MSIX_PENDING as u32,
        };
        let offsets = capabilities::add(&mut space, &layout, count);
        Self {
            common: CommonConfig::new(device.features(), device.queue_sizes(), count),
            shared: Arc::new(Shared {
                msix: Msix::new(count, gsi, wires.clone()),
                isr: AtomicU8::new(0),
                generation: AtomicU8::new(0),
                device_status: AtomicU8::new(0),
                config_vector: AtomicU16::new(NO_VECTOR),
                queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            }),
            device,
            memory,
            wires,
            space,
            msix_control: offsets.msix_control,
            pci_access: offsets.pci_access,
            doorbells: Vec::new(),
            doorbells_at: None,
            active: false,
            restored: None,
        }
    }

    /// Let the device do something; its panic or error costs only itself, and is told here and to the guest.
    fn guarded(
        &mut self,
        what: impl FnOnce(&mut dyn VirtioDevice) -> Result<(), Error>,
    ) -> Result<(), String> {
        let device = &mut *self.device;
        let problem = match catch_unwind(AssertUnwindSafe(|| what(device))) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("{} panicked: a bug in lab-vmm", self.device.name()),
        };
        say(format_args!("{problem}; the guest is told to reset the device"));
        self.shared.needs_reset();
        Err(problem)
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Reset => self.reset(),
            Effect::Activate => self.activate(None),
            Effect::ConfigVector(vector) => self.shared.config_vector.store(vector, Ordering::Release),
            Effect::QueueVector(queue, vector) => {
                if let Some(slot) = self.shared.queue_vectors.get(usize::from(queue)) {
                    slot.store(vector, Ordering::Release);
                }
            }
        }
    }

    /// Start the device, at `positions` of its queues if it was restored.
    fn activate(&mut self, positions: Option<&[Position]>) {
        let features = self.common.features();
        let mut queues = Vec::with_capacity(self.common.queues.len());
        for (index, config) in self.common.queues.iter().enumerate() {
            let queue =
                config.build(features).filter(|queue| !config.enabled || queue.is_valid(&self.memory));
            let (Some(mut queue), Ok(doorbell)) = (queue, EventFd::new(EFD_NONBLOCK)) else {
                // Rings outside of memory, or a size that is none.
                self.doorbells.clear();
                self.shared.needs_reset();
                return;
            };
            if let Some((taken, given)) = positions.and_then(|positions| positions.get(index)) {
                queue.set_next_avail(*taken);
                queue.set_next_used(*given);
                // Rings may have been lost between the snapshot's last look at them and its end.
                let _ = doorbell.write(1);
            }
            if config.enabled
                && let Ok(bell) = doorbell.try_clone()
            {
                self.doorbells.push((index as u16, bell));
            }
            queues.push((queue, doorbell));
        }
        self.active = true;
        self.place_doorbells();
        let interrupt = self.shared.clone();
        let restored = positions.is_some();
        let activation = Activation { memory: self.memory.clone(), features, queues, interrupt, restored };
        drop(self.guarded(|device| device.activate(activation)));
    }

    fn reset(&mut self) {
        if self.active {
            drop(self.guarded(|device| {
                device.reset();
                Ok(())
            }));
            self.active = false;
        }
        self.restored = None;
        self.remove_doorbells();
        self.doorbells.clear();
        self.common.reset();
        self.shared.forget();
    }

    /// Have KVM serve the doorbells where the BAR is now, if it is anywhere.
    fn place_doorbells(&mut self) {
        let bar = self.space.bar();
        if !self.active || self.doorbells_at == bar {
            return;
        }
        self.remove_doorbells();
        let Some(base) = bar else { return };
        for (queue, doorbell) in &self.doorbells {
            // Where it fails, because a guest has laid two BARs over one another, the write comes to `write_bar`.
            if let Some(address) = doorbell_address(base, *queue) {
                let _ = self.wires.add_doorbell(doorbell, address);
            }
        }
        self.doorbells_at = bar;
    }

    fn remove_doorbells(&mut self) {
        if let Some(base) = self.doorbells_at.take() {
            for (queue, doorbell) in &self.doorbells {
                if let Some(address) = doorbell_address(base, *queue) {
                    let _ = self.wires.remove_doorbell(doorbell, address);
                }
            }
        }
    }

    fn ring(&self, offset: u64) {
        let queue = (offset / DOORBELL_STRIDE) as u16;
        if let Some((_, doorbell)) = self.doorbells.iter().find(|(index, _)| *index == queue) {
            let _ = doorbell.write(1);
        }
    }

    /// The access that the guest has described in the PCI access capability (§4.1.4.9): offset in the BAR and length.
    fn pci_access(&self) -> Option<(u64, usize)> {
        let at = usize::from(self.pci_access);
        let bar = self.space.get::<1>(at + 4)?;
        let offset = u32::from_le_bytes(self.space.get(at + 8)?);
        let length = u32::from_le_bytes(self.space.get(at + 12)?);
        let fits = matches!(length, 1 | 2 | 4) && offset % length == 0 && u64::from(offset) < BAR_SIZE;
        (bar == [0] && fits).then_some((offset.into(), length as usize))
    }

    /// Whether an access to configuration space touches the data field of the PCI access capability.
    fn touches_pci_access(&self, offset: u16, length: usize) -> bool {
        let data = usize::from(self.pci_access) + 16;
        usize::from(offset) < data + 4 && usize::from(offset) + length > data
    }
}

fn doorbell_address(base: u64, queue: u16) -> Option<u64> {
    base.checked_add(DOORBELLS + u64::from(queue) * DOORBELL_STRIDE)
}

/// PCI class of a virtio device, for tools that show it.
fn class(id: u16) -> u32 {
    match id {
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xff_0000,
    }
}

impl Function for VirtioPci {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_pci_access(offset, data.len())
            && let Some((from, length)) = self.pci_access()
        {
            let mut bytes = [0; 4];
            self.read_bar(from, &mut bytes[..length]);
            self.space.set(usize::from(self.pci_access) + 16, &bytes);
        }
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.space.write(offset, data);
        if self.touches_pci_access(offset, data.len())
            && let Some((to, length)) = self.pci_access()
            && let Some(bytes) = self.space.get::<4>(usize::from(self.pci_access) + 16)
        {
            self.write_bar(to, &bytes[..length]);
        }
        let control = self.space.get(self.msix_control.into()).map_or(0, u16::from_le_bytes);
        self.shared.msix.set_control(control);
        self.place_doorbells();
    }

    fn bar_size(&self) -> u64 {
        BAR_SIZE
    }

    fn bar(&self) -> Option<u64> {
        self.space.bar()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        let inside = offset % REGION;
        match offset - inside {
            COMMON => {
                let generation = self.shared.generation.load(Ordering::Acquire);
                let device_status = self.shared.device_status.load(Ordering::Acquire);
                self.common.read(inside, data, generation, device_status);
            }
            ISR => {
                data.fill(0);
                if inside == 0
                    && let Some(first) = data.first_mut()
                {
                    *first = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => {
                data.fill(0);
                drop(self.guarded(|device| {
                    device.read_config(inside, data);
                    Ok(())
                }));
            }
            MSIX_TABLE => self.shared.msix.read_table(inside, data),
            MSIX_PENDING => self.shared.msix.read_pending(inside, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let inside = offset % REGION;
        match offset - inside {
            COMMON => {
                for effect in self.common.write(inside, data) {
                    self.apply(effect);
                }
            }
            DEVICE => drop(self.guarded(|device| {
                device.write_config(inside, data);
                Ok(())
            })),
            DOORBELLS => self.ring(inside),
            MSIX_TABLE => self.shared.msix.write_table(inside, data),
            _ => {}
        }
    }

    fn pause(&mut self) {
        drop(self.guarded(|device| {
            device.pause();
            Ok(())
        }));
    }

    fn resume(&mut self) -> Result<(), String> {
        // Also one that was restored and has not worked yet: its files may have been frozen since.
        self.guarded(|device| device.resume())?;
        let Some(positions) = self.restored.take() else { return Ok(()) };
        self.activate(Some(&positions));
        // Interrupts may have been lost, too; drivers look and find nothing new.
        for queue in 0..self.shared.queue_vectors.len() {
            self.shared.signal_queue(queue as u16);
        }
        Ok(())
    }

    fn save(&mut self) -> Result<FunctionState, String> {
        self.device.write_out().map_err(|error| error.to_string())?;
        Ok(FunctionState::Virtio(Box::new(self.state())))
    }

    fn restore(&mut self, state: &FunctionState) -> Result<(), String> {
        match state {
            FunctionState::Virtio(state) => self.set_state(state),
            FunctionState::Plain { .. } => {
                Err(format!("it has something else in the place of {}", self.device.name()))
            }
        }
    }

    fn stop(&mut self) {
        self.reset();
        // Also of a device that never worked: it may have files open.
        drop(self.guarded(|device| {
            device.reset();
            Ok(())
        }));
    }
}
