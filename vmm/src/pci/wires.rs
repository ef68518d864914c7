//! What joins PCI devices to the guest's CPUs: message-signalled interrupts and doorbells, both inside KVM.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

#[cfg(test)]
use std::{
    collections::btree_map::Entry,
    os::fd::{AsRawFd, RawFd},
};

use crate::layout::IOAPIC_PINS;

/// A message that is an interrupt: write `data` to `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Guest physical address.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// Interrupts and doorbells of PCI devices. KVM's are [`KvmWires`]; tests have a recorder.
pub trait Wires: Send + Sync {
    /// Let interrupt number `gsi` send `message` from now on.
    fn route(&self, gsi: u32, message: Message) -> io::Result<()>;
    /// Let `line` raise interrupt `gsi` when it is written to.
    fn join(&self, line: &EventFd, gsi: u32) -> io::Result<()>;
    /// Let any write of the guest to `address` signal `doorbell`, and nothing else.
    fn add_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
    /// Undo [`add_doorbell`](Self::add_doorbell).
    fn remove_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
}

/// KVM's irqfd, interrupt routing and ioeventfd.
pub struct KvmWires {
    vm: Arc<VmFd>,
    /// KVM takes the table of routes as a whole.
    routes: Mutex<BTreeMap<u32, Message>>,
}

impl KvmWires {
    /// Wires of one machine, whose interrupt controllers exist.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }
}

fn ioapic_route(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_route(gsi: u32, message: &Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl Wires for KvmWires {
    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = routes.insert(gsi, message);
        let mut entries: Vec<_> = (0..IOAPIC_PINS).map(ioapic_route).collect();
        entries.extend(routes.iter().map(|(gsi, message)| message_route(*gsi, message)));
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        self.vm.set_gsi_routing(&table).map_err(|error| {
            // What KVM does not take must not spoil the table for the other devices.
            match before {
                Some(message) => routes.insert(gsi, message),
                None => routes.remove(&gsi),
            };
            error.into()
        })
    }

    fn join(&self, line: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.vm.register_irqfd(line, gsi)?)
    }

    fn add_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.vm.register_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn remove_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.vm.unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

/// Wires that remember, for tests.
#[cfg(test)]
#[derive(Default)]
pub struct Recorder {
    /// Message of each interrupt.
    pub routes: Mutex<BTreeMap<u32, Message>>,
    /// The line of each joined interrupt.
    pub lines: Mutex<BTreeMap<u32, EventFd>>,
    /// The doorbell at each address, and the descriptor that it was added with: like KVM, one an address, which only
    /// its owner removes.
    pub doorbells: Mutex<BTreeMap<u64, (RawFd, EventFd)>>,
}

#[cfg(test)]
impl Recorder {
    /// Interrupts raised on `gsi` since the last call.
    pub fn raised(&self, gsi: u32) -> u64 {
        self.lines.lock().unwrap().get(&gsi).map_or(0, |line| line.read().unwrap_or(0))
    }
}

#[cfg(test)]
impl Wires for Recorder {
    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        self.routes.lock().unwrap().insert(gsi, message);
        Ok(())
    }
    fn join(&self, line: &EventFd, gsi: u32) -> io::Result<()> {
        let known = self.lines.lock().unwrap().insert(gsi, line.try_clone()?);
        assert!(known.is_none(), "interrupt {gsi} joined twice");
        Ok(())
    }
    fn add_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        match self.doorbells.lock().unwrap().entry(address) {
            Entry::Occupied(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Entry::Vacant(place) => {
                place.insert((doorbell.as_raw_fd(), doorbell.try_clone()?));
                Ok(())
            }
        }
    }
    fn remove_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        match doorbells.get(&address) {
            Some((owner, _)) if *owner == doorbell.as_raw_fd() => {
                doorbells.remove(&address);
                Ok(())
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
