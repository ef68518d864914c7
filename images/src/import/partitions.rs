//! Partition tables: GUID (UEFI specification 2.10 §5.3) with sectors of 512 and of 4096 bytes, and DOS (MBR) with logical
//! partitions. They are read as Linux does (block/partitions/{efi,msdos}.c), since a node's kernel will.

use flate2::Crc;

use super::{
    Error,
    disk::Disk,
    fields::{u32_at, u64_at},
};

/// Sizes of sectors that a GUID partition table may count in, in bytes.
const SECTORS: [u32; 2] = [512, 4096];
/// Most entries of a GUID partition table; tools make 128.
const MAX_ENTRIES: u32 = 8192;
/// Most extended boot records that are followed; each has one logical partition.
const MAX_LOGICAL: usize = 124;
/// Size of an entry of a GUID partition table in bytes.
const GPT_ENTRY: usize = 128;
/// Size of a sector that DOS partition tables count in, in bytes.
const DOS_SECTOR: u64 = 512;
/// Types of DOS partitions: the one that stands for a GUID partition table, and those that hold logical ones.
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A disk's partitions.
pub(super) struct Table {
    /// The sector that it counts in, in bytes.
    pub sector_bytes: u32,
    /// Those that are in use.
    pub partitions: Vec<Partition>,
}

/// A partition; it lies within the disk.
pub(super) struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its name on the kernel's command line, behind `root=`; nothing if it has none that is its own.
    pub name: Option<String>,
}

/// Read the partition table; nothing if there is none.
pub(super) fn read(disk: &Disk) -> Result<Option<Table>, Error> {
    let Some(record) = Record::read(disk, 0) else { return Ok(None) };
    if !record.entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return dos(disk, &record);
    }
    for sector in SECTORS {
        if let Some(partitions) = guid(disk, sector)? {
            return Ok(Some(Table { sector_bytes: sector, partitions }));
        }
    }
    Err(Error::PartitionTable("its first sector announces a GUID partition table, which is not there"))
}

/// The partitions of a GUID partition table with sectors of this size. Its copy at the disk's end is not looked at:
/// Linux does so only when it is told to.
fn guid(disk: &Disk, sector: u32) -> Result<Option<Vec<Partition>>, Error> {
    let sector = u64::from(sector);
    let header = disk.bytes(sector, 512)?;
    if !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let damaged = |what| Error::PartitionTable(what);
    let ends = || damaged("its GUID partition table ends within its header");
    let number = |at| u32_at(&header, at).ok_or_else(ends);
    let size = usize::try_from(number(12)?).ok().filter(|size| (92..=512).contains(size));
    let mut summed = size.and_then(|size| header.get(..size)).ok_or_else(ends)?.to_vec();
    summed.iter_mut().skip(16).take(4).for_each(|byte| *byte = 0);
    let (count, entry_size) = (number(80)?, number(84)?);
    if crc32(&summed) != number(16)? {
        return Err(damaged("the checksum of its GUID partition table's header is wrong"));
    }
    if entry_size as usize != GPT_ENTRY || count > MAX_ENTRIES {
        return Err(damaged(
            "its GUID partition table has entries of another size than 128 bytes, or too many",
        ));
    }
    let bytes = u64::from(count) * GPT_ENTRY as u64;
    let entries = u64_at(&header, 72).and_then(|first| first.checked_mul(sector));
    let entries = entries.ok_or_else(|| damaged("its GUID partition table lies out of range"))?;
    disk.must_hold(entries, bytes)?;
    let entries = disk.bytes(entries, bytes)?;
    if crc32(&entries) != number(88)? {
        return Err(damaged("the checksum of its GUID partition table is wrong"));
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(GPT_ENTRY)) {
        let (Some(first), Some(last)) = (u64_at(entry, 32), u64_at(entry, 40)) else { continue };
        let unused = entry.iter().take(16).all(|byte| *byte == 0);
        let sectors = last.checked_sub(first).and_then(|sectors| sectors.checked_add(1));
        let start = first.checked_mul(sector);
        let length = sectors.and_then(|sectors| sectors.checked_mul(sector));
        let (false, Some(start), Some(length)) = (unused, start, length) else { continue };
        disk.must_hold(start, length)?;
        let name = guid_text(entry.get(16..32).unwrap_or_default());
        partitions.push(Partition { number, start, length, name: Some(format!("PARTUUID={name}")) });
    }
    Ok(Some(partitions))
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// A GUID as it is written: of its five groups, three are numbers, little endian.
fn guid_text(bytes: &[u8]) -> String {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let digits = |index: &usize| bytes.get(*index).map_or_else(String::new, |byte| format!("{byte:02x}"));
    let groups = [ORDER.get(..4), ORDER.get(4..6), ORDER.get(6..8), ORDER.get(8..10), ORDER.get(10..)];
    let groups = groups.map(|group| group.unwrap_or_default().iter().map(digits).collect::<String>());
    groups.join("-")
}

/// A master or extended boot record.
struct Record {
    /// What tells this disk from others.
    signature: u32,
    entries: Vec<Entry>,
}

/// A partition in a boot record.
struct Entry {
    kind: u8,
    /// Its first sector, counted from what depends on where the record is.
    start: u64,
    sectors: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind)
    }
}

impl Record {
    /// The boot record in a sector; nothing if there is none.
    fn read(disk: &Disk, sector: u64) -> Option<Self> {
        let bytes = disk.bytes(sector.checked_mul(DOS_SECTOR)?, DOS_SECTOR).ok()?;
        if bytes.get(510..512) != Some(&[0x55, 0xaa]) {
            return None;
        }
        let mut entries = Vec::with_capacity(4);
        for entry in bytes.get(446..510)?.chunks_exact(16) {
            // A file system's boot sector ends in the same two bytes, but has code or text here.
            if !matches!(entry.first(), Some(0 | 0x80)) {
                return None;
            }
            let (start, sectors) = (u32_at(entry, 8)?, u32_at(entry, 12)?);
            entries.push(Entry { kind: *entry.get(4)?, start: start.into(), sectors: sectors.into() });
        }
        Some(Self { signature: u32_at(&bytes, 440)?, entries })
    }
}

/// The partitions of a DOS partition table; nothing if it has none.
fn dos(disk: &Disk, record: &Record) -> Result<Option<Table>, Error> {
    let mut partitions = Vec::new();
    let mut add = |number: u32, start: u64, sectors: u64| {
        // Both come from numbers of 32 bits.
        let (start, length) = (start * DOS_SECTOR, sectors * DOS_SECTOR);
        disk.must_hold(start, length)?;
        // udev knows no partition of a disk without a signature by this name.
        let name = (record.signature != 0).then(|| format!("PARTUUID={:08x}-{number:02x}", record.signature));
        partitions.push(Partition { number, start, length, name });
        Ok::<_, Error>(())
    };
    let mut extended = None;
    for (number, entry) in (1..).zip(&record.entries).filter(|(_, entry)| entry.sectors != 0) {
        if entry.is_extended() {
            extended = extended.or(Some(entry.start));
        } else {
            add(number, entry.start, entry.sectors)?;
        }
    }
    // Each extended boot record has a logical partition, counted from itself, and leads to the next, counted from the
    // first.
    let mut next = extended;
    let mut number = 5;
    for _ in 0..MAX_LOGICAL {
        let (Some(first), Some(at)) = (extended, next) else { break };
        disk.must_hold(at * DOS_SECTOR, DOS_SECTOR)?;
        let Some(record) = Record::read(disk, at) else { break };
        for entry in record.entries.iter().take(2).filter(|entry| entry.sectors != 0 && !entry.is_extended())
        {
            add(number, at + entry.start, entry.sectors)?;
            number += 1;
        }
        let link = record.entries.iter().find(|entry| entry.is_extended() && entry.sectors != 0);
        next = link.map(|entry| first + entry.start);
    }
    if partitions.is_empty() {
        return Ok(None);
    }
    Ok(Some(Table { sector_bytes: DOS_SECTOR as u32, partitions }))
}
