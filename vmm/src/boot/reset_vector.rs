//! A BIOS of five instructions: where a PC's BIOS starts after a reset, the machine's reset register is written.
//!
//! Linux reboots through EFI when ACPI is hardware-reduced, and without EFI through the BIOS: in real mode it jumps to
//! F000:FFF0 (arch/x86/kernel/reboot.c), and would run through empty memory for ever.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{RESET, RESET_VALUE, RESET_VECTOR};

/// Write the code to [`RESET_VECTOR`].
pub fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let [low, high] = RESET.to_le_bytes();
    // mov al, RESET_VALUE; mov dx, RESET; out dx, al; hlt; jmp to the hlt
    let code = [0xb0, RESET_VALUE, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, GuestAddress(RESET_VECTOR))
}
