//! The PCI capabilities that lead a driver to the structures of a virtio device (virtio 1.3 §4.1.4), and MSI-X.

use crate::pci::{config_space::ConfigSpace, msix};

const CAPABILITY_VENDOR: u8 = 0x09;

/// Types of capability (§4.1.4).
#[derive(Clone, Copy)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciAccess = 5,
}

/// Where the structures lie in the BAR: offset and length in bytes.
pub struct Bar {
    /// Common configuration.
    pub common: (u64, u64),
    /// ISR status.
    pub isr: (u64, u64),
    /// Device configuration.
    pub device: (u64, u64),
    /// Doorbells.
    pub doorbells: (u64, u64),
    /// Distance of two queues' doorbells in bytes.
    pub doorbell_stride: u32,
    /// Offset of the MSI-X table.
    pub msix_table: u32,
    /// Offset of the MSI-X pending bits.
    pub msix_pending: u32,
}

/// Where in configuration space the registers lie that the transport looks at.
pub struct Offsets {
    /// MSI-X message control.
    pub msix_control: u16,
    /// The PCI access capability (§4.1.4.9).
    pub pci_access: u16,
}

/// Append all capabilities; there are `vectors` MSI-X vectors.
pub fn add(space: &mut ConfigSpace, bar: &Bar, vectors: u16) -> Offsets {
    for (structure, place) in
        [(Structure::Common, bar.common), (Structure::Isr, bar.isr), (Structure::Device, bar.device)]
    {
        add_structure(space, structure, place, 0);
    }
    add_structure(space, Structure::Notify, bar.doorbells, bar.doorbell_stride);
    let pci_access = add_structure(space, Structure::PciAccess, (0, 0), 0);
    let mut body = Vec::with_capacity(10);
    body.extend((vectors - 1).to_le_bytes());
    body.extend(bar.msix_table.to_le_bytes());
    body.extend(bar.msix_pending.to_le_bytes());
    let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK;
    let msix = space.add_capability(msix::CAPABILITY, &body, &control.to_le_bytes());
    Offsets { msix_control: msix + 2, pci_access }
}

/// Append a `virtio_pci_cap`; its offset. `stride` is that of doorbells.
fn add_structure(space: &mut ConfigSpace, structure: Structure, place: (u64, u64), stride: u32) -> u16 {
    let mut body = Vec::with_capacity(18);
    let extra = match structure {
        // The multiplier of doorbells; the data of PCI accesses.
        Structure::Notify | Structure::PciAccess => 4,
        _ => 0,
    };
    body.extend([16 + extra, structure as u8, 0, 0, 0, 0]);
    body.extend((place.0 as u32).to_le_bytes());
    body.extend((place.1 as u32).to_le_bytes());
    let mut writable = Vec::new();
    match structure {
        Structure::Notify => body.extend(stride.to_le_bytes()),
        Structure::PciAccess => {
            body.extend([0; 4]);
            // BAR, offset, length, data.
            writable = vec![0, 0, 0xff, 0, 0, 0];
            writable.extend([0xff; 12]);
        }
        _ => {}
    }
    space.add_capability(CAPABILITY_VENDOR, &body, &writable)
}
