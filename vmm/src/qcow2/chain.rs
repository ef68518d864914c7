//! Opening an image with all its backing files, each as what the one above says it is.

use std::{
    fs::{File, OpenOptions},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use imago::{FormatAccess, StorageOpenOptions, file::File as ImageFile, qcow2::Qcow2, raw::Raw};
use rustix::fs::{FlockOperation, flock};

use super::{Error, header, header::Header, qemu_locks, repair::repair};
use crate::config::DiskFormat;

/// Longest chain that is opened; lab flattens chains long before.
const MAX_DEPTH: usize = 32;

/// An open image.
pub(crate) struct Chain {
    /// The image with all that is below it.
    pub access: FormatAccess<ImageFile>,
    /// The topmost file, for syncing.
    pub file: File,
    /// Unit of allocation in bytes.
    pub cluster_size: u64,
}

/// Opens a qcow2 image and its backing files, which are only read.
pub(crate) fn open(path: &Path, writable: bool) -> Result<Chain, Error> {
    open_layer(open_file(path, writable)?, path, writable, 1)
}

/// Opens, for reading, what a machine that stands still may have locked.
pub(super) fn open_paused(path: &Path) -> Result<Chain, Error> {
    let file =
        File::open(path).map_err(|source| Error::Io { path: path.to_owned(), action: "open it", source })?;
    open_layer(file, path, false, 1)
}

fn open_layer(file: File, path: &Path, writable: bool, depth: usize) -> Result<Chain, Error> {
    let header = Header::read(path, &file)?;
    header.check_length(path, &file)?;
    if writable {
        repair(path, &file, &header)?;
    }
    let backing = match &header.backing {
        None => None,
        Some(_) if depth == MAX_DEPTH => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: format!(
                    "it is the {MAX_DEPTH}th of a chain of backing files, or the chain is a circle"
                ),
            });
        }
        Some(name) => {
            let below = header::resolve(path, name);
            match header.backing_format(path)? {
                Some(DiskFormat::Qcow2) => {
                    Some(open_layer(open_file(&below, false)?, &below, false, depth + 1)?.access)
                }
                Some(DiskFormat::Raw) => Some(open_raw(&below)?),
                None => {
                    return Err(Error::Unsupported {
                        path: path.to_owned(),
                        what: format!(
                            "it does not say of which format its backing file is; tell it with `qemu-img rebase -u \
                             -b {name:?} -F FORMAT`"
                        ),
                    });
                }
            }
        }
    };
    let storage = storage(path, &file, writable)?;
    let image = guarded(path, || {
        let mut image = Qcow2::<ImageFile>::open_image(storage, writable)?;
        image.set_data_file(None);
        image.set_backing(backing);
        Ok(image)
    })?;
    Ok(Chain { access: FormatAccess::new(image), file, cluster_size: header.cluster_size() })
}

fn open_raw(path: &Path) -> Result<FormatAccess<ImageFile>, Error> {
    let file = open_file(path, false)?;
    let storage = storage(path, &file, false)?;
    Ok(FormatAccess::new(guarded(path, || Raw::open_image(storage, false))?))
}

/// Opens an image file and locks it: for itself if it is written, with other readers otherwise. lab's own programs see
/// that by flock, QEMU's by locks of its kind.
pub(crate) fn open_file(path: &Path, writable: bool) -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(writable).open(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "open it",
        source,
    })?;
    let lock = if writable {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    match flock(&file, lock) {
        Ok(()) if qemu_locks::take(&file, writable) => Ok(file),
        Ok(()) | Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse { path: path.to_owned() }),
        Err(e) => Err(Error::Io { path: path.to_owned(), action: "lock it", source: e.into() }),
    }
}

fn storage(path: &Path, file: &File, writable: bool) -> Result<ImageFile, Error> {
    file.try_clone()
        .and_then(|file| {
            ImageFile::from_open_file(file, StorageOpenOptions::new().filename(path).write(writable))
        })
        .map_err(|source| Error::Io { path: path.to_owned(), action: "open it", source })
}

/// Runs what reads tables of the image; a panic there is about the image too.
fn guarded<T>(path: &Path, open: impl FnOnce() -> io::Result<T>) -> Result<T, Error> {
    let damaged = |what: String| Error::Damaged { path: path.to_owned(), what };
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(opened) => opened.map_err(|e| damaged(e.to_string())),
        Err(_) => Err(damaged("its tables make no sense".to_owned())),
    }
}
