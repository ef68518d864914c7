//! What a disk's data is in: a raw file, read and written straight from guest memory, or a qcow2 image by imago.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
};

use imago::{
    FormatAccess, ShallowMapping,
    file::File as ImageFile,
    io_buffers::{IoVector, IoVectorMut},
};
use rustix::fs::{FallocateFlags, fallocate};

use crate::{
    config::{DiskConfig, DiskFormat},
    qcow2,
    virtio::{Error, segments::Segments},
};

/// Zeroes, for file systems that cannot make holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// An open image.
pub(super) enum Image {
    /// Bytes as they are in the file.
    Raw {
        /// The file, locked.
        file: File,
        /// Its size in bytes.
        size: u64,
    },
    /// A qcow2 image and its backing files.
    Qcow2 {
        /// All of them.
        access: FormatAccess<ImageFile>,
        /// The topmost file.
        file: File,
        /// Unit of allocation in bytes.
        cluster_size: u64,
    },
}

impl Image {
    /// Opens and locks what `config` names, with its backing files.
    pub fn open(config: &DiskConfig) -> Result<Self, Error> {
        let told = |e: qcow2::Error| Error::Device(e.to_string());
        let writable = !config.read_only;
        match config.format {
            DiskFormat::Raw => {
                let mut file = qcow2::open_file(&config.path, writable).map_err(told)?;
                // A block device has a length only for those who seek.
                let size = file.seek(SeekFrom::End(0)).map_err(|source| Error::Io {
                    device: format!("disk {}", config.path.display()),
                    action: "find its size",
                    source,
                })?;
                Ok(Self::Raw { file, size })
            }
            DiskFormat::Qcow2 => {
                let qcow2::Chain { access, file, cluster_size } =
                    qcow2::open(&config.path, writable).map_err(told)?;
                Ok(Self::Qcow2 { access, file, cluster_size })
            }
        }
    }

    /// The file on top.
    pub fn file(&self) -> &File {
        match self {
            Self::Raw { file, .. } | Self::Qcow2 { file, .. } => file,
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2 { access, .. } => access.size(),
        }
    }

    /// Unit in bytes in which space is taken and given back.
    pub fn granularity(&self) -> u64 {
        match self {
            Self::Raw { .. } => 4096,
            Self::Qcow2 { cluster_size, .. } => *cluster_size,
        }
    }

    /// Reads all of `data`.
    pub fn read(&self, data: &Segments<'_>, offset: u64) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => transfer(data, offset, |pieces, at| {
                // SAFETY: the pieces are guest memory, which stays mapped while `data` lives; the kernel checks the
                // rest.
                unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at) }
            }),
            Self::Qcow2 { access, .. } => {
                let (buffers, _guard) = IoVectorMut::from_volatile_slice(data.slices());
                access.readv(buffers, offset)
            }
        }
    }

    /// Writes all of `data`.
    pub fn write(&self, data: &Segments<'_>, offset: u64) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => transfer(data, offset, |pieces, at| {
                // SAFETY: as for reading.
                unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, at) }
            }),
            Self::Qcow2 { access, .. } => {
                let (buffers, _guard) = IoVector::from_volatile_slice(data.slices());
                access.writev(buffers, offset)
            }
        }
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => file.sync_data(),
            Self::Qcow2 { access, file, .. } => {
                access.flush()?;
                file.sync_data()
            }
        }
    }

    /// Hands everything to the host's kernel, so that it outlives this process.
    pub fn write_metadata(&self) -> io::Result<()> {
        match self {
            Self::Raw { .. } => Ok(()),
            Self::Qcow2 { access, .. } => access.flush(),
        }
    }

    /// Gives space back; what is read there afterwards is zero or what was there before.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let done = match self {
            Self::Raw { file, .. } => punch(file, offset, length),
            Self::Qcow2 { access, file, cluster_size } => {
                punch_clusters(access, file, *cluster_size, offset, length);
                access.discard_to_any(offset, length)
            }
        };
        // To do nothing is allowed.
        done.or_else(|e| if e.kind() == io::ErrorKind::Unsupported { Ok(()) } else { Err(e) })
    }

    /// Makes a range zero, giving its space back if `unmap`.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let done = match self {
            Self::Raw { file, .. } if unmap => punch(file, offset, length),
            Self::Raw { file, .. } => {
                fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)
                    .map_err(io::Error::from)
            }
            Self::Qcow2 { access, file, cluster_size } if unmap => {
                punch_clusters(access, file, *cluster_size, offset, length);
                access.discard_to_zero(offset, length)
            }
            Self::Qcow2 { access, .. } => access.write_zeroes(offset, length),
        };
        match done {
            // A file system without holes, or a qcow2 of version 2.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => self.write_plain_zeroes(offset, length),
            other => other,
        }
    }

    fn write_plain_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let count = (end - at).min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..count as usize).unwrap_or(&ZEROES);
            match self {
                Self::Raw { file, .. } => std::os::unix::fs::FileExt::write_all_at(file, zeroes, at)?,
                Self::Qcow2 { access, .. } => access.write(zeroes, at)?,
            }
            at += count;
        }
        Ok(())
    }
}

/// Gives the space of whole clusters in a range that the guest has no use for back to the host's file system: imago frees
/// them for other uses in the image alone. Before it does, since from then on they may be anything. Clusters of backing files
/// and those that are used twice stay; and where the host knows no holes, all do.
fn punch_clusters(
    access: &FormatAccess<ImageFile>,
    file: &File,
    cluster_size: u64,
    offset: u64,
    length: u64,
) {
    let whole = |bytes: u64| bytes - bytes % cluster_size;
    let end = whole(offset.saturating_add(length));
    let mut at = whole(offset.saturating_add(cluster_size - 1));
    while at < end {
        let Ok((mapping, found)) = access.get_shallow_mapping(at, end - at) else { return };
        let found = whole(found);
        if found == 0 {
            return;
        }
        if let ShallowMapping::Raw { offset: there, writable: true, .. } = mapping {
            drop(punch(file, there, found));
        }
        at = at.saturating_add(found);
    }
}

fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?)
}

/// Moves all of `data` by a call like `preadv`, which may move less than it was asked to.
fn transfer(
    data: &Segments<'_>,
    mut offset: u64,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    let mut pieces: Vec<libc::iovec> = data
        .slices()
        .iter()
        .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        .collect();
    let mut done = 0;
    while let Some(rest) = pieces.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = match usize::try_from(call(rest, at)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(e);
            }
        };
        offset = offset.saturating_add(moved as u64);
        done += skip(rest, moved);
    }
    Ok(())
}

/// Takes the first `count` bytes off the pieces; returns how many of them are whole pieces.
fn skip(pieces: &mut [libc::iovec], mut count: usize) -> usize {
    for (index, piece) in pieces.iter_mut().enumerate() {
        if count < piece.iov_len {
            piece.iov_base = piece.iov_base.wrapping_byte_add(count);
            piece.iov_len -= count;
            return index;
        }
        count -= piece.iov_len;
    }
    pieces.len()
}
