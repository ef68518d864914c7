//! Where things lie in the guest's physical address space and I/O ports.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures below 640 KiB, ACPI tables at 0xE0000, the kernel from 1 MiB
//! 0xC000_0000  hole: no RAM up to 4 GiB
//!   0xC000_0000  32-bit PCI window (BARs are placed here at start)
//!   0xE000_0000  ECAM, bus 0
//!   0xFEC0_0000  I/O APIC
//!   0xFEE0_0000  local APICs
//!   0xFFFB_C000  pages that KVM needs on Intel CPUs
//! 0x1_0000_0000  the rest of RAM
//! 0x40_0000_0000 64-bit PCI window, where the CPU has the address bits for it
//! ```

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// Temporary GDT for the kernel's first instructions.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of a PVH kernel.
pub const START_INFO: u64 = 0x6000;
/// Module list of `hvm_start_info`.
pub const MODULES: u64 = 0x6040;
/// Memory map of `hvm_start_info`.
pub const MEMORY_MAP: u64 = 0x6100;
/// `boot_params`, the "zero page", of a bzImage.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables for a bzImage's 64-bit entry: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x20000;
/// Longest command line in bytes, without its terminating zero (x86's COMMAND_LINE_SIZE is 2048).
pub const CMDLINE_MAX: usize = 2047;
/// End of the RAM below the hole of the old video memory and BIOS.
pub const LOW_RAM_END: u64 = 0xA0000;
/// ACPI tables, the RSDP first.
pub const ACPI: u64 = 0xE0000;
/// The VM generation id, 16 bytes, between the ACPI tables and the reset vector.
pub const GENERATION_ID: u64 = 0xFFFE0;
/// Where a BIOS starts after a reset: F000:FFF0 in real mode.
pub const RESET_VECTOR: u64 = 0xFFFF0;
/// End of what the guest is told holds ACPI tables.
pub const ACPI_END: u64 = 0x100000;
/// Where kernels are loaded, at the lowest.
pub const HIGH_RAM: u64 = MIB;

/// First address without RAM below 4 GiB.
pub const HOLE: u64 = 3 * GIB;
/// End of the hole.
pub const HOLE_END: u64 = 4 * GIB;
/// 32-bit window for PCI BARs.
pub const PCI_WINDOW32: u64 = HOLE;
/// Its size in bytes.
pub const PCI_WINDOW32_SIZE: u64 = 512 * MIB;
/// PCI configuration space of bus 0 (ECAM).
pub const ECAM: u64 = 0xE000_0000;
/// Its size in bytes: 32 devices, 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = MIB;
/// I/O APIC.
pub const IOAPIC: u32 = 0xFEC0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// Page for KVM's identity map (Intel CPUs without unrestricted guests).
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for KVM's task state segment (the same CPUs).
pub const KVM_TSS: usize = 0xFFFB_D000;
/// 64-bit window for PCI BARs.
pub const PCI_WINDOW64: u64 = 256 * GIB;
/// Its size in bytes.
pub const PCI_WINDOW64_SIZE: u64 = 64 * GIB;

/// First port of the serial port COM1.
pub const COM1: u16 = 0x3F8;
/// Its interrupt.
pub const COM1_IRQ: u32 = 4;
/// Interrupt of the generic event device (the power button).
pub const GED_IRQ: u32 = 5;
/// Interrupt of the generic event device that says that the machine is a copy of another one.
pub const GENERATION_IRQ: u32 = 6;
/// ACPI sleep control register, one byte.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register, one byte.
pub const RESET: u16 = 0x602;
/// What is written there to reset.
pub const RESET_VALUE: u8 = 1;
/// Command port of the keyboard controller that we do not have; old code resets by writing 0xFE there.
pub const KEYBOARD_COMMAND: u16 = 0x64;

/// Interrupt inputs of the I/O APIC.
pub const IOAPIC_PINS: u32 = 24;
