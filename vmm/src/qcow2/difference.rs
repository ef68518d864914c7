//! Making an overlay of a whole disk: what is the same in the image below it takes no room.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::fs::SeekFrom;

use super::{Error, chain, create_overlay};
use crate::config::DiskFormat;

/// Compared at a time, in bytes.
const STEP: usize = 1 << 20;

/// Makes `target`, which is not there yet: a qcow2 overlay on the raw image `base` that is the same disk as the raw image
/// `disk`.
///
/// # Errors
/// `disk` is smaller than `base`, or a file can't be read or written.
pub fn difference(disk: &Path, base: &Path, target: &Path) -> Result<(), Error> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| Error::Io { path: path.to_owned(), action: "open it", source })
    };
    let (from, below) = (open(disk)?, open(base)?);
    let failed = |source| Error::Io { path: target.to_owned(), action: "copy to it", source };
    let size = from.metadata().map_err(failed)?.len();
    let covered = below.metadata().map_err(failed)?.len();
    create_overlay(target, base, DiskFormat::Raw, size)?;
    let to = chain::open(target, true)?;
    let cluster = usize::try_from(to.cluster_size).unwrap_or(STEP).clamp(1, STEP);
    let copied = (|| {
        let (mut here, mut there) = (vec![0; STEP], vec![0; STEP]);
        let mut offset = 0;
        while offset < size {
            // Behind the end of what is below, a hole is what an overlay has by itself.
            if offset >= covered {
                offset = match rustix::fs::seek(&from, SeekFrom::Data(offset)) {
                    Ok(data) => data - data % STEP as u64,
                    Err(rustix::io::Errno::NXIO) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                };
            }
            let length = read(&from, &mut here, offset)?;
            let beneath = read(&below, &mut there, offset)?;
            there.get_mut(beneath..).unwrap_or_default().fill(0);
            let pieces = here.get(..length).unwrap_or_default().chunks(cluster);
            for ((place, piece), beneath) in
                (offset..).step_by(cluster).zip(pieces).zip(there.chunks(cluster))
            {
                match beneath.get(..piece.len()) == Some(piece) {
                    true => {}
                    false if piece.iter().all(|byte| *byte == 0) => {
                        to.access.write_zeroes(place, piece.len() as u64)?;
                    }
                    false => to.access.write(piece, place)?,
                }
            }
            offset += length.max(1) as u64;
        }
        Ok(())
    })();
    copied.and_then(|()| to.access.flush()).and_then(|()| to.file.sync_all()).map_err(failed)
}

/// Reads up to the end of the file or of the buffer; how much there is.
fn read(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + length as u64)? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn an_overlay_is_the_same_disk() {
        let dir = tempfile::tempdir().unwrap();
        let [base, disk, target] = ["base", "disk", "target"].map(|name| dir.path().join(name));
        let mut bytes = vec![0u8; 3 << 20];
        bytes[..2 << 20].iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 4096 + 1) as u8);
        fs::write(&base, &bytes).unwrap();
        // Something else, zeros where there was data, something behind the end of what is below, and a hole.
        bytes[70_000] ^= 1;
        bytes[1 << 20..(1 << 20) + 200_000].fill(0);
        bytes.resize(7 << 20, 0);
        bytes[6 << 20] = 7;
        fs::write(&disk, &bytes).unwrap();
        File::options().write(true).open(&disk).unwrap().set_len(40 << 20).unwrap();
        bytes.resize(40 << 20, 0);
        difference(&disk, &base, &target).unwrap();
        let made = chain::open(&target, false).unwrap();
        let mut read = vec![1; 40 << 20];
        made.access.read(read.as_mut_slice(), 0).unwrap();
        assert!(read == bytes);
        assert!(fs::metadata(&target).unwrap().len() < 2 << 20, "what is the same takes no room");
    }
}
