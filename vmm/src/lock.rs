//! The lock that says that the machine exists: held by this process, and across its restarts when the guest resets.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, RawFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::restart;

/// Why the lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has it.
    #[error("the machine is running already: another process holds {0}")]
    Held(PathBuf),
    /// The file cannot be opened or locked.
    #[error("cannot lock {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A locked file. The lock goes with the value.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Lock the file at `path`, which is made if it does not exist; `inherited` is the descriptor that this process has
    /// from the one that it replaces, if any.
    pub fn take(path: &Path, inherited: Option<RawFd>) -> Result<Self, Error> {
        let refused = |source| Error::Io { path: path.into(), source };
        let file = match inherited {
            Some(fd) => inherit(path, fd).map_err(refused)?,
            None => {
                if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(refused)?;
                }
                OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(refused)?
            }
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Held(path.into())),
            Err(error) => Err(refused(error.into())),
        }
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The descriptor that the process before us left open, if it really is that file.
fn inherit(path: &Path, fd: RawFd) -> io::Result<File> {
    let file = File::from(restart::inherit(fd)?);
    let (ours, named) = (file.metadata()?, std::fs::metadata(path)?);
    if (ours.dev(), ours.ino()) != (named.dev(), named.ino()) {
        return Err(io::Error::other("it is not the file that was locked before the reset"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};

    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/lock");
        let lock = Lock::take(&path, None).unwrap();
        assert!(matches!(Lock::take(&path, None), Err(Error::Held(held)) if held == path));
        drop(lock);
        Lock::take(&path, None).unwrap();
    }

    #[test]
    fn the_lock_is_handed_over_without_being_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::take(&path, None).unwrap();
        let fd = lock.as_fd().as_raw_fd();
        // What exec does to the old process: the descriptor stays, its owner is forgotten.
        std::mem::forget(lock);
        let heir = Lock::take(&path, Some(fd)).unwrap();
        assert!(matches!(Lock::take(&path, None), Err(Error::Held(_))));
        drop(heir);
        Lock::take(&path, None).unwrap();
    }

    #[test]
    fn a_descriptor_of_another_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        std::fs::write(&path, "").unwrap();
        let other = OwnedFd::from(tempfile::tempfile().unwrap());
        let fd = std::os::fd::IntoRawFd::into_raw_fd(other);
        assert!(Lock::take(&path, Some(fd)).is_err());
        assert!(Lock::take(&path, Some(12345)).is_err());
    }
}
