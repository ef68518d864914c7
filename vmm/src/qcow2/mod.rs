//! qcow2 images: made, looked at, and opened with their backing chains. What is inside is imago's work; the checks
//! that it leaves out are here, and so are messages that name the file.
//!
//! Formats are never guessed: a guest writes what is in an image, and could write another format's header there.

mod chain;
mod difference;
mod flatten;
mod grow;
mod header;
pub(crate) mod qemu_locks;
mod repair;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    ffi::OsString,
    fs, io,
    path::{Component, Path, PathBuf},
};

use imago::{FormatCreateBuilder, StorageOpenOptions, file::File as ImageFile, qcow2::Qcow2CreateBuilder};

use crate::config::DiskFormat;

pub(crate) use chain::{Chain, open, open_file};
pub use difference::difference;
pub use flatten::flatten;
pub use grow::grow;
use header::Header;

/// Why an image could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("disk image {}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Somebody else has it open: two writers would destroy it.
    #[error("disk image {} is in use by another machine or program: stop that first", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The content is not what the format says.
    #[error("disk image {} is not a usable qcow2 image: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The image asks for what lab does not do.
    #[error("disk image {}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for, and what to do.
        what: String,
    },
}

/// What an image's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Size of the disk that the guest sees, in bytes.
    pub size_bytes: u64,
    /// Unit of allocation in bytes.
    pub cluster_bytes: u64,
    /// The backing file, as seen from the working directory, and its format if the header names one.
    pub backing: Option<(PathBuf, Option<DiskFormat>)>,
}

/// Reads an image's header. The backing file need not exist.
pub fn info(path: &Path) -> Result<Info, Error> {
    let (_, header) = header_of(path)?;
    let backing = match &header.backing {
        Some(name) => Some((header::resolve(path, name), header.backing_format(path)?)),
        None => None,
    };
    Ok(Info { size_bytes: header.size, cluster_bytes: header.cluster_size(), backing })
}

/// Checks that all that an image's tables lead to lies within its file. The backing file need not exist.
pub fn check(path: &Path) -> Result<(), Error> {
    let (file, header) = header_of(path)?;
    header.check_length(path, &file)?;
    // Refcounts of a file that was cut may say that it is whole.
    header.each_cluster(path, &file, |_| Ok(()))
}

fn header_of(path: &Path) -> Result<(fs::File, Header), Error> {
    let file = fs::File::open(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "open it",
        source,
    })?;
    let header = Header::read(path, &file)?;
    Ok((file, header))
}

/// Makes an image of `size_bytes` with nothing in it. An existing file is an error and stays as it is.
pub fn create_empty(path: &Path, size_bytes: u64) -> Result<(), Error> {
    create(path, size_bytes, None)
}

/// Makes an image of `size_bytes` that holds the differences from `backing`, which must not be written from then on.
/// The path of `backing` is stored relative to the new image's folder, so that both can be moved together. The new
/// disk may be larger than its backing file, not smaller. An existing file is an error and stays as it is.
pub fn create_overlay(
    path: &Path,
    backing: &Path,
    backing_format: DiskFormat,
    size_bytes: u64,
) -> Result<(), Error> {
    let backing_size = match backing_format {
        DiskFormat::Qcow2 => info(backing)?.size_bytes,
        DiskFormat::Raw => fs::metadata(backing)
            .map_err(|source| Error::Io { path: backing.to_owned(), action: "look at it", source })?
            .len(),
    };
    if size_bytes < backing_size {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!(
                "a disk of {size_bytes} bytes is too small for what is on {} ({backing_size} bytes): make it larger",
                backing.display()
            ),
        });
    }
    let name = relative(path, backing)?;
    let name = name.to_str().ok_or_else(|| Error::Unsupported {
        path: backing.to_owned(),
        what: "a backing file's name must be UTF-8".to_owned(),
    })?;
    let format = match backing_format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    create(path, size_bytes, Some((name.to_owned(), format.to_owned())))
}

/// Writes a new image beside `path` and puts it there when it is whole.
fn create(path: &Path, size_bytes: u64, backing: Option<(String, String)>) -> Result<(), Error> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(512) {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: format!("a disk's size must be a multiple of 512 bytes, and not {size_bytes}"),
        });
    }
    let io_error = |source| Error::Io { path: path.to_owned(), action: "make it", source };
    if path.exists() {
        return Err(io_error(io::ErrorKind::AlreadyExists.into()));
    }
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let new = folder(path).join(name);
    // Left behind by a process that was killed; it may be another name of a finished image, so it is not reused.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(e)),
        _ => {}
    }
    let written = write_image(&new, size_bytes, backing).and_then(|()| fs::hard_link(&new, path));
    let removed = fs::remove_file(&new);
    written.and(removed).map_err(io_error)
}

fn write_image(path: &Path, size_bytes: u64, backing: Option<(String, String)>) -> io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let storage = ImageFile::from_open_file(file.try_clone()?, StorageOpenOptions::new().write(true))?;
    let mut image: Qcow2CreateBuilder<ImageFile> = FormatCreateBuilder::new(storage);
    image = image.size(size_bytes);
    if let Some((name, format)) = backing {
        image = image.backing(name, format);
    }
    image.create()?;
    file.sync_all()
}

/// The folder that `path` is in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// `target` as seen from the folder of `from`.
fn relative(from: &Path, target: &Path) -> Result<PathBuf, Error> {
    let real = |path: &Path| {
        fs::canonicalize(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "find it",
            source,
        })
    };
    let (from, target) = (real(folder(from))?, real(target)?);
    let common = from.components().zip(target.components()).take_while(|(a, b)| a == b).count();
    let mut path = PathBuf::new();
    for _ in from.components().skip(common) {
        path.push(Component::ParentDir);
    }
    path.extend(target.components().skip(common));
    Ok(path)
}
