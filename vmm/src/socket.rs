//! Private UNIX sockets that this process listens on.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// Longest path of a socket in bytes (sockaddr_un, less the terminating zero).
const PATH_MAX: usize = 107;

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address of a UNIX socket is short.
    #[error(
        "the socket path {path} is {length} bytes long, the system allows {PATH_MAX}: use a shorter folder"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Somebody is there already.
    #[error("another process listens at {0}")]
    InUse(PathBuf),
    /// Something else has the name.
    #[error("{0} exists and is not a socket: remove it, or name another path")]
    NotASocket(PathBuf),
    /// The host refused.
    #[error("cannot listen at {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A listening socket that goes away with its owner.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listen at `path`, without blocking. A folder that does not exist is made, for the user alone; a socket that was
    /// left behind is replaced.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let length = path.as_os_str().len();
        if length > PATH_MAX {
            return Err(Error::TooLong { path: path.into(), length });
        }
        let refused = |source| Error::Io { path: path.into(), source };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(refused)?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket(path.into())),
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return Err(Error::InUse(path.into())),
                Err(_) => std::fs::remove_file(path).map_err(refused)?,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refused(error)),
        }
        // Private because of the process' umask (see `main`).
        let listener = UnixListener::bind(path).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Self { listener, path: path.into() })
    }

    /// The next connection, without blocking; `None` if nobody waits.
    pub fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/control");
        drop(UnixListener::bind(folder.path().join("stale")).unwrap());
        std::fs::create_dir(folder.path().join("run")).unwrap();
        std::fs::rename(folder.path().join("stale"), &path).unwrap();
        let live = Listener::new(&path).unwrap();
        assert!(matches!(Listener::new(&path), Err(Error::InUse(_))));
        let mut client = UnixStream::connect(&path).unwrap();
        assert!(live.accept().is_some());
        drop(live);
        assert!(!path.exists());
        assert!(io::Write::write(&mut client, b"x").is_err());
    }

    #[test]
    fn only_sockets_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(Listener::new(&path), Err(Error::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
        let long = folder.path().join("x".repeat(120));
        assert!(Listener::new(&long).unwrap_err().to_string().contains("107"));
    }

    #[test]
    fn a_new_folder_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let _listener = Listener::new(&folder.path().join("a/b/control")).unwrap();
        let mode = std::fs::metadata(folder.path().join("a/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
