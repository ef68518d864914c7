//! What is in an image's partitions.

use super::{
    Error,
    disk::Disk,
    fields::{u16_at, u32_at},
    filesystem::FileSystem,
    partitions::{self, Partition},
    recognise,
};

/// Where an ext4 file system's superblock is, from its start in bytes, and its size.
const SUPERBLOCK: (u64, u64) = (1024, 1024);

/// A partition, or a disk that has none.
pub(super) struct Volume {
    /// Its number; nothing if it is the whole disk.
    pub number: Option<u32>,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its file system, or what else it is.
    pub content: Result<FileSystem, String>,
}

/// All of a disk's volumes, and the size of its sectors in bytes.
pub(super) fn all(disk: &Disk) -> Result<(Vec<Volume>, u32), Error> {
    let Some(table) = partitions::read(disk)? else {
        let volume = volume(disk, None, 0, disk.size_bytes(), None)?;
        if matches!(&volume.content, Err(what) if what == recognise::UNKNOWN) {
            return Err(Error::NoFileSystem);
        }
        return Ok((vec![volume], 512));
    };
    let volumes = table.partitions.into_iter().map(|partition| {
        let Partition { number, start, length, name } = partition;
        volume(disk, Some(number), start, length, name)
    });
    Ok((volumes.collect::<Result<_, _>>()?, table.sector_bytes))
}

/// Volumes as a sentence lists them.
pub(super) fn list(volumes: &[Volume]) -> String {
    let one = |volume: &Volume| {
        let what = volume.content.as_ref().map_or_else(String::as_str, |_| "ext4");
        match volume.number {
            Some(number) => format!("{what} in partition {number}"),
            None => format!("{what} on the whole disk"),
        }
    };
    volumes.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn volume(
    disk: &Disk,
    number: Option<u32>,
    start: u64,
    length: u64,
    name: Option<String>,
) -> Result<Volume, Error> {
    let superblock = match start.checked_add(SUPERBLOCK.0) {
        Some(at) if length >= SUPERBLOCK.0 + SUPERBLOCK.1 => disk.bytes(at, SUPERBLOCK.1)?,
        _ => Vec::new(),
    };
    let content = if u16_at(&superblock, 0x38) == Some(0xef53) {
        check_length(disk, &superblock, start, length)?;
        match unsupported(&superblock) {
            Some(what) => Err(what),
            None => FileSystem::load(disk, start, length, name)
                .map_err(|error| format!("ext4 that cannot be read ({error})")),
        }
    } else {
        Err(recognise::volume(disk, start, length)?.to_owned())
    };
    Ok(Volume { number, start, length, content })
}

/// Compare an ext4 file system's size, as its superblock tells it, with that of its partition (ext4 data structures,
/// "The Super Block": blocks at 0x4 and 0x150, size of a block at 0x18).
fn check_length(disk: &Disk, superblock: &[u8], start: u64, length: u64) -> Result<(), Error> {
    let field = |at| u32_at(superblock, at).unwrap_or_default();
    let blocks = u64::from(field(0x4)) | u64::from(field(0x150)) << 32;
    let bytes =
        1024u64.checked_shl(field(0x18)).and_then(|size| size.checked_mul(blocks)).unwrap_or(u64::MAX);
    match bytes > length {
        true => Err(Error::Truncated { end: start.saturating_add(bytes), length: disk.size_bytes() }),
        false => Ok(()),
    }
}

/// Features of ext4 that change how it is read (`s_feature_incompat`, at 0x60 of the superblock) and that ext4-view does
/// not know, by the names that mke2fs gives them.
const UNKNOWN_FEATURES: [(u32, &str); 9] = [
    (0x1, "compression"),
    (0x8, "journal_dev"),
    (0x10, "meta_bg"),
    (0x100, "mmp"),
    (0x400, "ea_inode"),
    (0x1000, "dirdata"),
    (0x4000, "large_dir"),
    (0x8000, "inline_data"),
    (0x2_0000, "casefold"),
];
/// The feature `filetype`, without which ext4-view does not read one.
const FILETYPE: u32 = 0x2;
/// The feature `metadata_csum` (`s_feature_ro_compat`, at 0x64), and the smallest inode of which ext4-view reads the checksum,
/// in bytes (`s_inode_size`, at 0x58).
const METADATA_CSUM: u32 = 0x400;
const SUMMED_INODE: u16 = 132;

/// What an ext4 file system is that ext4-view cannot read: called by what it has that is not known there.
fn unsupported(superblock: &[u8]) -> Option<String> {
    let features = u32_at(superblock, 0x60)?;
    let mut names: Vec<_> =
        UNKNOWN_FEATURES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect();
    if features & FILETYPE == 0 {
        names.push("no filetype");
    }
    if !names.is_empty() {
        return Some(format!("ext4 that lab cannot read for its features ({})", names.join(", ")));
    }
    let summed = u32_at(superblock, 0x64)? & METADATA_CSUM != 0;
    (summed && u16_at(superblock, 0x58)? < SUMMED_INODE).then(|| {
        "ext4 with checksums and inodes of 128 bytes, which lab cannot read (`tune2fs -O ^metadata_csum` takes the \
         checksums away)"
            .into()
    })
}
