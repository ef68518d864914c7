//! The virtio devices that a configuration asks for, on the PCI bus.

use std::{
    io::Write,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vm_memory::GuestMemoryMmap;

use crate::{
    config::VmConfig,
    layout,
    pci::{Function, PciBus, SLOTS, host_bridge::HostBridge, wires::Wires},
    virtio::{
        self, VirtioDevice,
        block::Block,
        console::Console,
        counters::Counters,
        entropy::Entropy,
        net::Net,
        transport::{self, BAR_SIZE, VirtioPci},
        vsock::Vsock,
    },
};

/// Why a device is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be made.
    #[error(transparent)]
    Device(#[from] virtio::Error),
    /// Too many of them.
    #[error("{0} devices do not fit on the PCI bus: a machine has at most {max} disks and network cards together", max = SLOTS - 4)]
    TooMany(usize),
}

/// What is still asked of devices after they are on the bus.
pub struct Devices {
    disks: Vec<Arc<Counters<3>>>,
    nets: Vec<Arc<Counters<4>>>,
    links: Vec<Arc<AtomicBool>>,
}

/// Fills the bus.
struct Slots<'a> {
    functions: Vec<Box<dyn Function>>,
    gsi: u32,
    memory: &'a GuestMemoryMmap,
    wires: Arc<dyn Wires>,
}

impl Slots<'_> {
    fn add(&mut self, device: impl VirtioDevice + 'static) {
        let vectors = transport::vectors(&device);
        let bar = layout::PCI_WINDOW32 + self.functions.len() as u64 * BAR_SIZE;
        let function =
            VirtioPci::new(Box::new(device), self.memory.clone(), self.wires.clone(), bar, self.gsi);
        self.gsi += u32::from(vectors);
        self.functions.push(Box::new(function));
    }
}

impl Devices {
    /// Make all devices of `config`. The console reads `input` and writes `output`.
    pub fn new(
        config: &VmConfig,
        memory: &GuestMemoryMmap,
        wires: Arc<dyn Wires>,
        input: OwnedFd,
        output: Box<dyn Write + Send>,
    ) -> Result<(Self, PciBus), Error> {
        let mut slots =
            Slots { functions: vec![Box::new(HostBridge::new())], gsi: layout::IOAPIC_PINS, memory, wires };
        let mut devices = Self { disks: Vec::new(), nets: Vec::new(), links: Vec::new() };
        slots.add(Console::new("console", input, output)?);
        slots.add(Entropy::new()?);
        for (index, disk) in config.disks.iter().enumerate() {
            let device = Block::new(&format!("disk{index}"), disk)?;
            devices.disks.push(device.counters());
            slots.add(device);
        }
        for (index, net) in config.nets.iter().enumerate() {
            let device = Net::new(&format!("net{index}"), net)?;
            devices.nets.push(device.counters());
            devices.links.push(device.joined());
            slots.add(device);
        }
        if let Some(vsock) = &config.vsock {
            slots.add(Vsock::new(vsock)?);
        }
        if slots.functions.len() > SLOTS {
            return Err(Error::TooMany(slots.functions.len()));
        }
        Ok((devices, PciBus::new(slots.functions)))
    }

    /// Requests, bytes read, bytes written of each disk.
    pub fn disks(&self) -> Vec<[u64; 3]> {
        self.disks.iter().map(|counters| counters.read()).collect()
    }

    /// Frames and bytes sent, frames and bytes received by each card.
    pub fn nets(&self) -> Vec<[u64; 4]> {
        self.nets.iter().map(|counters| counters.read()).collect()
    }

    /// Whether each card is joined to the network.
    pub fn links(&self) -> Vec<bool> {
        self.links.iter().map(|joined| joined.load(Ordering::Relaxed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::{ConsoleConfig, DiskConfig, DiskFormat, NetConfig, VsockConfig},
        memory,
        pci::wires::Recorder,
    };

    /// A machine with one device of each kind, its files in `folder`.
    fn config(folder: &std::path::Path) -> VmConfig {
        let disk = folder.join("disk");
        std::fs::write(&disk, [0; 1 << 16]).unwrap();
        VmConfig {
            name: "t".into(),
            kernel: Default::default(),
            initrd: Vec::new(),
            cmdline: String::new(),
            cpus: 1,
            nested: false,
            memory_mib: 32,
            disks: vec![DiskConfig {
                path: disk,
                format: DiskFormat::Raw,
                read_only: false,
                sector_bytes: 512,
            }],
            nets: vec![NetConfig {
                socket: folder.join("net"),
                port: "t".into(),
                mac: "52:54:00:00:00:01".into(),
            }],
            vsock: Some(VsockConfig {
                cid: 3,
                socket: folder.join("vsock"),
                notify_port: None,
                clock_port: None,
            }),
            console: ConsoleConfig::default(),
            control: None,
            lock: None,
            restore: None,
            prefetch: false,
            paused: false,
        }
    }

    fn bus(folder: &std::path::Path) -> (Devices, PciBus, OwnedFd) {
        let config = config(folder);
        let (input, keep) = rustix::pipe::pipe().unwrap();
        let memory = memory::map(config.memory_mib, false).unwrap();
        let wires = Arc::new(Recorder::default());
        let (devices, bus) = Devices::new(&config, &memory, wires, input, Box::new(std::io::sink())).unwrap();
        (devices, bus, keep)
    }

    const DEVICES: u64 = 5;

    fn bar(slot: u64) -> u64 {
        layout::PCI_WINDOW32 + slot * BAR_SIZE
    }

    /// Set up the device in `slot` as a driver does, with all its queues in memory that nothing was written to.
    fn drive(bus: &PciBus, slot: u64) {
        bus.write(layout::ECAM + (slot << 15) + 4, &[6, 0]);
        let write = |register: u64, data: &[u8]| bus.write(bar(slot) + register, data);
        write(0x14, &[3]);
        write(0x08, &1u32.to_le_bytes());
        write(0x0c, &1u32.to_le_bytes());
        write(0x14, &[11]);
        for queue in 0..3u16 {
            write(0x16, &queue.to_le_bytes());
            write(0x18, &8u16.to_le_bytes());
            for (register, at) in [(0x20, 0x10_0000u64), (0x28, 0x11_0000), (0x30, 0x12_0000)] {
                write(register, &(at + slot * 0x1000 + u64::from(queue) * 0x100).to_le_bytes());
            }
            write(0x1c, &[1, 0]);
        }
        write(0x14, &[15]);
    }

    fn status(bus: &PciBus, slot: u64) -> u8 {
        let mut status = [0];
        bus.read(bar(slot) + 0x14, &mut status);
        status[0]
    }

    #[test]
    fn every_device_can_be_driven_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (devices, bus, _keep) = bus(folder.path());
        for slot in 1..=DEVICES {
            drive(&bus, slot);
            assert_eq!(status(&bus, slot), 15, "device {slot}");
        }
        assert_eq!(
            (devices.disks(), devices.nets(), devices.links()),
            (vec![[0; 3]], vec![[0; 4]], vec![false])
        );
        bus.stop();
    }

    #[test]
    fn a_full_bus_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.disks = vec![config.disks[0].clone(); SLOTS];
        config.disks.iter_mut().for_each(|disk| disk.read_only = true);
        let (input, _keep) = rustix::pipe::pipe().unwrap();
        let memory = memory::map(32, false).unwrap();
        let made =
            Devices::new(&config, &memory, Arc::new(Recorder::default()), input, Box::new(std::io::sink()));
        assert!(matches!(made, Err(Error::TooMany(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn no_register_write_breaks_any_device(
            writes in prop::collection::vec(
                (
                    1..=DEVICES,
                    any::<bool>(),
                    prop_oneof![4 => 0u64..0x40, 2 => 0x2000u64..0x2040, 1 => 0x3000u64..0x3010, 1 => 0..BAR_SIZE - 8],
                    prop::collection::vec(prop_oneof![any::<u8>(), Just(0), Just(15)], 1..=8),
                ),
                1..120,
            )
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (_devices, bus, _keep) = bus(folder.path());
            (1..=DEVICES).for_each(|slot| drive(&bus, slot));
            for (slot, config, offset, data) in writes {
                let at = if config { layout::ECAM + (slot << 15) + offset % 0x100 } else { bar(slot) + offset };
                bus.write(at, &data);
                bus.read(at, &mut data.clone());
            }
            for slot in 1..=DEVICES {
                // BAR back in its place, device reset: it works as on the first day.
                bus.write(layout::ECAM + (slot << 15) + 4, &[0, 0]);
                bus.write(layout::ECAM + (slot << 15) + 0x10, &bar(slot).to_le_bytes());
                bus.write(layout::ECAM + (slot << 15) + 4, &[2, 0]);
                bus.write(bar(slot) + 0x14, &[0]);
                prop_assert_eq!(status(&bus, slot), 0);
                bus.write(bar(slot) + 8, &[0; 4]);
                bus.write(bar(slot) + 0xc, &[0; 4]);
                drive(&bus, slot);
                prop_assert_eq!(status(&bus, slot), 15);
            }
            bus.stop();
        }
    }
}
