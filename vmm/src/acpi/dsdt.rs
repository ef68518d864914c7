//! The DSDT: what cannot be found by itself, in AML.

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed,
        Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
    },
    sdt::Sdt,
};

use super::{Machine, OEM, OEM_REVISION, OEM_TABLE, bytes};
use crate::layout::{self, COM1, COM1_IRQ, GED_IRQ, GENERATION_ID, GENERATION_IRQ};

/// Type of the sleep state S5, written to the sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_TYPE_S5: u8 = 5;
/// Notification of a pressed power button (ACPI 6.5 §5.6.6).
const POWER_BUTTON_PRESSED: u8 = 0x80;
/// Notification of a generation id that has changed (Microsoft, Virtual Machine Generation ID).
const GENERATION_CHANGED: u8 = 0x80;
/// Length of the DSDT's header, which is that of any table.
const HEADER: u32 = 36;

/// The DSDT of a machine, header and checksum included.
pub fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut aml = sleep_state();
    aml.extend(system_bus(machine));
    let mut table = Sdt::new(*b"DSDT", HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    bytes(&table)
}

fn sleep_state() -> Vec<u8> {
    bytes(&Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8])))
}

fn system_bus(machine: &Machine) -> Vec<u8> {
    let mut devices = pci(machine);
    devices.extend(reserved());
    devices.extend(serial());
    devices.extend(power_button());
    devices.extend(generation_id());
    devices.extend(events());
    Scope::raw("_SB_".into(), devices)
}

/// The PCI root bridge: bus 0 and the windows for BARs.
fn pci(machine: &Machine) -> Vec<u8> {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let window32 = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW32 as u32,
        (layout::PCI_WINDOW32 + layout::PCI_WINDOW32_SIZE - 1) as u32,
        None,
    );
    let window64 = machine.window64.map(|(start, size)| {
        let cacheable = AddressSpaceCacheable::NotCacheable;
        AddressSpace::<u64>::new_memory(cacheable, true, start, start + (size - 1), None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &window32];
    resources.extend(window64.as_ref().map(|window| window as &dyn Aml));
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// Reserves the ECAM window, without which Linux does not trust the MCFG (PCI Firmware 3.3 §4.1.2).
fn reserved() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    bytes(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let ports = IO::new(COM1, COM1, 0, 8);
    let irq = Interrupt::new(true, true, false, false, COM1_IRQ);
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &irq])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
    ))
}

/// The VM generation id: where 16 bytes lie that are others in every copy of the machine, so that the guest's kernel draws
/// new random numbers (Microsoft, Virtual Machine Generation ID; Linux finds it by the `_CID`).
fn generation_id() -> Vec<u8> {
    let address = Package::new(vec![&(GENERATION_ID as u32), &0u32]);
    bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"LABVGEN"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    ))
}

/// The generic event device, which says what has happened to the button and to the generation id (ACPI 6.5 §5.6.9).
fn events() -> Vec<u8> {
    let edge = |number| Interrupt::new(true, true, false, false, number);
    let (button, generation) = (edge(GED_IRQ), edge(GENERATION_IRQ));
    let (button_path, generation_path) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    let pressed = Notify::new(&button_path, &POWER_BUTTON_PRESSED);
    let changed = Notify::new(&generation_path, &GENERATION_CHANGED);
    let is_button = Equal::new(&Arg(0), &GED_IRQ);
    let is_generation = Equal::new(&Arg(0), &GENERATION_IRQ);
    let on_button = If::new(&is_button, vec![&pressed]);
    let on_generation = If::new(&is_generation, vec![&changed]);
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&button, &generation])),
            &Method::new("_EVT".into(), 1, true, vec![&on_button, &on_generation]),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The interpreter itself is the guest's; what it makes of this table is seen in the end-to-end tests. Here: that
    /// the table names what a guest looks for.
    #[test]
    fn names_every_device() {
        let with = dsdt(&Machine { cpus: 1, window64: Some((layout::PCI_WINDOW64, 1 << 30)) });
        for name in
            ["_S5_", "PCI0", "MBRD", "COM1", "PWRB", "VGEN", "VM_Gen_Counter", "GED_", "_EVT", "ACPI0013"]
        {
            assert!(with.windows(name.len()).any(|w| w == name.as_bytes()), "{name}");
        }
        let without = dsdt(&Machine { cpus: 1, window64: None });
        assert!(without.len() < with.len(), "no 64-bit window without the address bits");
    }
}
