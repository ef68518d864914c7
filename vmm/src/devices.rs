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
