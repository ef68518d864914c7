//! File locks: a process is alive if it holds the lock of its file; no process id is ever trusted.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock, major, minor},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// Locks `path`, making the file where needed. `None` if another process holds it.
pub fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).read(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a process holds the lock of `path`.
pub fn is_held(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    matches!(flock(&file, FlockOperation::NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK))
}

/// Tells the process that holds the lock of `path` to end (SIGTERM), if the kernel says who that is (proc_locks(5); it
/// does not on file systems whose device number is not that of their files, as btrfs).
pub fn end_holder(path: &Path) -> io::Result<()> {
    let data = fs::metadata(path)?;
    let Some(pid) = holder(&fs::read_to_string("/proc/locks")?, data.dev(), data.ino()) else {
        return Ok(());
    };
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    // The number cannot be another process's as long as the lock is held.
    if is_held(path) {
        pidfd_send_signal(&process, Signal::TERM)?;
    }
    Ok(())
}

/// Who holds the lock of a file, by the text of /proc/locks: `1: FLOCK ADVISORY WRITE 812 fe:00:1234 0 EOF`.
fn holder(table: &str, device: u64, inode: u64) -> Option<Pid> {
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if *at == file => Pid::from_raw(pid.parse().ok()?),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_lock_is_found() {
        let table = "1: FLOCK  ADVISORY  WRITE 812 fe:00:1234 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 5 fe:00:77 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 6 fe:00:77 0 EOF\n3: FLOCK  ADVISORY  WRITE 813 fe:0c:77 0 EOF\n";
        let device = rustix::fs::makedev(0xfe, 0);
        assert_eq!(holder(table, device, 1234), Pid::from_raw(812));
        assert_eq!(holder(table, device, 77), None);
        assert_eq!(holder(table, rustix::fs::makedev(0xfe, 12), 77), Pid::from_raw(813));

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let _lock = try_lock(&path).unwrap();
        let data = fs::metadata(&path).unwrap();
        let table = fs::read_to_string("/proc/locks").unwrap();
        assert_eq!(holder(&table, data.dev(), data.ino()), Some(rustix::process::getpid()));
    }

    #[test]
    fn held_while_the_file_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_held(&path));
        let lock = try_lock(&path).unwrap();
        assert!(lock.is_some() && is_held(&path));
        assert!(try_lock(&path).unwrap().is_none());
        drop(lock);
        assert!(!is_held(&path));
    }
}
