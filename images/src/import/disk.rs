//! The bytes of a disk image, raw or qcow2, as the guest sees them.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use imago::{FormatAccess, StorageOpenOptions, file::File as ImageFile, qcow2::Qcow2};
use lab_vmm::{config::DiskFormat, qcow2};

use super::{Error, io_error, open};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
/// Unit in which a disk is copied, in bytes.
const BLOCK: usize = 1 << 20;

/// An image that is only read. Clones share it.
#[derive(Clone)]
pub(super) struct Disk {
    content: Arc<Content>,
    size_bytes: u64,
}

enum Content {
    Raw(File),
    Qcow2(FormatAccess<ImageFile>),
}

impl Disk {
    /// Open an image. Its format is told by its first bytes: it comes from the user, not from a guest.
    pub(super) fn open(path: &Path) -> Result<Disk, Error> {
        let file = open(path)?;
        let mut magic = [0; 4];
        let read = file.read_at(&mut magic, 0).map_err(io_error("read", path))?;
        if magic.get(..read) == Some(QCOW2_MAGIC) {
            let info = qcow2::info(path)?;
            if let Some((backing, _)) = info.backing {
                return Err(Error::HasBacking(backing));
            }
            let access = open_qcow2(path, file).map_err(io_error("open", path))?;
            return Ok(Disk { content: Arc::new(Content::Qcow2(access)), size_bytes: info.size_bytes });
        }
        let size_bytes = file.metadata().map_err(io_error("read", path))?.len();
        Ok(Disk { content: Arc::new(Content::Raw(file)), size_bytes })
    }

    /// Format of the image.
    pub(super) fn format(&self) -> DiskFormat {
        match *self.content {
            Content::Raw(_) => DiskFormat::Raw,
            Content::Qcow2(_) => DiskFormat::Qcow2,
        }
    }

    /// Size of the disk in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Read bytes, all of them.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size_bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &*self.content {
            Content::Raw(file) => file.read_exact_at(buffer, offset),
            Content::Qcow2(access) => access.read(buffer, offset),
        }
    }
}

fn open_qcow2(path: &Path, file: File) -> io::Result<FormatAccess<ImageFile>> {
    let storage = ImageFile::from_open_file(file, StorageOpenOptions::new().filename(path))?;
    let mut image = Qcow2::<ImageFile>::open_image(storage, false)?;
    // An image must not name other files of the host.
    image.set_data_file(None);
    image.set_backing(None);
    Ok(FormatAccess::new(image))
}

/// A disk with a position, as the library for partition tables wants it.
pub(super) struct Cursor {
    disk: Disk,
    position: u64,
}

impl Cursor {
    pub(super) fn new(disk: Disk) -> Cursor {
        Cursor { disk, position: 0 }
    }
}

impl fmt::Debug for Cursor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "disk at {}", self.position)
    }
}

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size_bytes.saturating_sub(self.position);
        let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.disk.read_at(buffer.get_mut(..length).unwrap_or_default(), self.position)?;
        self.position += length as u64;
        Ok(length)
    }
}

impl Seek for Cursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.disk.size_bytes.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Write for Cursor {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copy a file; blocks of zeros become holes.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> Result<(), Error> {
    let mut source = open(from)?;
    let mut target = File::create(to).map_err(io_error("write", to))?;
    let mut buffer = vec![0; BLOCK];
    let mut length = 0u64;
    loop {
        let read = read_block(&mut source, &mut buffer).map_err(io_error("read", from))?;
        let Some(block) = buffer.get(..read).filter(|block| !block.is_empty()) else { break };
        if block.iter().any(|byte| *byte != 0) {
            target.seek(SeekFrom::Start(length)).map_err(io_error("write", to))?;
            target.write_all(block).map_err(io_error("write", to))?;
        }
        length += read as u64;
    }
    target.set_len(length).map_err(io_error("write", to))
}

/// Fill the buffer, or as much of it as there is left.
fn read_block(source: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read(rest)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}
