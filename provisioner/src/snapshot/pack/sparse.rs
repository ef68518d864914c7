//! Files with holes: where their data is, and data written so that there are holes again.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Holes are looked for, and made, in units of this: the block of most file systems.
const BLOCK: u64 = 4096;

/// Where a file of this length has data, in whole blocks, in order.
pub fn data(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(length);
        at = end.max(start + 1);
        let start = start / BLOCK * BLOCK;
        let end = end.div_ceil(BLOCK).saturating_mul(BLOCK).min(length);
        match found.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ if start < end => found.push(start..end),
            _ => {}
        }
    }
    Ok(found)
}

/// Writes data to its place, except for blocks of zeros: the file has none there yet. Returns how many bytes it wrote.
pub fn write(file: &File, offset: u64, data: &[u8]) -> io::Result<u64> {
    let mut at = offset;
    let mut written = 0;
    // Whole blocks of the file, whatever the place.
    let first = (BLOCK - offset % BLOCK).min(data.len() as u64) as usize;
    let (first, rest) = data.split_at(first);
    for block in std::iter::once(first).chain(rest.chunks(BLOCK as usize)) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at)?;
            written += block.len() as u64;
        }
        at += block.len() as u64;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_made() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let length = (10 << 20) + 5;
        file.set_len(length).unwrap();
        assert_eq!(data(&file, length).unwrap(), []);
        let mut bytes = vec![0; 3 << 20];
        bytes[1 << 20] = 1;
        bytes[(1 << 20) + 4096] = 1;
        assert_eq!(write(&file, 4 << 20, &bytes).unwrap(), 8192);
        assert_eq!(write(&file, length - 1, &[7]).unwrap(), 1);
        let found = data(&file, length).unwrap();
        assert_eq!(found, [5 << 20..(5 << 20) + 8192, 10 << 20..length]);
        assert_eq!(write(&file, 5, &[]).unwrap(), 0);
    }
}
