//! ACPI tables: how the guest finds CPUs, interrupt controllers, PCI, the serial port and the power button.
//!
//! The machine is hardware-reduced (ACPI 6.5 §4.1): no PM timer, no fixed-hardware buttons, no PIT, PIC or RTC. The
//! DSDT is in `dsdt`.

mod dsdt;

pub use dsdt::SLEEP_TYPE_S5;

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

const OEM: [u8; 6] = *b"LAB   ";
const OEM_TABLE: [u8; 8] = *b"LABVMM  ";
const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags (ACPI 6.5 §5.2.9.3): no VGA to probe, no CMOS clock; a keyboard controller and other
/// legacy devices are absent as long as their bits are clear.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables depend on.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Virtual CPUs; their APIC ids are 0, 1, ….
    pub cpus: u8,
    /// 64-bit window for PCI BARs (first address, size), if the CPU has the address bits for it.
    pub window64: Option<(u64, u64)>,
}

/// Write all tables to [`layout::ACPI`], the RSDP first.
pub fn write(memory: &GuestMemoryMmap, machine: &Machine) -> Result<(), GuestMemoryError> {
    memory.write_slice(&tables(machine), GuestAddress(layout::ACPI))
}

/// The bytes that lie at [`layout::ACPI`].
fn tables(machine: &Machine) -> Vec<u8> {
    let mut out = vec![0; Rsdp::len().next_multiple_of(16)];
    let dsdt = place(&mut out, &dsdt::dsdt(machine));
    let tables = [
        place(&mut out, &bytes(&fadt(dsdt))),
        place(&mut out, &bytes(&madt(machine.cpus))),
        place(&mut out, &bytes(&mcfg())),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = place(&mut out, &bytes(&xsdt));
    for (to, from) in out.iter_mut().zip(bytes(&Rsdp::new(OEM, xsdt))) {
        *to = from;
    }
    out
}

/// Append a table, aligned; its guest physical address.
fn place(out: &mut Vec<u8>, table: &[u8]) -> u64 {
    out.resize(out.len().next_multiple_of(16), 0);
    let address = layout::ACPI + out.len() as u64;
    out.extend_from_slice(table);
    address
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn io_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = io_register(layout::RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = io_register(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = io_register(layout::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine =
        Machine { cpus: 32, window64: Some((layout::PCI_WINDOW64, layout::PCI_WINDOW64_SIZE)) };

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    /// The table at a guest physical address.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI) as usize;
        &all[at..at + u32_at(all, at + 4) as usize]
    }

    #[test]
    fn every_table_is_reachable_whole_and_checksummed() {
        let all = tables(&MACHINE);
        assert!(layout::ACPI + (all.len() as u64) <= layout::GENERATION_ID);
        assert_eq!(&all[..8], b"RSD PTR ");
        assert!(sums_to_zero(&all[..Rsdp::len()]));
        let xsdt = table(&all, u64_at(&all, 24));
        assert!(sums_to_zero(xsdt));
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&all, u64::from_le_bytes(entry.try_into().unwrap()));
            assert!(sums_to_zero(table));
            signatures.push(String::from_utf8(table[..4].to_vec()).unwrap());
            if &table[..4] == b"FACP" {
                let dsdt = super::tests::table(&all, u64_at(table, 140));
                assert!(sums_to_zero(dsdt));
                assert_eq!(&dsdt[..4], b"DSDT");
            }
        }
        assert_eq!(signatures, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn the_fadt_declares_what_is_missing() {
        let fadt = bytes(&fadt(0));
        assert_ne!(u32_at(&fadt, 112) & 1 << 20, 0, "hardware-reduced");
        assert_ne!(u32_at(&fadt, 112) & 1 << 10, 0, "reset register");
        // No RTC, no VGA; no i8042 and no legacy devices.
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b10_0100);
        assert_eq!(u64_at(&fadt, 120), u64::from(layout::RESET));
        assert_eq!(u64_at(&fadt, 248), u64::from(layout::SLEEP_CONTROL));
        assert_eq!(u64_at(&fadt, 260), u64::from(layout::SLEEP_STATUS));
    }
}
