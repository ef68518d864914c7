//! File locks: a process is alive if it holds the lock of its file; no process id is ever trusted.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
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

/// Tells the process that holds the lock of `path` to end (SIGTERM), if it is found: a process of this user that has the
/// file open, and of which the kernel says that it holds a lock with that inode number (proc_locks(5)).
pub fn end_holder(path: &Path) -> io::Result<()> {
    let (inode, path) = (fs::metadata(path)?.ino(), fs::canonicalize(path)?);
    for pid in holders(&fs::read_to_string("/proc/locks")?, inode) {
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        // After that, its number cannot become another's.
        if has_open(pid, &path) {
            pidfd_send_signal(&process, Signal::TERM)?;
        }
    }
    Ok(())
}

/// Who holds locks of files with this inode number, on whatever file system: `1: FLOCK ADVISORY WRITE 812 fe:00:1234 0 EOF`.
/// The device is left out, since it is not the one that stat(2) tells on btrfs or overlayfs.
fn holders(table: &str, inode: u64) -> Vec<Pid> {
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if at.rsplit(':').next()?.parse() == Ok(inode) => {
                Pid::from_raw(pid.parse().ok()?)
            }
            _ => None,
        }
    };
    table.lines().filter_map(holder).collect()
}

fn has_open(pid: Pid, path: &Path) -> bool {
    let open = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten().flatten();
    open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_lock_is_found() {
        let table = "1: FLOCK  ADVISORY  WRITE 812 fe:00:1234 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 5 fe:00:77 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 6 fe:00:77 0 EOF\n3: FLOCK  ADVISORY  WRITE 813 fe:0c:77 0 EOF\n";
        assert_eq!(holders(table, 1234), [Pid::from_raw(812).unwrap()]);
        assert_eq!(holders(table, 77), [Pid::from_raw(813).unwrap()]);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("lock");
        let _lock = try_lock(&path).unwrap();
        let own = rustix::process::getpid();
        let table = fs::read_to_string("/proc/locks").unwrap();
        assert!(holders(&table, fs::metadata(&path).unwrap().ino()).contains(&own));
        assert!(has_open(own, &path) && !has_open(own, &path.with_file_name("other")));

        let other = dir.path().join("other");
        let mut holder = std::process::Command::new("flock");
        let mut holder =
            holder.args(["--no-fork".as_ref(), other.as_os_str()]).args(["sleep", "1000"]).spawn().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !is_held(&other) {
            assert!(std::time::Instant::now() < end, "nobody has locked it");
            std::thread::yield_now();
        }
        end_holder(&other).unwrap();
        let ended = crate::child::wait(&mut holder, std::time::Duration::from_secs(30)).unwrap();
        drop(holder.kill());
        assert!(ended.is_some_and(|status| !status.success()) && !is_held(&other), "{ended:?}");
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
