//! PCI bus 0: configuration space by ECAM (PCI Express 6.0 §7.2.2), one function a device, one 64-bit BAR a function,
//! interrupts by MSI-X alone.

pub mod config_space;
pub mod host_bridge;
pub mod msix;
pub mod wires;

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};

use crate::{
    layout::{ECAM, ECAM_SIZE},
    virtio::transport::state::TransportState,
};

/// Most devices on the bus, host bridge included.
pub const SLOTS: usize = 32;

/// What a snapshot keeps of a function.
#[derive(Serialize, Deserialize)]
pub enum FunctionState {
    /// One that has only configuration space.
    Plain {
        /// Its first 256 bytes.
        space: Vec<u8>,
    },
    /// A virtio device.
    Virtio(Box<TransportState>),
}

/// A PCI function. Offsets are within the function's 4 KiB of configuration space, or within its BAR; `data` is 1 to 8
/// bytes and lies inside.
pub trait Function: Send {
    /// Read configuration space.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// Write configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// Size of its BAR in bytes; 0 if it has none.
    fn bar_size(&self) -> u64;
    /// Where its BAR is decoded, if it is.
    fn bar(&self) -> Option<u64>;
    /// Read from its BAR.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Write to its BAR.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
    /// Stand still: no CPU runs until `resume`.
    fn pause(&mut self);
    /// Go on; an error says why it can't, which the guest is told, too.
    fn resume(&mut self) -> Result<(), String>;
    /// The machine ends: stop working, put everything away.
    fn stop(&mut self);
    /// The state of the function, which stands still; an error says what keeps it from being saved.
    fn save(&mut self) -> Result<FunctionState, String>;
    /// Become what another machine's function in the same place was, and stand still. An error says what does not suit.
    fn restore(&mut self, state: &FunctionState) -> Result<(), String>;
}

struct Slot {
    function: Mutex<Box<dyn Function>>,
    /// Copy of `bar()`, so that finding a BAR's owner takes no locks; NOT_DECODED if there is none.
    bar: AtomicU64,
    bar_size: u64,
}

const NOT_DECODED: u64 = u64::MAX;

impl Slot {
    fn function(&self) -> MutexGuard<'_, Box<dyn Function>> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bus 0.
pub struct PciBus {
    slots: Vec<Slot>,
}

/// What an address belongs to.
enum Target<'a> {
    Config(Option<&'a Slot>, u16),
    Bar(&'a Slot, u64),
}

impl PciBus {
    /// A bus with these functions as devices 0, 1, …; at most [`SLOTS`].
    pub fn new(functions: Vec<Box<dyn Function>>) -> Self {
        let slot = |function: Box<dyn Function>| Slot {
            bar: AtomicU64::new(function.bar().unwrap_or(NOT_DECODED)),
            bar_size: function.bar_size(),
            function: Mutex::new(function),
        };
        Self { slots: functions.into_iter().take(SLOTS).map(slot).collect() }
    }

    fn find(&self, address: u64, length: usize) -> Option<Target<'_>> {
        let end = address.checked_add(length as u64)?;
        if (ECAM..ECAM + ECAM_SIZE).contains(&address) {
            let offset = address - ECAM;
            let (device, function, register) = (offset >> 15, offset >> 12 & 7, (offset & 0xfff) as u16);
            let slot = usize::try_from(device).ok().and_then(|device| self.slots.get(device));
            let inside = usize::from(register) + length <= 0x1000;
            return Some(Target::Config(slot.filter(|_| function == 0 && inside), register));
        }
        for slot in &self.slots {
            let bar = slot.bar.load(Ordering::Acquire);
            if address >= bar && bar.checked_add(slot.bar_size).is_some_and(|bar_end| end <= bar_end) {
                return Some(Target::Bar(slot, address - bar));
            }
        }
        None
    }

    /// Read; whether anything is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some(Target::Config(Some(slot), register)) => slot.function().read_config(register, data),
            Some(Target::Config(None, _)) => data.fill(0xff),
            Some(Target::Bar(slot, offset)) => slot.function().read_bar(offset, data),
            None => return false,
        }
        true
    }

    /// Write.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some(Target::Config(Some(slot), register)) => {
                let mut function = slot.function();
                function.write_config(register, data);
                slot.bar.store(function.bar().unwrap_or(NOT_DECODED), Ordering::Release);
            }
            Some(Target::Bar(slot, offset)) => slot.function().write_bar(offset, data),
            Some(Target::Config(None, _)) | None => {}
        }
    }

    /// Have every device stand still.
    pub fn pause(&self) {
        self.slots.iter().for_each(|slot| slot.function().pause());
    }

    /// Have every device go on, and tell the first that can't.
    pub fn resume(&self) -> Result<(), String> {
        let resumed: Vec<_> = self.slots.iter().map(|slot| slot.function().resume()).collect();
        resumed.into_iter().collect()
    }

    /// The state of every device; all stand still.
    pub fn save(&self) -> Result<Vec<FunctionState>, String> {
        self.slots.iter().map(|slot| slot.function().save()).collect()
    }

    /// Let the devices, which the guest has not seen yet, become those of another machine, standing still.
    pub fn restore(&self, states: &[FunctionState]) -> Result<(), String> {
        if states.len() != self.slots.len() {
            let (theirs, ours) = (states.len(), self.slots.len());
            return Err(format!("it has {theirs} devices where {ours} are asked for"));
        }
        for (slot, state) in self.slots.iter().zip(states) {
            let mut function = slot.function();
            function.restore(state)?;
            slot.bar.store(function.bar().unwrap_or(NOT_DECODED), Ordering::Release);
        }
        Ok(())
    }

    /// The machine ends: stop every device.
    pub fn stop(&self) {
        for slot in &self.slots {
            slot.function().stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{host_bridge::HostBridge, *};

    /// A function whose BAR lies wherever the guest has put it.
    struct Movable(config_space::ConfigSpace);

    impl Function for Movable {
        fn read_config(&mut self, offset: u16, data: &mut [u8]) {
            self.0.read(offset, data);
        }
        fn write_config(&mut self, offset: u16, data: &[u8]) {
            self.0.write(offset, data);
        }
        fn bar_size(&self) -> u64 {
            0x1000
        }
        fn bar(&self) -> Option<u64> {
            self.0.bar()
        }
        fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
            assert!(offset + data.len() as u64 <= 0x1000, "an access outside of the BAR");
            data.fill(offset as u8);
        }
        fn write_bar(&mut self, offset: u64, data: &[u8]) {
            assert!(offset + data.len() as u64 <= 0x1000, "an access outside of the BAR");
        }
        fn pause(&mut self) {}
        fn resume(&mut self) -> Result<(), String> {
            Ok(())
        }
        fn stop(&mut self) {}
        fn save(&mut self) -> Result<FunctionState, String> {
            Ok(FunctionState::Plain { space: self.0.bytes().to_vec() })
        }
        fn restore(&mut self, _: &FunctionState) -> Result<(), String> {
            Ok(())
        }
    }

    fn bus() -> PciBus {
        let mut space = config_space::ConfigSpace::new(1, 2, 3, 4);
        space.set_bar(0x1000, 0xc000_0000);
        PciBus::new(vec![Box::new(HostBridge::new()), Box::new(Movable(space))])
    }

    #[test]
    fn a_bar_answers_where_it_is_decoded() {
        let bus = bus();
        let mut data = [0; 4];
        assert!(!bus.read(0xc000_0010, &mut data), "not decoded yet");
        bus.write(ECAM + 0x8004, &[2, 0]);
        assert!(bus.read(0xc000_0010, &mut data));
        assert_eq!(data, [0x10; 4]);
        bus.write(ECAM + 0x8010, &0xd000_0000u32.to_le_bytes());
        assert!(!bus.read(0xc000_0010, &mut data) && bus.read(0xd000_0ffc, &mut data));
        assert!(!bus.read(0xd000_0ffe, &mut data), "half outside");
        assert!(bus.read(ECAM + 0x1000, &mut data), "function 1 of device 0");
        assert_eq!(data, [0xff; 4]);
    }

    proptest! {
        #[test]
        fn no_access_breaks_the_bus(
            accesses in prop::collection::vec(
                (
                    prop_oneof![
                        ECAM..ECAM + 0x100,
                        ECAM + 0x8000..ECAM + 0x8100,
                        ECAM..ECAM + ECAM_SIZE + 8,
                        0xc000_0000u64..0xc000_2000,
                        u64::MAX - 0x2000..=u64::MAX,
                    ],
                    prop::collection::vec(prop_oneof![any::<u8>(), Just(0xff), Just(2)], 1..=8),
                ),
                1..200,
            )
        ) {
            let bus = bus();
            for (address, data) in accesses {
                bus.write(address, &data);
                bus.read(address, &mut data.clone());
            }
            let mut ids = [0; 4];
            bus.read(ECAM, &mut ids);
            prop_assert_eq!(ids, [0x36, 0x1b, 0x08, 0x00]);
        }
    }
}
