//! Where a CPU's accesses to ports and memory-mapped registers go. What nobody answers reads as ones.

use std::sync::Arc;

use crate::{pci::PciBus, platform::Platform};

/// Everything that answers to a CPU.
pub struct Bus {
    /// Ports: serial port, sleep and reset registers.
    pub platform: Platform,
    /// Memory: PCI configuration space and BARs.
    pub pci: Arc<PciBus>,
}

impl Bus {
    /// A write to a port. `data` is more than one byte for a wide access or a string instruction: all our ports are
    /// bytes wide, so each byte is a write of its own.
    pub fn io_write(&self, port: u16, data: &[u8]) {
        for byte in data {
            self.platform.write(port, *byte);
        }
    }

    /// A read from a port.
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = self.platform.read(port);
        }
    }

    /// A read from memory that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.read(address, data) {
            data.fill(0xff);
        }
    }

    /// A write to memory that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.pci.write(address, data);
    }
}
