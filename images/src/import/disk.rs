//! The bytes of a disk image, raw or qcow2, as the guest sees them, and how it gets into the store.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use imago::{FormatAccess, StorageOpenOptions, file::File as ImageFile, qcow2::Qcow2};
use lab_vmm::{config::DiskFormat, qcow2};

use super::{Error, error::io_error};

/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
/// Unit in which a disk is copied, in bytes.
const BLOCK: usize = 1 << 20;

/// Format of an image, told by its first bytes: it comes from the user, not from a guest.
pub(super) fn format(path: &Path) -> Result<DiskFormat, Error> {
    let mut magic = [0; 4];
    let read = open(path)?.read_at(&mut magic, 0).map_err(io_error("read", path))?;
    Ok(if magic.get(..read) == Some(QCOW2_MAGIC) { DiskFormat::Qcow2 } else { DiskFormat::Raw })
}

/// Write a qcow2 image anew, its clusters not compressed: those are unpacked at each read, however small, and nodes would
/// read from it for as long as they live. The image must be whole, and nothing may be below it.
pub(super) fn unpack(from: &Path, to: &Path) -> Result<(), Error> {
    if let Some((backing, _)) = qcow2::info(from)?.backing {
        return Err(Error::HasBacking(backing));
    }
    qcow2::check(from)?;
    Ok(qcow2::flatten(from, 1, to)?)
}

/// An image that is only read. Clones share it.
#[derive(Clone)]
pub(super) struct Disk {
    image: Arc<Image>,
    size_bytes: u64,
}

struct Image {
    path: PathBuf,
    content: Content,
}

enum Content {
    Raw(File),
    Qcow2(FormatAccess<ImageFile>),
}

impl Disk {
    /// Open an image; a qcow2 image has to be one of lab's own.
    pub(super) fn open(path: &Path, format: DiskFormat) -> Result<Disk, Error> {
        let file = open(path)?;
        let (content, size_bytes) = match format {
            DiskFormat::Raw => {
                let size = file.metadata().map_err(io_error("read", path))?.len();
                (Content::Raw(file), size)
            }
            DiskFormat::Qcow2 => {
                let access = open_qcow2(path, file).map_err(io_error("open", path))?;
                let size = access.size();
                (Content::Qcow2(access), size)
            }
        };
        Ok(Disk { image: Arc::new(Image { path: path.into(), content }), size_bytes })
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
        match &self.image.content {
            Content::Raw(file) => file.read_exact_at(buffer, offset),
            Content::Qcow2(access) => access.read(buffer, offset),
        }
    }

    /// The `length` bytes at `offset`, fewer where the disk ends.
    pub(super) fn bytes(&self, offset: u64, length: u64) -> Result<Vec<u8>, Error> {
        let length = length.min(self.size_bytes.saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        self.read_at(&mut bytes, offset).map_err(io_error("read", &self.image.path))?;
        Ok(bytes)
    }

    /// An error unless the disk has `length` bytes at `start`.
    pub(super) fn must_hold(&self, start: u64, length: u64) -> Result<(), Error> {
        let end = start.saturating_add(length);
        match end <= self.size_bytes {
            true => Ok(()),
            false => Err(Error::Truncated { end, length: self.size_bytes }),
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

/// A file that is read from; its path goes into messages.
fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(io_error("open", path))
}
