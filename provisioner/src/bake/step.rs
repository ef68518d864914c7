//! The process of one baked step: it is the first of process and mount namespaces of its own, its root is the image's files,
//! and it becomes the shell that runs the script.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, symlink},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    process::{Pid, Signal, WaitOptions, waitpid},
    thread::UnshareFlags,
};

use super::{Error, StepPlan, failed, filter, plan};

/// Devices that a script may use.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// The script, in the root that it sees.
const SCRIPT: &str = "run/lab-script";
/// Where it finds its files, as in a node.
const FOLDER: &str = "run/lab-step";
/// Where apt finds the cache, as in a node.
const PROXY: &str = "run/lab/apt-proxy";

/// Runs as the process that waits for the step, and as the step; the status that it ends with.
pub fn run() -> Result<u8, Error> {
    let step: StepPlan = plan()?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("be ended with the bake"))?;
    // Who waits may have ended before that.
    if rustix::process::getppid().is_none_or(|pid| pid.as_raw_nonzero().get() != step.parent as i32) {
        return Ok(1);
    }
    // The step's end of it tells whether this process lives.
    let (alive, held) = io::pipe().map_err(failed("make a pipe"))?;
    // SAFETY: this process has one thread, and no file descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWNS) }
        .map_err(failed("make namespaces"))?;
    // SAFETY: this process has one thread: the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(failed("start a process")(io::Error::last_os_error())),
        0 => {
            drop(held);
            Err(become_step(&step, &alive))
        }
        child => {
            let child = Pid::from_raw(child);
            match waitpid(child, WaitOptions::empty()).map_err(failed("wait for the step"))? {
                Some((_, status)) => Ok(status.exit_status().and_then(|s| u8::try_from(s).ok()).unwrap_or(1)),
                None => Ok(1),
            }
        }
    }
}

/// Becomes the step's shell; returns why it can't. `alive` has an end when the process that waits for it has ended.
fn become_step(step: &StepPlan, alive: &io::PipeReader) -> Error {
    let prepared = rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .and_then(|()| poll(&mut [PollFd::new(alive, PollFlags::IN)], Some(&Timespec::default())))
        .map_err(failed("be ended with the bake"));
    match prepared.map(|ended| (ended, root(step))) {
        Ok((0, Ok(()))) => {}
        Ok((_, Ok(()))) => {
            return failed("be ended with the bake")(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        Ok((_, Err(error))) | Err(error) => return error,
    }
    let mut shell = Command::new("/bin/sh");
    shell.args(["-e", &format!("/{SCRIPT}")]).current_dir("/root").env_clear().stdin(Stdio::null());
    shell.envs([
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
        // No service runs here: systemctl changes files alone.
        ("SYSTEMD_OFFLINE", "1"),
    ]);
    shell.envs(step.environment.iter().map(|(key, value)| (key, value)));
    if let Err(source) = filter::apply() {
        return failed("drop what the step does not need")(source);
    }
    failed("start the step's shell")(shell.exec())
}

/// Makes the image's files, with what a script expects beside them, the root of this process.
fn root(step: &StepPlan) -> Result<(), Error> {
    let within = |path: &str| step.root.join(path);
    let kinds: [(&str, &str, &std::ffi::CStr); 4] = [
        ("proc", "proc", c""),
        ("tmpfs", "dev", c"mode=0755,size=1m"),
        ("tmpfs", "run", c"mode=0755"),
        ("tmpfs", "tmp", c"mode=1777"),
    ];
    for (kind, place, options) in kinds {
        fs::create_dir_all(within(place)).map_err(failed("make a folder"))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount(kind, within(place), kind, flags, options).map_err(failed("mount a file system"))?;
    }
    for name in DEVICES {
        let place = within("dev").join(name);
        File::create(&place).map_err(failed("make a device's place"))?;
        mount_bind(Path::new("/dev").join(name), &place).map_err(failed("give the step a device"))?;
    }
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        symlink(format!("/proc/self/{target}"), within("dev").join(name)).map_err(failed("make a link"))?;
    }
    let mut private = fs::DirBuilder::new();
    private.mode(0o755).create(within("run/lab")).map_err(failed("make a folder"))?;
    let proxy = format!("http://127.0.0.1:{}\n", lab_net::cache::PORT);
    fs::write(within(PROXY), proxy).map_err(failed("write the cache's address"))?;
    fs::write(within(SCRIPT), &step.script).map_err(failed("write the script"))?;
    private.mode(0o700).create(within(FOLDER)).map_err(failed("make a folder"))?;
    if let Some(files) = step.files {
        // SAFETY: the descriptor was opened for this process, and nothing else in it uses it.
        let files = unsafe { OwnedFd::from_raw_fd(files) };
        let unpacked = Command::new("tar")
            .args(["-x", "--no-same-owner", "-f", "-", "-C"])
            .arg(within(FOLDER))
            .stdin(files)
            .stdout(Stdio::null())
            .status()
            .map_err(failed("unpack the step's files"))?;
        if !unpacked.success() {
            return Err(failed("unpack the step's files")(io::Error::other(unpacked.to_string())));
        }
    }
    mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .map_err(failed("keep mounts apart"))?;
    rustix::process::chdir(&step.root).map_err(failed("enter the image's files"))?;
    // Both at one place (pivot_root(2)): the old root lies upon the new one, until it is taken away.
    rustix::process::pivot_root(".", ".").map_err(failed("make the image's files the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("take the old root away"))?;
    rustix::process::chdir("/").map_err(failed("enter the new root"))
}
