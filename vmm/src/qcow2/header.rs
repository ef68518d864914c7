//! The header of a qcow2 image (QEMU's docs/interop/qcow2.rst), read and checked against the file's length. imago
//! reads tables past the end of a file as zeroes, so that a truncated image would look empty to the guest.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::Error;
use crate::config::DiskFormat;

const MAGIC: u32 = 0x5146_49fb;
/// Largest L1 table and refcount table in bytes, as in QEMU.
const MAX_TABLE: u64 = 32 << 20;
/// Host offset in an L1, L2 or refcount table entry.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An L2 entry whose cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// An L2 entry whose cluster reads as zeroes, allocated or not.
const ZERO: u64 = 1;
/// Type of the header extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Incompatible features: damaged, data in another file.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;

/// What matters here of a header.
pub(super) struct Header {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Name of the backing file as it is in the header.
    pub backing: Option<String>,
    format: Option<String>,
    cluster_bits: u32,
    l1_offset: u64,
    l1_entries: u64,
    refcount_offset: u64,
    refcount_clusters: u64,
    /// Width of a refcount is 2 to the power of this, in bits.
    pub refcount_order: u32,
}

impl Header {
    /// Reads the header of `file`, and checks that it is one that can be worked with.
    pub fn read(path: &Path, file: &File) -> Result<Self, Error> {
        // The header and its extensions fit into the first cluster, and what is wanted into 64 KiB.
        let start = read_up_to(file, 0, 64 << 10).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "read it",
            source,
        })?;
        let damaged = |what: &str| Error::Damaged { path: path.to_owned(), what: what.to_owned() };
        let unsupported = |what: &str| Error::Unsupported { path: path.to_owned(), what: what.to_owned() };
        let u32_at = |offset| u32_at(&start, offset).ok_or_else(|| damaged("it ends within its header"));
        let u64_at = |offset| u64_at(&start, offset).ok_or_else(|| damaged("it ends within its header"));

        if u32_at(0)? != MAGIC {
            return Err(damaged(
                "it does not begin as one does; if it is a raw image, give its format as raw",
            ));
        }
        let version = u32_at(4)?;
        let (incompatible, refcount_order, length) = match version {
            2 => (0, 4, 72),
            3 => (u64_at(72)?, u32_at(96)?, u32_at(100)?),
            _ => return Err(unsupported("a qcow2 version other than 2 and 3; convert it with qemu-img")),
        };
        if incompatible & CORRUPT != 0 {
            return Err(damaged("it is marked as corrupt; repair a copy with `qemu-img check -r all`"));
        }
        if incompatible & EXTERNAL_DATA != 0 {
            return Err(unsupported("it keeps its data in another file; convert it with qemu-img"));
        }
        if incompatible != 0 {
            return Err(unsupported(
                "it was not closed properly, or uses extended L2 entries or zstd compression; run `qemu-img check \
                 -r all` on it, or convert it with `qemu-img convert -O qcow2`",
            ));
        }
        if u32_at(32)? != 0 {
            return Err(unsupported("it is encrypted; convert it with qemu-img"));
        }
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) || refcount_order > 6 {
            return Err(damaged("its cluster size or refcount width is out of range"));
        }
        let header = Self {
            size: u64_at(24)?,
            backing: backing_name(&start).map_err(damaged)?,
            format: backing_format(&start, length as usize),
            cluster_bits,
            l1_entries: u64::from(u32_at(36)?),
            l1_offset: u64_at(40)?,
            refcount_offset: u64_at(48)?,
            refcount_clusters: u64::from(u32_at(56)?),
            refcount_order,
        };
        if header.size > i64::MAX as u64 {
            return Err(damaged("its size is out of range"));
        }
        // One L2 table maps a cluster for each of its 8-byte entries.
        let mapped_by_l2 = header.cluster_size() * (header.cluster_size() / 8);
        if header.l1_entries < header.size.div_ceil(mapped_by_l2) {
            return Err(damaged("its L1 table is too small for its size"));
        }
        Ok(header)
    }

    /// Unit of allocation in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Format of the backing file, if the header names one.
    pub fn backing_format(&self, path: &Path) -> Result<Option<DiskFormat>, Error> {
        match self.format.as_deref() {
            None => Ok(None),
            Some("raw" | "file") => Ok(Some(DiskFormat::Raw)),
            Some("qcow2") => Ok(Some(DiskFormat::Qcow2)),
            Some(other) => Err(Error::Unsupported {
                path: path.to_owned(),
                what: format!("its backing file is of format {other:?}; lab reads raw and qcow2"),
            }),
        }
    }

    /// Checks that all tables, and all that they lead to, lie within the file.
    pub fn check_length(&self, path: &Path, file: &File) -> Result<(), Error> {
        let read_error = |source| Error::Io { path: path.to_owned(), action: "read it", source };
        let damaged = |what: &str| Error::Damaged { path: path.to_owned(), what: what.to_owned() };
        let length = file.metadata().map_err(read_error)?.len();
        let inside = |offset: u64, bytes: u64| {
            offset.is_multiple_of(self.cluster_size())
                && bytes <= MAX_TABLE
                && offset.checked_add(bytes).is_some_and(|end| end <= length)
        };
        if !inside(self.l1_offset, self.l1_entries * 8) {
            return Err(damaged("its L1 table lies outside the file, which was cut short"));
        }
        let refcount_bytes = self.refcount_clusters << self.cluster_bits;
        if !inside(self.refcount_offset, refcount_bytes) {
            return Err(damaged("its refcount table lies outside the file, which was cut short"));
        }
        if self.last_used(file).map_err(read_error)?.is_some_and(|last| last < length) {
            return Ok(());
        }
        // Refcounts may run ahead of the data if the writer was killed, so the mappings decide.
        self.each_cluster(path, file, |_| Ok(()))
    }

    /// Hands out every cluster that the tables lead to, themselves included, by its offset in the file. All lie within
    /// the file and begin where a cluster begins.
    pub fn each_cluster(
        &self,
        path: &Path,
        file: &File,
        mut found: impl FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let read_error = |source| Error::Io { path: path.to_owned(), action: "read it", source };
        let damaged = |what: &str| Error::Damaged { path: path.to_owned(), what: what.to_owned() };
        let length = file.metadata().map_err(read_error)?.len();
        let size = self.cluster_size();
        let check = |offset: u64, end: u64| {
            if !offset.is_multiple_of(size) {
                return Err(damaged("a table leads to a place where no cluster begins"));
            }
            if end > length {
                return Err(damaged("part of it is missing at the end; the file was cut short"));
            }
            Ok(())
        };
        found(0)?;
        for cluster in 0..(self.l1_entries * 8).div_ceil(size) {
            found(self.l1_offset + cluster * size)?;
        }
        for cluster in 0..self.refcount_clusters {
            found(self.refcount_offset + cluster * size)?;
        }
        for entry in entries(&self.refcount_table(file).map_err(read_error)?) {
            if entry & OFFSET != 0 {
                check(entry & OFFSET, (entry & OFFSET) + size)?;
                found(entry & OFFSET)?;
            }
        }
        let l1 = read_up_to(file, self.l1_offset, self.l1_entries * 8).map_err(read_error)?;
        // Without this, a small file could lead to the same table over and over.
        let mut tables_left = length / size;
        for table in entries(&l1).map(|entry| entry & OFFSET).filter(|table| *table != 0) {
            check(table, table + size)?;
            tables_left = tables_left
                .checked_sub(1)
                .ok_or_else(|| damaged("two places of its L1 table lead to the same L2 table"))?;
            found(table)?;
            let l2 = read_up_to(file, table, size).map_err(read_error)?;
            for entry in entries(&l2) {
                if entry & COMPRESSED != 0 {
                    let bits = 62 - (self.cluster_bits - 8);
                    let offset = entry & ((1 << bits) - 1);
                    // The number of further sectors of 512 bytes.
                    let sectors = (entry & (COMPRESSED - 1)) >> bits;
                    let end = (offset & !511) + (sectors + 1) * 512;
                    check(0, offset + 1)?;
                    for cluster in offset / size..end.div_ceil(size) {
                        found(cluster * size)?;
                    }
                } else if entry & OFFSET != 0 {
                    let offset = entry & OFFSET;
                    // The end of the file may be within the last cluster, and before it if it reads as zeroes.
                    check(offset, if entry & ZERO != 0 { 0 } else { offset + 1 })?;
                    found(offset)?;
                }
            }
        }
        Ok(())
    }

    /// The refcount table as it is in the file.
    pub fn refcount_table(&self, file: &File) -> io::Result<Vec<u8>> {
        read_up_to(file, self.refcount_offset, self.refcount_clusters << self.cluster_bits)
    }

    /// Offset of the last cluster that is in use by its refcount; nothing if the refcounts make no sense.
    fn last_used(&self, file: &File) -> io::Result<Option<u64>> {
        let table = self.refcount_table(file)?;
        let clusters_of_block = (self.cluster_size() * 8) >> self.refcount_order;
        for (index, entry) in (0u64..).zip(entries(&table)).collect::<Vec<_>>().into_iter().rev() {
            let offset = entry & OFFSET;
            if offset == 0 {
                continue;
            }
            let block = read_up_to(file, offset, self.cluster_size())?;
            if (block.len() as u64) < self.cluster_size() {
                return Ok(None);
            }
            if let Some(byte) = block.iter().rposition(|byte| *byte != 0) {
                let within = ((byte as u64 + 1) * 8 - 1) >> self.refcount_order;
                let cluster =
                    index.checked_mul(clusters_of_block).and_then(|first| first.checked_add(within));
                return Ok(cluster.and_then(|cluster| cluster.checked_mul(self.cluster_size())));
            }
        }
        Ok(None)
    }
}

/// Where `name`, from the header of the image at `path`, is.
pub(super) fn resolve(path: &Path, name: &str) -> PathBuf {
    super::folder(path).join(name)
}

fn backing_name(start: &[u8]) -> Result<Option<String>, &'static str> {
    let (Some(offset), Some(length)) = (u64_at(start, 8), u32_at(start, 16)) else {
        return Err("it ends within its header");
    };
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .filter(|_| length <= 1023)
        .and_then(|offset| start.get(offset..offset.checked_add(length as usize)?))
        .ok_or("the name of its backing file lies outside its header")?;
    let name = std::str::from_utf8(name).map_err(|_| "the name of its backing file is not UTF-8")?;
    if name.is_empty() || name.starts_with("json:") {
        return Err("the name of its backing file is not a path");
    }
    Ok(Some(name.to_owned()))
}

fn backing_format(start: &[u8], mut offset: usize) -> Option<String> {
    loop {
        let (kind, length) = (u32_at(start, offset)?, u32_at(start, offset.checked_add(4)?)? as usize);
        let data = start.get(offset.checked_add(8)?..)?.get(..length)?;
        match kind {
            0 => return None,
            BACKING_FORMAT => return Some(String::from_utf8_lossy(data).into_owned()),
            _ => offset = offset.checked_add(8)?.checked_add(length.checked_next_multiple_of(8)?)?,
        }
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let bytes = bytes.get(offset..offset.checked_add(8)?)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// The big-endian numbers of a table.
pub(super) fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).filter_map(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?)))
}

/// Up to `length` bytes at `offset`; fewer if the file ends before.
pub(super) fn read_up_to(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
