//! Making the disk of an image larger.

use std::path::Path;

use imago::format::PreallocateMode;

use super::{Error, chain, info};

/// Makes an image's disk `size_bytes` large, if it is smaller; what is added reads as zeroes, whatever lies below it. Returns
/// how large it is then. Nobody may have it open.
pub fn grow(path: &Path, size_bytes: u64) -> Result<u64, Error> {
    let size = info(path)?.size_bytes;
    if size >= size_bytes {
        return Ok(size);
    }
    let chain = chain::open(path, true)?;
    let failed = |source| Error::Io { path: path.to_owned(), action: "make it larger", source };
    chain.access.resize_grow(size_bytes, PreallocateMode::None).map_err(failed)?;
    chain.access.flush().map_err(failed)?;
    chain.file.sync_all().map_err(failed)?;
    Ok(size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::DiskFormat,
        qcow2::{create_overlay, info},
    };

    #[test]
    fn a_grown_disk_has_what_it_had_and_zeroes_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (base, disk) = (dir.path().join("base"), dir.path().join("disk"));
        std::fs::write(&base, vec![5; 3 << 20]).unwrap();
        create_overlay(&disk, &base, DiskFormat::Raw, 4 << 20).unwrap();
        {
            let chain = chain::open(&disk, true).unwrap();
            chain.access.write(&[7; 512][..], (4 << 20) - 512).unwrap();
            chain.access.flush().unwrap();
        }
        // Smaller ones stay.
        assert_eq!(grow(&disk, 1 << 20).unwrap(), 4 << 20);
        // Far enough for a larger table of tables.
        let size = 40 << 40;
        assert_eq!(grow(&disk, size).unwrap(), size);
        assert_eq!(info(&disk).unwrap().size_bytes, size);
        let chain = chain::open(&disk, true).unwrap();
        for (at, value) in [(0, 5), ((4 << 20) - 512, 7), (4 << 20, 0), (size - 512, 0)] {
            let mut read = [1; 512];
            chain.access.read(&mut read[..], at).unwrap();
            assert_eq!(read, [value; 512], "at {at:#x}");
        }
        chain.access.write(&[9; 512][..], size - 512).unwrap();
        chain.access.flush().unwrap();
        drop(chain);
        crate::qcow2::check(&disk).unwrap();
        // Not under somebody's feet.
        let _open = chain::open(&disk, true).unwrap();
        assert!(matches!(grow(&disk, size + 512), Err(Error::InUse { .. })));
    }
}
