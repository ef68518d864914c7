//! Where the emulated host keeps what: `LAB_HOME/host` for what lasts, a folder below the runtime folder for sockets.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use crate::paths::{self, Paths};

/// Name of the folder for sockets. No lab can have it: names of labs begin with a letter or a digit.
const SOCKETS: &str = ".host";
/// Longest path of a socket that OpenSSH can make: it first binds a name that is 17 bytes longer.
const LONGEST_CONTROL_PATH: usize = 107 - 17;

/// The files of the emulated host of one `LAB_HOME`.
#[derive(Debug, Clone)]
pub struct Files {
    /// `LAB_HOME`.
    pub home: PathBuf,
    /// `LAB_HOME/host`.
    pub dir: PathBuf,
    /// Sockets.
    pub sockets: PathBuf,
}

impl Files {
    /// Finds the folders; none of them is made yet.
    pub fn new(paths: &Paths) -> Self {
        let dir = paths.home().join("host");
        Self { home: paths.home().into(), sockets: paths.sockets(&dir, SOCKETS), dir }
    }

    /// Makes the folders, for this user alone.
    pub fn create(&self) -> Result<(), paths::Error> {
        paths::private_dir(&self.dir)?;
        paths::private_dir(&self.requests())?;
        if self.ssh_socket().as_os_str().len() > LONGEST_CONTROL_PATH {
            return Err(paths::Error::TooLong(self.sockets.clone()));
        }
        paths::private_dir(&self.sockets)?;
        paths::record_sockets(&self.dir, &self.sockets)
    }

    /// Locked by the supervisor and QEMU while the machine exists. It holds the [`super::State`] once commands can
    /// come in.
    pub fn machine(&self) -> PathBuf {
        self.dir.join("machine")
    }

    /// Locked by whoever starts or stops the machine; shared by commands that use `LAB_HOME` without it.
    pub fn start_lock(&self) -> PathBuf {
        self.dir.join("start.lock")
    }

    /// Locked by whoever changes the forwards. It holds the sequence number of the report that they were last set by.
    pub fn forwards_lock(&self) -> PathBuf {
        self.dir.join("forwards.lock")
    }

    /// Requests of commands that are being carried.
    pub fn requests(&self) -> PathBuf {
        self.dir.join("requests")
    }

    /// The kernel and its modules.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// Configuration of init.
    pub fn init(&self) -> PathBuf {
        self.dir.join("init.json")
    }

    /// Configuration of the supervisor.
    pub fn supervisor(&self) -> PathBuf {
        self.dir.join("supervisor.json")
    }

    /// What a file of messages is called: `console`, `qemu`, `virtiofsd`, `dropbear`, `supervisor`.
    pub fn log(&self, of: &str) -> PathBuf {
        self.dir.join(format!("{of}.log"))
    }

    /// The private key of commands; the public one is beside it (`.pub`).
    pub fn key(&self) -> PathBuf {
        self.dir.join("id_ed25519")
    }

    /// The private key of the SSH server, in dropbear's format.
    pub fn host_key(&self) -> PathBuf {
        self.dir.join("dropbear_ed25519")
    }

    /// Its public key, as ssh(1) wants it.
    pub fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    /// QEMU's control socket.
    pub fn qmp_socket(&self) -> PathBuf {
        self.sockets.join("qmp")
    }

    /// virtiofsd's socket.
    pub fn virtiofs_socket(&self) -> PathBuf {
        self.sockets.join("fs")
    }

    /// The SSH client's connection, shared by all commands.
    pub fn ssh_socket(&self) -> PathBuf {
        self.sockets.join("ssh")
    }
}

/// Opens a lock file, making it where needed.
pub fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).open(path)
}

/// Takes a lock, waiting for at most `limit`; `waiting` is called once if it has to wait. `None` if it was held until
/// the end.
pub fn lock_within(
    path: &Path,
    shared: bool,
    limit: Duration,
    waiting: impl FnOnce(),
) -> io::Result<Option<File>> {
    let file = open_lock(path)?;
    let operation =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    let end = Instant::now() + limit;
    let mut waiting = Some(waiting);
    loop {
        match flock(&file, operation) {
            Ok(()) => return Ok(Some(file)),
            // flock(2) has no time limit of its own, and a signal to end it would be the whole process'.
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                if let Some(waiting) = waiting.take() {
                    waiting();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_no_longer_than_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let limit = Duration::from_millis(60);
        let shared = lock_within(&path, true, limit, || panic!("nobody holds it")).unwrap();
        assert!(lock_within(&path, true, limit, || panic!("it is shared")).unwrap().is_some());
        let mut waited = false;
        assert!(lock_within(&path, false, limit, || waited = true).unwrap().is_none());
        assert!(waited);
        drop(shared);
        assert!(lock_within(&path, false, limit, || ()).unwrap().is_some());
    }
}
