//! The 64-bit boot protocol of bzImages (Linux, Documentation/arch/x86/boot.rst): `boot_params` and page tables.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{Initrd, memory_map::Range};
use crate::layout::{CMDLINE, PAGE_TABLES, ZERO_PAGE};

/// Offset of the 64-bit entry point from where the kernel is loaded.
pub const ENTRY64: u64 = 0x200;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// First version of the protocol with `xloadflags`.
const VERSION_2_12: u16 = 0x020c;
const LOADER_UNDEFINED: u8 = 0xff;
const SECTOR: u64 = 512;
/// Unit of `syssize` in bytes.
const PARAGRAPH: u64 = 16;

/// Whether the image is whole (`file_size` bytes) and has a 64-bit entry point; if not, why not.
pub fn check(header: &setup_header, file_size: u64) -> Result<(), String> {
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let syssize = header.syssize;
    let expected = (sectors + 1) * SECTOR + u64::from(syssize) * PARAGRAPH;
    // Linux fills its last paragraph up, others (Memtest86+) do not.
    if file_size + (PARAGRAPH - 1) < expected {
        return Err(format!("is cut short: {file_size} bytes of {expected}"));
    }
    if header.version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(
            "is a bzImage without a 64-bit entry point, of a 32-bit kernel or of one older than Linux 3.8: \
                    a newer kernel for x86-64 is needed"
                .into(),
        );
    }
    Ok(())
}

/// First address that the kernel does not need while it unpacks itself; `loaded_end` is the end of the image.
pub fn end(header: &setup_header, loaded_end: u64) -> u64 {
    let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
    // It may move itself up to there with a further alignment's worth of slack.
    loaded_end.max(unpacked).saturating_add(u64::from(header.kernel_alignment))
}

/// Write `boot_params`, and page tables that map the first 4 GiB one to one.
pub fn write(
    memory: &GuestMemoryMmap,
    header: &setup_header,
    map: &[Range],
    initrd: Option<&Initrd>,
    cmdline: &str,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params { hdr: *header, acpi_rsdp_addr: crate::layout::ACPI, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        // Both fit: initrds lie below 3 GiB.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    write_page_tables(memory)
}

/// 4 GiB in pages of 2 MiB: the kernel's decompressor and the structures lie below.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    const PAGE: u64 = 0x1000;
    let pdpt = PAGE_TABLES + PAGE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (gib + 1);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        for entry in 0..512 {
            let page = (gib << 30) | (entry << 21);
            memory.write_obj(page | PRESENT_WRITABLE | LARGE, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_paragraph_of_an_image_need_not_be_full() {
        // The header of Memtest86+ 6.10 (Debian's `memtest86+x64.bin`, 144312 bytes).
        let memtest = setup_header {
            setup_sects: 2,
            syssize: 8924,
            version: VERSION_2_12,
            xloadflags: 9,
            ..Default::default()
        };
        for whole in [144_305, 144_312, 144_320, 145_408] {
            check(&memtest, whole).unwrap();
        }
        assert_eq!(check(&memtest, 144_304).unwrap_err(), "is cut short: 144304 bytes of 144320");
        let narrow = setup_header { xloadflags: 4, ..memtest };
        assert!(check(&narrow, 144_320).unwrap_err().contains("of a 32-bit kernel"));
    }
}
