//! The PVH boot protocol (Xen's `docs/misc/pvh.pandoc`): `hvm_start_info`, its modules and its memory map.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Initrd, memory_map::Range};
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;

/// Write `hvm_start_info` and what it points at.
pub fn write(
    memory: &GuestMemoryMmap,
    map: &[Range],
    initrd: Option<&Initrd>,
) -> Result<(), GuestMemoryError> {
    for (at, range) in (layout::MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at))?;
    }
    if let Some(initrd) = initrd {
        let module =
            hvm_modlist_entry { paddr: initrd.address, size: initrd.size, cmdline_paddr: 0, reserved: 0 };
        memory.write_obj(module, GuestAddress(layout::MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: layout::MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    memory.write_obj(info, GuestAddress(layout::START_INFO))
}
