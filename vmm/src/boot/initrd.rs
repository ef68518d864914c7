//! Initial RAM file systems: cpio archives, compressed or not, one after the other.

use std::{fs::File, io, path::PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Error;
use crate::layout::MIB;

/// All initial RAM file systems of a machine, in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Guest physical address, a multiple of 4 KiB.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Each archive starts at a multiple of this many bytes, as the kernel's unpacker wants it.
const ALIGN: u64 = 4;

/// First bytes of what the kernel can unpack: cpio (newc, crc), gzip, bzip2, lzma, xz, lzo, lz4, zstd.
const MAGICS: [&[u8]; 11] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"\x1f\x9e",
    b"BZh",
    b"\x5d\x00\x00",
    b"\xfd7zXZ",
    b"\x89LZO",
    b"\x02\x21\x4c\x18",
    b"\x04\x22\x4d\x18",
    b"\x28\xb5\x2f\xfd",
];

/// Whether a file with these bytes, of which the first six are enough, may be one: an archive, compressed or not.
pub fn is_initrd(bytes: &[u8]) -> bool {
    bytes.len() >= 6 && MAGICS.iter().any(|magic| bytes.starts_with(magic))
}

/// Read `paths` to the end of the `ram` bytes of memory at address 0.
pub fn load(memory: &GuestMemoryMmap, ram: u64, paths: &[PathBuf]) -> Result<Option<Initrd>, Error> {
    let mut files = Vec::with_capacity(paths.len());
    let mut size = 0u64;
    for path in paths {
        let read = |source| Error::Read { what: "initrd", path: path.clone(), source };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let start = size.next_multiple_of(ALIGN);
        size = start.saturating_add(length).min(u64::MAX / 2);
        files.push((path, file, start, length));
    }
    if files.is_empty() {
        return Ok(None);
    }
    let Some(address) = ram.checked_sub(size).map(|end| end & !0xfff).filter(|address| *address >= MIB)
    else {
        return Err(Error::NoRoom {
            kernel_end_mib: 0,
            initrd_mib: size.div_ceil(MIB),
            memory_mib: ram / MIB,
        });
    };
    for (path, mut file, start, length) in files {
        let at = address + start;
        memory.read_exact_volatile_from(GuestAddress(at), &mut file, length as usize).map_err(|error| {
            Error::Read { what: "initrd", path: path.clone(), source: io::Error::other(error) }
        })?;
        check(memory, at, length).map_err(|problem| Error::File {
            what: "initrd",
            path: path.clone(),
            problem,
        })?;
    }
    Ok(Some(Initrd { address, size }))
}

/// Whether the `length` bytes at `at` begin as an archive does and, if it is not compressed, are whole.
fn check(memory: &GuestMemoryMmap, at: u64, length: u64) -> Result<(), String> {
    let mut head = [0; 6];
    let known = length >= 6 && memory.read_slice(&mut head, GuestAddress(at)).is_ok() && is_initrd(&head);
    if !known {
        return Err(format!("({length} bytes) is not a cpio archive, compressed or not"));
    }
    if head.starts_with(b"0707") {
        check_cpio(memory, at, length)?;
    }
    Ok(())
}

/// Walk the members of an uncompressed cpio archive up to its trailer; what follows may be compressed.
fn check_cpio(memory: &GuestMemoryMmap, at: u64, length: u64) -> Result<(), String> {
    const HEADER: u64 = 110;
    const TRAILER: &[u8] = b"TRAILER!!!\0";
    let mut offset = 0u64;
    loop {
        let cut =
            || format!("is cut short: its member at byte {offset} goes on past its end at byte {length}");
        let mut header = [0; HEADER as usize];
        if offset.checked_add(HEADER).is_none_or(|end| end > length)
            || memory.read_slice(&mut header, GuestAddress(at + offset)).is_err()
        {
            return Err(cut());
        }
        // Field n: eight hexadecimal digits.
        let field = |n: usize| -> Option<u64> {
            let digits = std::str::from_utf8(header.get(6 + n * 8..14 + n * 8)?).ok()?;
            u64::from_str_radix(digits, 16).ok()
        };
        let (Some(file_size), Some(name_size)) = (field(6), field(11)) else {
            return Err(format!("is corrupt: byte {offset} is no cpio header"));
        };
        if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
            return Err(format!("is corrupt: byte {offset} is no cpio header"));
        }
        let data = (offset + HEADER + name_size).next_multiple_of(4);
        let next = (data + file_size).next_multiple_of(4);
        let mut name = [0; TRAILER.len()];
        if name_size == TRAILER.len() as u64
            && offset + HEADER + name_size <= length
            && memory.read_slice(&mut name, GuestAddress(at + offset + HEADER)).is_ok()
            && name == *TRAILER
        {
            return Ok(());
        }
        if next > length {
            return Err(cut());
        }
        offset = next;
    }
}
