//! An EFI partition, looked at for kernels where /boot has none.

use std::io::{self, Read, Seek, SeekFrom, Write};

use fatfs::{Dir, FileSystem, FsOptions};

use super::disk::Disk;

/// Most bytes that are read: the tables of a damaged file system may lead in circles.
const MAX_READ: u64 = 4 << 20;

/// The kernels of an EFI partition that a boot loader would start from there, with a word on it, as the end of a sentence;
/// nothing if there is none, or the file system cannot be read.
pub(super) fn kernels(disk: &Disk, start: u64, length: u64) -> Option<String> {
    let part = Part { disk: disk.clone(), start, length, position: 0, left: MAX_READ };
    let fat = FileSystem::new(part, FsOptions::new()).ok()?;
    let first = |folder: &str, suffix: &str| {
        let dir: Dir<'_, Part> = fat.root_dir().open_dir(folder).ok()?;
        let names = dir.iter().map_while(Result::ok).map(|entry| entry.file_name());
        let name = names.filter(|name| name.to_ascii_lowercase().ends_with(suffix)).min()?;
        Some(format!("{folder}/{name}"))
    };
    if let Some(file) = first("EFI/Linux", ".efi") {
        return Some(format!(
            "; its EFI partition has {file}, a unified kernel image (UKI), which lab cannot boot: it has no UEFI. Install \
             a kernel with an initrd in /boot (as GRUB boots it) and import the image again"
        ));
    }
    first("loader/entries", ".conf").map(|file| {
        format!(
            "; its EFI partition has kernels that systemd-boot starts ({file}), which lab does not look for: install a \
             kernel with an initrd in /boot (as GRUB boots it) and import the image again"
        )
    })
}

/// A part of the disk, as the library for FAT wants it.
struct Part {
    disk: Disk,
    start: u64,
    length: u64,
    position: u64,
    /// How many bytes may still be read.
    left: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.length.saturating_sub(self.position).min(buffer.len() as u64);
        // A read of nothing counts as well.
        self.left = self.left.checked_sub(there.max(1)).ok_or(io::ErrorKind::InvalidData)?;
        let buffer = usize::try_from(there).ok().and_then(|length| buffer.get_mut(..length));
        let offset = self.start.checked_add(self.position).ok_or(io::ErrorKind::InvalidData)?;
        self.disk.read_at(buffer.unwrap_or_default(), offset)?;
        self.position += there;
        Ok(there as usize)
    }
}

impl Seek for Part {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Write for Part {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
