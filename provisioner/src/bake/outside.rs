//! The side of a bake that stays outside of the namespaces.

use std::{
    fs::{self, File, Permissions},
    io::{self, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use lab_net::{cache::Cache, nat::Outside};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};

use super::{BEGINS, Error, INSIDE, InsidePlan, InsideStep, MADE, failed};
use crate::{
    child, memory,
    subordinate_ids::{self, COUNT},
};

/// The first id of the namespaces outside, where root has none in /etc/subuid: what useradd(8) gives to the first user.
const FIRST_ID: u32 = 100_000;
/// Memory that has to be free, in MiB: two thirds of it are for the files.
const LEAST_MEMORY_MIB: u64 = 3072;

/// A step that is to be baked.
pub struct Step {
    /// Its name, for messages.
    pub name: String,
    /// Shell script for `/bin/sh -e`.
    pub script: String,
    /// Its environment.
    pub environment: Vec<(String, String)>,
    /// A tar archive with its files.
    pub files: Option<File>,
    /// What is to be made of all files after it.
    pub disk: Option<Disk>,
}

/// A file that becomes an ext4 image.
pub struct Disk {
    /// The file, empty.
    pub file: File,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What a bake says while it goes on.
pub enum Event<'a> {
    /// This step begins.
    Begins(usize),
    /// The disk of this step is there.
    Made(usize),
    /// The step says something.
    Line(&'a str),
}

/// Runs steps one upon the other, on the files of an archive (tar, packed by zstd), for `limit` in all. `lab` is this
/// program; `packages` is the folder of the cache of packages, `log` gets all that they say.
///
/// # Errors
/// The machine lacks something, or a step failed; those before it are done.
pub fn run(
    lab: &Path,
    archive: &Path,
    steps: &[Step],
    packages: &Path,
    log: &Path,
    limit: Duration,
    event: &mut dyn FnMut(Event<'_>),
) -> Result<(), Error> {
    let memory_mib = memory()?;
    let archive = File::open(archive).map_err(failed("open the image's files"))?;
    let (ours, theirs) = UnixStream::pair().map_err(failed("make a socket"))?;
    let mut passed = vec![archive.as_raw_fd(), theirs.as_raw_fd()];
    for step in steps {
        passed.extend(step.files.as_ref().map(AsRawFd::as_raw_fd));
        if let Some(disk) = &step.disk {
            // Its owner is unknown in the namespaces, and its folder is closed for all others.
            disk.file.set_permissions(Permissions::from_mode(0o666)).map_err(failed("prepare a disk"))?;
            passed.push(disk.file.as_raw_fd());
        }
    }
    let plan = InsidePlan {
        archive: archive.as_raw_fd(),
        control: theirs.as_raw_fd(),
        memory_mib,
        steps: steps
            .iter()
            .map(|step| InsideStep {
                script: step.script.clone(),
                environment: step.environment.clone(),
                files: step.files.as_ref().map(AsRawFd::as_raw_fd),
                disk: step.disk.as_ref().map(|disk| (disk.file.as_raw_fd(), disk.bytes)),
            })
            .collect(),
    };
    let plan = serde_json::to_vec(&plan)
        .map_err(|error| failed("say what is to be done")(io::Error::from(error)))?;
    let mut command = Command::new(lab);
    command.arg(INSIDE).current_dir("/");
    // SAFETY: between fork and exec, fcntl(2) is async-signal-safe and touches no memory.
    unsafe {
        child::detach(&mut command, true).pre_exec(move || {
            for descriptor in &passed {
                let descriptor = rustix::fd::BorrowedFd::borrow_raw(*descriptor);
                rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    let cache = Cache::new(packages, Outside::default());
    let mut at = 0;
    let outcome = std::thread::scope(|scope| {
        let served = scope.spawn(move || serve(ours, &cache));
        let outcome = child::run(command, plan.as_slice(), Some(log), limit, &mut |line| {
            let number = |start: &str| line.strip_prefix(start)?.parse::<usize>().ok();
            if let Some(number) = number(BEGINS) {
                at = number;
                event(Event::Begins(number));
            } else if let Some(number) = number(MADE) {
                event(Event::Made(number));
            } else {
                event(Event::Line(line));
            }
        });
        drop(theirs);
        let served = served.join().unwrap_or_else(|_| Err(io::Error::other("its thread ended")));
        outcome.map_err(failed("start the bake")).and_then(|outcome| match (outcome.success(), served) {
            (true, _) => Ok(outcome),
            (false, Err(source)) => Err(failed("map the namespaces' users")(source)),
            (false, Ok(())) => Ok(outcome),
        })
    })?;
    if outcome.success() {
        return Ok(());
    }
    Err(Error::Failed {
        step: steps.get(at).map(|step| step.name.clone()).unwrap_or_default(),
        reason: outcome.describe(limit),
        tail: outcome.tail,
    })
}

/// Memory for the files, in MiB.
fn memory() -> Result<u64, Error> {
    let available = memory::available().map_or(0, |available| available.mib);
    if available < LEAST_MEMORY_MIB {
        return Err(Error::Unavailable(format!(
            "{available} MiB of memory are free, and the files need {LEAST_MEMORY_MIB}"
        )));
    }
    Ok(available / 3 * 2)
}

/// Maps the users of the namespaces, then serves what steps ask of the cache, until the process inside has ended.
fn serve(mut control: UnixStream, cache: &Cache) -> io::Result<()> {
    let mut pid = [0; 4];
    if control.read_exact(&mut pid).is_err() {
        return Ok(()); // it ended, and says why itself
    }
    map(u32::from_ne_bytes(pid))?;
    control.write_all(b"m")?;
    let Some(listener) = take(&control)? else { return Ok(()) };
    loop {
        let mut waits = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&control, PollFlags::IN)];
        match poll(&mut waits, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let [requests, ended] = waits.map(|wait| !wait.revents().is_empty());
        if ended {
            return Ok(());
        }
        if requests && let Ok((connection, _)) = listener.accept() {
            cache.serve(connection);
        }
    }
}

/// Takes the socket that the process inside gives; `None` if it has ended.
fn take(control: &UnixStream) -> io::Result<Option<TcpListener>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(control, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(sockets) = message {
            return Ok(sockets.map(|socket: OwnedFd| TcpListener::from(socket)).next());
        }
    }
    Ok(None)
}

/// Maps users and groups: root's by itself, another user's by the ranges that /etc/subuid and /etc/subgid give him.
fn map(pid: u32) -> io::Result<()> {
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    let names = subordinate_ids::names();
    for (file, name, program, own) in [
        ("uid_map", "/etc/subuid", "newuidmap", user.as_raw()),
        ("gid_map", "/etc/subgid", "newgidmap", group.as_raw()),
    ] {
        let range = subordinate_ids::first(&fs::read_to_string(name).unwrap_or_default(), &names);
        if user.is_root() {
            let first = range.unwrap_or(FIRST_ID);
            fs::write(format!("/proc/{pid}/{file}"), format!("0 {first} {COUNT}\n"))?;
            continue;
        }
        let first =
            range.ok_or_else(|| io::Error::other(format!("{name} gives this user no {COUNT} numbers")))?;
        let map = format!("{pid} 0 {own} 1 1 {first} {}", COUNT - 1);
        let output = Command::new(program).args(map.split(' ')).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(format!("{program}: {said}")));
        }
    }
    Ok(())
}
