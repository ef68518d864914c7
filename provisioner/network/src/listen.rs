//! The UNIX sockets and the lock file of a network: private, and taken over from one that was killed.

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::FlockOperation,
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

const BACKLOG: i32 = 64;

/// Why a socket or the lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder is open to others.
    #[error("{0} is open to other users: a network's sockets need a folder of their own (`chmod 700 {0}`)")]
    Public(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: move it out of the way")]
    NotASocket(PathBuf),
    /// Another process has the lock.
    #[error("the lab's network is running already: {0} is locked")]
    Locked(PathBuf),
    /// The host refuses.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

fn failed<E: Into<std::io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path: path.clone(), source: source.into() }
}

/// Lock a file for as long as the returned handle lives.
pub fn lock(path: &Path) -> Result<File, Error> {
    let file =
        File::options().create(true).truncate(false).write(true).open(path).map_err(failed("open", path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::AGAIN) => Err(Error::Locked(path.to_owned())),
        Err(e) => Err(failed("lock", path)(e)),
    }
}

/// A listening UNIX socket, whose file is removed with it.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listen at `path`, in place of a socket that a killed process left there.
pub fn unix(path: &Path, kind: SocketType) -> Result<(OwnedFd, SocketFile), Error> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let meta = std::fs::metadata(folder).map_err(failed("use the folder", folder))?;
    if meta.mode() & 0o077 != 0 || meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(Error::Public(folder.to_owned()));
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(failed("remove the stale socket", path))?;
        }
        Ok(_) => return Err(Error::NotASocket(path.to_owned())),
        Err(_) => {}
    }
    let address =
        SocketAddrUnix::new(path).map_err(failed("name a socket (at most 107 bytes long)", path))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listen = || -> Result<OwnedFd, Errno> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
        rustix::net::bind(&socket, &address)?;
        Ok(socket)
    };
    let socket = listen().map_err(failed("make the socket", path))?;
    let file = SocketFile(path.to_owned());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("protect", path))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen at", path))?;
    Ok((socket, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_other_files_are_not() {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().permissions(private).tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (stale, file) = unix(&path, SocketType::STREAM).unwrap();
        drop(stale);
        std::mem::forget(file);
        assert!(path.exists());
        let (_listening, file) = unix(&path, SocketType::SEQPACKET).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(unix(&path, SocketType::STREAM), Err(Error::NotASocket(_))));
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(unix(&path, SocketType::STREAM), Err(Error::Public(_))));
    }

    #[test]
    fn a_lock_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path).unwrap();
        assert!(matches!(lock(&path), Err(Error::Locked(_))));
        drop(held);
        lock(&path).unwrap();
    }
}
