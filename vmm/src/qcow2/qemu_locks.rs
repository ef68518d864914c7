//! The locks by which QEMU and its tools see who else uses an image: read locks on single bytes of the file, those from
//! 100 on for what one does, those from 200 on for what one does not let others do (QEMU's block/file-posix.c). They
//! stand beside flock, of which QEMU knows nothing, and belong to the open file, as flock's do (fcntl(2), OFD locks).

use std::{fs::File, io, os::fd::AsRawFd};

const DOES: i64 = 100;
const KEEPS_FROM_OTHERS: i64 = 200;
/// QEMU's permissions (include/block/block-common.h), by their bit.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Takes the locks of a writer or a reader; false if somebody else's use of the file does not go together with that.
/// Where a file system has no such locks there is nothing to see, and nobody to be seen.
pub fn take(file: &File, writable: bool) -> bool {
    let does: &[i64] = if writable { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    // Whoever writes would change what this one reads.
    let keeps = [WRITE, RESIZE];
    let own = does.iter().map(|bit| DOES + bit).chain(keeps.map(|bit| KEEPS_FROM_OTHERS + bit));
    // First its own, then a look at the others': of two that come at once, one sees the other.
    for byte in own {
        if lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).is_err() {
            return true;
        }
    }
    let others = does.iter().map(|bit| KEEPS_FROM_OTHERS + bit).chain(keeps.map(|bit| DOES + bit));
    // A write lock would not be given where anybody else has a read lock.
    others.into_iter().all(|byte| {
        lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_or(true, |found| found == libc::F_UNLCK)
    })
}

/// A writer becomes a reader.
pub fn keep_reading(file: &File) {
    for bit in [WRITE, RESIZE] {
        // It was locked: nothing can be in the way.
        drop(lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, DOES + bit));
    }
}

/// What the kernel says of the lock of one byte: F_UNLCK or the kind of lock.
fn lock(file: &File, command: i32, kind: i32, byte: i64) -> io::Result<i32> {
    // SAFETY: `flock` is plain data, for which zeroes are a value.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    (range.l_start, range.l_len) = (byte, 1);
    // SAFETY: the file is open, and the kernel reads and writes `range`, which lives longer than the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(range.l_type.into()),
    }
}
