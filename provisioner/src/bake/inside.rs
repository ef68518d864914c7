//! The process in the namespaces: unpacks the image's files into memory, runs steps on them, and makes disks of them.

use std::{
    fs::{self, File},
    io::{self, IoSlice, Read, Write},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::{Command, Stdio},
};

use rustix::{
    io::FdFlags,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::Signal,
    thread::{Gid, Uid, UnshareFlags},
};

use super::{BEGINS, Error, InsidePlan, InsideStep, MADE, STEP, StepPlan, failed, plan};
use crate::host::emulated::netlink::Netlink;

/// Where the files lie: a folder that every machine has, on which the memory is mounted in here.
const ROOT: &str = "/tmp";

/// Runs as that process; its exit status.
pub fn run() -> Result<u8, Error> {
    let plan: InsidePlan = plan()?;
    // SAFETY: the descriptors were opened for this process, and nothing else in it uses them.
    let (archive, control) =
        unsafe { (OwnedFd::from_raw_fd(plan.archive), UnixStream::from(OwnedFd::from_raw_fd(plan.control))) };
    // A step has nothing of it but its own files: the disks are not its to write, and what is at the other end of `control`
    // sees the end of this process.
    keep_from_children(archive.as_fd())?;
    keep_from_children(control.as_fd())?;
    for step in &plan.steps {
        for descriptor in [step.files, step.disk.map(|(disk, _)| disk)].into_iter().flatten() {
            // SAFETY: the descriptor was opened for this process, which closes none before its step.
            keep_from_children(unsafe { BorrowedFd::borrow_raw(descriptor) })?;
        }
    }
    enter(&control)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("keep mounts apart"))?;
    let size = std::ffi::CString::new(format!("mode=0755,size={}m", plan.memory_mib));
    let size = size.map_err(|error| failed("mount memory")(io::Error::from(error)))?;
    mount("lab", ROOT, "tmpfs", MountFlags::empty(), size.as_c_str()).map_err(failed("mount memory"))?;
    unpack(archive)?;
    let cache = cache().map_err(failed("listen for the steps' requests"))?;
    give(&control, &cache).map_err(failed("give the cache's socket away"))?;
    drop(cache);
    for (number, step) in plan.steps.iter().enumerate() {
        say(BEGINS, number)?;
        let status = run_step(step)?;
        if status != 0 {
            return Ok(status);
        }
        if let Some((disk, bytes)) = step.disk {
            disk_of_root(disk, bytes)?;
            say(MADE, number)?;
        }
    }
    Ok(0)
}

fn keep_from_children(descriptor: BorrowedFd<'_>) -> Result<(), Error> {
    rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC).map_err(failed("keep a file from steps"))
}

/// Makes the namespaces, and becomes their root, when the users are mapped.
fn enter(mut control: &UnixStream) -> Result<(), Error> {
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    // SAFETY: this process has one thread, and no file descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("make namespaces"))?;
    let pid = std::process::id().to_ne_bytes();
    let mut mapped = [0];
    control
        .write_all(&pid)
        .and_then(|()| control.read_exact(&mut mapped))
        .map_err(failed("have the namespaces' users mapped"))?;
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave groups"))?;
    rustix::thread::set_thread_gid(Gid::ROOT).map_err(failed("become root"))?;
    rustix::thread::set_thread_uid(Uid::ROOT).map_err(failed("become root"))?;
    // After that: a change of user takes it away.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("be ended with the bake"))
}

fn say(what: &str, number: usize) -> Result<(), Error> {
    let mut out = io::stdout();
    writeln!(out, "{what}{number}").and_then(|()| out.flush()).map_err(failed("say how far it is"))
}

/// Unpacks the image's files.
fn unpack(archive: OwnedFd) -> Result<(), Error> {
    let action = "unpack the image's files";
    let mut tar = Command::new("tar");
    tar.args(["-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f", "-", "-C", ROOT]);
    let mut tar = tar.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().map_err(failed(action))?;
    let mut decoder = zstd::Decoder::new(File::from(archive)).map_err(failed(action))?;
    if let Some(mut stdin) = tar.stdin.take() {
        io::copy(&mut decoder, &mut stdin).map_err(failed(action))?;
    }
    let status = tar.wait().map_err(failed(action))?;
    // What the archive leaves out: whoever boots mounts a devtmpfs there.
    let made = fs::create_dir_all(Path::new(ROOT).join("dev"));
    if status.success() {
        made.map_err(failed(action))
    } else {
        Err(failed(action)(io::Error::other(status.to_string())))
    }
}

/// A socket that steps reach at the loopback of their network, which has nothing else.
fn cache() -> io::Result<TcpListener> {
    let netlink = Netlink::open()?;
    netlink.set_up(netlink.index("lo")?)?;
    TcpListener::bind(("127.0.0.1", lab_net::cache::PORT))
}

/// Gives a socket to the process outside.
fn give(control: &UnixStream, socket: &TcpListener) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets = [socket.as_fd()];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    sendmsg(control, &[IoSlice::new(b"s")], &mut ancillary, SendFlags::empty())?;
    Ok(())
}

/// Runs a step to its end; its status.
fn run_step(step: &InsideStep) -> Result<u8, Error> {
    let action = "run the step";
    let plan = StepPlan {
        parent: std::process::id(),
        root: ROOT.into(),
        script: step.script.clone(),
        environment: step.environment.clone(),
        files: step.files,
    };
    // SAFETY: the descriptor was opened for this process, and nothing else in it uses it.
    let files = step.files.map(|files| unsafe { OwnedFd::from_raw_fd(files) });
    if let Some(files) = &files {
        rustix::io::fcntl_setfd(files, FdFlags::empty()).map_err(failed(action))?;
    }
    // This very program, wherever it lies: its folder may not be open for the users here.
    let mut process = Command::new("/proc/self/exe");
    let mut process = process.arg(STEP).stdin(Stdio::piped()).spawn().map_err(failed(action))?;
    if let Some(stdin) = process.stdin.take() {
        serde_json::to_writer(stdin, &plan).map_err(|error| failed(action)(io::Error::from(error)))?;
    }
    let status = process.wait().map_err(failed(action))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Makes a disk of all files as they are.
fn disk_of_root(disk: RawFd, bytes: u64) -> Result<(), Error> {
    let action = "make a disk of the files";
    // SAFETY: the descriptor was opened for this process, and nothing else in it uses it.
    let disk = unsafe { OwnedFd::from_raw_fd(disk) };
    // mke2fs is often in a folder that is not on a user's PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new("mke2fs")
        .args(lab_images::build::MKE2FS)
        .args([ROOT, "/dev/stdout", &format!("{}k", bytes / 1024)])
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(disk)
        .status()
        .map_err(failed(action))?;
    if status.success() { Ok(()) } else { Err(failed(action)(io::Error::other(format!("mke2fs: {status}")))) }
}
