//! A reset of the guest: this process replaces itself by a fresh one, which takes over the configuration and the lock
//! by inherited descriptors, so that the lock is never free.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::{FdFlags, fcntl_setfd},
};

use crate::{config::VmConfig, lock::Lock};

/// Replace this process by itself, for the same machine. Comes back only with what went wrong.
pub fn start_anew(config: &VmConfig, lock: Option<&Lock>, quick_resets: u32) -> io::Error {
    match prepare(config, lock, quick_resets) {
        Ok((mut command, _config)) => command.exec(),
        Err(error) => error,
    }
}

fn prepare(config: &VmConfig, lock: Option<&Lock>, quick_resets: u32) -> io::Result<(Command, File)> {
    // Whatever is still open, made by whichever library, does not go along.
    // SAFETY: marks descriptors to be closed by exec; nothing is closed now, no memory is touched.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } != 0 {
        // Linux before 5.11.
        close_all_on_exec()?;
    }
    // The file that the configuration came from may be another one by now.
    let mut file = File::from(memfd_create("lab-vmm-config", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(format!("lab-vmm {}", config.name));
    let mut hand_over = |flag: &str, fd: &dyn AsFd| -> io::Result<()> {
        fcntl_setfd(fd, FdFlags::empty())?;
        command.args([OsString::from(flag), fd.as_fd().as_raw_fd().to_string().into()]);
        Ok(())
    };
    hand_over("--config-fd", &file)?;
    if let Some(lock) = lock {
        hand_over("--lock-fd", lock)?;
    }
    command.args(["--quick-resets".into(), quick_resets.to_string()]);
    Ok((command, file))
}

/// Marks each open descriptor, of which no other thread opens more now, to be closed by exec.
fn close_all_on_exec() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let Some(fd) = number.filter(|fd| *fd > libc::STDERR_FILENO) {
            // SAFETY: changes a flag of a descriptor; one that is not open any more, as the folder's own, gives an error.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// Take a descriptor that the process before us has left open for us.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks at the number; a descriptor that is not open gives an error.
    if fd <= libc::STDERR_FILENO || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: open, as just seen, and owned by nobody: this runs once for each number, before anything else opens files,
    // and our own former self has put the number on our command line.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_marked_on_an_old_kernel_too() {
        let file = tempfile::tempfile().unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        close_all_on_exec().unwrap();
        assert!(rustix::io::fcntl_getfd(&file).unwrap().contains(FdFlags::CLOEXEC));
    }
}
