//! Names of what lab does not import, by the bytes that it begins with: as libblkid and file(1) tell them apart.

use super::{Error, disk::Disk};

/// What a volume is called of which nothing is known.
pub(super) const UNKNOWN: &str = "nothing known";

/// Bytes at a place, what has them, and what to do about it.
type Format = (usize, &'static [u8], &'static str, &'static str);

const UNPACK: &str = "unpack it first and import the disk image in it";
const CONVERT: &str = "convert it first (qemu-img convert -O qcow2 FILE DISK.qcow2)";
const COPY: &str = "look into it, and download the image again";

/// Formats of files that are not a disk's bytes.
const FORMATS: [Format; 20] = [
    (0, b"\xfd7zXZ\0", "compressed by xz", "unpack it first (unxz FILE)"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it first (gunzip FILE; of a .tar.gz: tar -xf FILE)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first (unzstd FILE)"),
    (0, b"BZh", "compressed by bzip2", "unpack it first (bunzip2 FILE)"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it first (unlz4 FILE)"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first (unzip FILE) and import the disk image in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", "unpack it first (tar -xf FILE) and import the disk image in it"),
    (0, b"KDMV", "a VMDK image", CONVERT),
    (0, b"COWD", "a VMDK image", CONVERT),
    (0, b"# Disk DescriptorFile", "a VMDK image's description", CONVERT),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image", CONVERT),
    (0, b"vhdxfile", "a VHDX image", CONVERT),
    (0, b"conectix", "a VHD image", CONVERT),
    (0, b"QED\0", "a QED image", CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels image", CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", CONVERT),
    (0, b"<!DOCTYPE", "a web page", COPY),
    (0, b"<html", "a web page", COPY),
];

/// What a disk image is not: another format of file, or an installer.
pub(super) fn foreign(disk: &Disk) -> Result<(), Error> {
    let head = disk.bytes(0, 512)?;
    let found = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((.., what, step)) = FORMATS.iter().find(|(at, magic, ..)| found(*at, magic)) {
        // An OVA is a tar archive whose first file is the machine's description.
        let name = head.split(|byte| *byte == 0).next().unwrap_or_default();
        if *what == "a tar archive" && name.ends_with(b".ovf") {
            let step = "unpack it (tar -xf FILE), and convert its disk (qemu-img convert -O qcow2 DISK.vmdk DISK.qcow2)";
            return Err(Error::OtherFormat { what: "an OVA archive", step });
        }
        return Err(Error::OtherFormat { what, step });
    }
    // With a partition table in front, so that it starts from a stick, too.
    if disk.bytes(0x8001, 5)? == b"CD001" {
        return Err(Error::OtherFormat {
            what: "the image of a CD (ISO 9660), as installers are",
            step: "take the distribution's cloud image (qcow2 or raw) instead",
        });
    }
    Ok(())
}

/// Where file systems and the like have which bytes, and what they are called.
const VOLUMES: [(u64, &[u8], &str); 21] = [
    (0, b"XFSB", "XFS"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"LABELONE", "an LVM physical volume"),
    (0x200, b"LABELONE", "an LVM physical volume"),
    (0x400, b"LABELONE", "an LVM physical volume"),
    (0x600, b"LABELONE", "an LVM physical volume"),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (0x400, b"\x10\x20\xf5\xf2", "F2FS"),
    (0, b"hsqs", "squashfs"),
    (0x8001, b"CD001", "ISO 9660"),
    (0x400, b"\xe2\xe1\xf5\xe0", "EROFS"),
    (0x1000, b"\xfc\x4e\x2b\xa9", "Linux software RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux software RAID"),
    (0x10034, b"ReIsEr", "ReiserFS"),
    (0x8000, b"JFS1", "JFS"),
    (0xff6, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (3, b"-FVE-FS-", "BitLocker"),
    (0x52, b"FAT32", FAT),
    (0x36, b"FAT", FAT),
];
/// The file system of EFI partitions.
pub(super) const FAT: &str = "FAT";
/// Where a ZFS label's ring of uberblocks is, its length, the smallest size of one, all in bytes, and what each begins with.
const ZFS: (u64, u64, usize, [u8; 8]) = (128 << 10, 128 << 10, 1 << 10, 0x00ba_b10c_u64.to_le_bytes());

/// What is in the `length` bytes of the disk from `start` on, ext4 apart.
pub(super) fn volume(disk: &Disk, start: u64, length: u64) -> Result<&'static str, Error> {
    let read = |at: u64, bytes: u64| {
        let inside = at.checked_add(bytes).is_some_and(|end| end <= length);
        start.checked_add(at).filter(|_| inside).map_or(Ok(Vec::new()), |at| disk.bytes(at, bytes))
    };
    for (at, magic, name) in VOLUMES {
        if read(at, magic.len() as u64)? == magic {
            return Ok(name);
        }
    }
    let (at, bytes, each, magic) = ZFS;
    let is_zfs = read(at, bytes)?.chunks(each).any(|block| block.starts_with(&magic));
    Ok(if is_zfs { "ZFS" } else { UNKNOWN })
}
