//! Start and stop of the emulated host. The truth about it is the lock of its file: held by the supervisor and by QEMU
//! while there is a machine, with the machine's state as its content once commands can come in.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    Error, State, VERSION, carry,
    files::{Files, lock_within},
    init::InitConfig,
    kernel, keys, qmp,
    supervisor::{self, START_LIMIT},
    tools::Tools,
};
use crate::{child, json_file, lock, paths::Paths};

/// Least memory that the machine starts with, in MiB.
pub const LEAST_MEMORY_MIB: u64 = 1536;
/// Memory that the real machine keeps, in MiB.
pub const RESERVE_MIB: u64 = 1024;
/// How long the machine may take to end by itself.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long another command may take to start or stop the machine, or may use `LAB_HOME` without it (it may be fetching
/// an image).
const LOCK_LIMIT: Duration = Duration::from_secs(900);

/// What a machine that is started is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// The user starts it, who will also stop it.
    pub by_hand: bool,
    /// With AVX2.
    pub avx2: bool,
}

/// How the machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// There is none.
    Stopped,
    /// There is one, and commands can't come in yet.
    Starting,
    /// Commands can come in.
    Running(State),
}

/// How the machine is.
pub fn status(files: &Files) -> Status {
    if !lock::is_held(&files.machine()) {
        return Status::Stopped;
    }
    let state: Option<State> =
        fs::read(files.machine()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match state {
        Some(state) if state.v == VERSION => Status::Running(state),
        _ => Status::Starting,
    }
}

/// Takes the lock of starting and stopping. Shared, it keeps the machine from being started.
pub fn lock_start(files: &Files, shared: bool, say: &mut dyn FnMut(&str)) -> Result<File, Error> {
    let path = files.start_lock();
    lock_within(&path, shared, LOCK_LIMIT, || say("waiting for another lab command"))
        .map_err(|source| Error::Io { what: format!("cannot lock {}", path.display()), source })?
        .ok_or(Error::Busy("starts or stops the emulated host"))
}

/// Starts the machine where it is not running. One that runs has AVX2 if that is wanted, or it is an error. The caller
/// holds the lock of [`lock_start`].
pub fn ensure(
    files: &Files,
    paths: &Paths,
    wanted: Wanted,
    say: &mut dyn FnMut(&str),
) -> Result<State, Error> {
    let end = Instant::now() + START_LIMIT;
    loop {
        match status(files) {
            Status::Running(_) if wanted.avx2 && !has_avx2(files)? => return Err(Error::WithoutAvx2),
            Status::Running(state) => return Ok(state),
            Status::Stopped => return start(files, paths, wanted, say),
            // Whoever started it has gone; it is still coming up, or going down.
            Status::Starting if Instant::now() < end => thread::sleep(Duration::from_millis(50)),
            Status::Starting => {
                let reason = format!("it has been starting for {} s", START_LIMIT.as_secs());
                return Err(Error::Start { reason, logs: files.dir.clone() });
            }
        }
    }
}

/// Whether the machine that runs has AVX2.
fn has_avx2(files: &Files) -> Result<bool, Error> {
    Ok(json_file::read::<supervisor::Config>(&files.supervisor())?.is_some_and(|config| config.avx2))
}

fn start(files: &Files, paths: &Paths, wanted: Wanted, say: &mut dyn FnMut(&str)) -> Result<State, Error> {
    let tools = Tools::find()?;
    let memory_mib = memory()?;
    let authorized_key = keys::prepare(files, &tools)?;
    let kernel = match kernel::open(&files.kernel()) {
        Some(kernel) => kernel,
        None => {
            say("fetching the emulated host's kernel, once");
            kernel::prepare(&files.kernel())?
        }
    };
    let lab = std::env::current_exe()
        .map_err(|source| Error::Io { what: "cannot find the lab binary".into(), source })?;
    for path in [&lab, &files.init()] {
        command_line_can_hold(path)?;
    }
    let module = |name: &String| kernel::module(&files.kernel(), name);
    let init = InitConfig {
        first: kernel.first.iter().map(module).collect(),
        later: kernel.later.iter().map(module).collect(),
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        host_key: files.host_key(),
        authorized_key,
        dropbear: tools.dropbear.clone(),
        log: files.log("dropbear"),
        writable: vec![files.home.clone()],
    };
    json_file::write(&files.init(), &init)?;
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get());
    let config = supervisor::Config {
        virtiofsd: tools.virtiofsd,
        qemu: tools.qemu,
        lab: lab.clone(),
        cpus,
        memory_mib,
        by_hand: wanted.by_hand,
        avx2: wanted.avx2,
    };
    json_file::write(&files.supervisor(), &config)?;
    forget(files);
    say("starting the emulated host");
    let mut command = Command::new(lab);
    command
        .arg("host-supervise")
        .env("LAB_HOME", paths.home())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log(&files.log("supervisor"))?);
    let mut supervisor = child::detach(&mut command, false)
        .spawn()
        .map_err(|source| Error::Program { program: command.get_program().into(), source })?;
    // It says one line within its own limit, and then nothing more.
    let mut line = String::new();
    if let Some(pipe) = supervisor.stdout.take() {
        let read = BufReader::new(pipe.take(4096)).read_line(&mut line);
        read.map_err(|source| Error::Io { what: "cannot hear of the emulated host".into(), source })?;
    }
    match (line.trim(), status(files)) {
        ("ready", Status::Running(state)) => Ok(state),
        (said, _) => {
            let reason =
                if said.is_empty() || said == "ready" { "its supervisor ended" } else { said }.into();
            Err(Error::Start { reason, logs: files.dir.clone() })
        }
    }
}

/// Removes what belonged to the last machine.
fn forget(files: &Files) {
    for path in [files.ssh_socket(), files.forwards_lock(), files.dir.join(carry::SEQUENCE)] {
        let _ = fs::remove_file(path);
    }
    for entry in fs::read_dir(files.requests()).into_iter().flatten().flatten() {
        // A request that is locked is of a command that waits for this machine.
        if !lock::is_held(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn log(path: &Path) -> Result<File, Error> {
    File::create(path)
        .map_err(|source| Error::Io { what: format!("cannot write {}", path.display()), source })
}

/// A path goes into the kernel's command line between quotes.
fn command_line_can_hold(path: &Path) -> Result<(), Error> {
    match path.to_str() {
        Some(text) if !text.contains(['"', '=', '\n']) && !text.ends_with(" (deleted)") => Ok(()),
        _ => Err(Error::Path(path.into())),
    }
}

/// Memory for the machine in MiB: what is free, less a reserve. It is taken page by page, as it is used.
fn memory() -> Result<u64, Error> {
    let available = crate::memory::available().map_or(0, |available| available.mib);
    let memory = available.saturating_sub(RESERVE_MIB);
    if memory < LEAST_MEMORY_MIB {
        return Err(Error::Memory { needed: LEAST_MEMORY_MIB, reserve: RESERVE_MIB, available });
    }
    Ok(memory)
}

/// Stops the machine; false if there was none. Labs in it are an error unless `force`. The caller holds the lock of
/// [`lock_start`].
pub fn stop(files: &Files, force: bool) -> Result<bool, Error> {
    let state = match status(files) {
        Status::Stopped => return Ok(false),
        Status::Starting => None,
        Status::Running(state) => Some(state),
    };
    if let Some(state) = &state {
        // A machine that does not answer has no labs that could be saved.
        match carry::report(files, state) {
            Ok(report) if !report.labs.is_empty() && !force => return Err(Error::LabsRunning(report.labs)),
            Ok(_) => drop(carry::order(files, state, "stop")),
            Err(_) => {}
        }
        if state_is_gone(files, STOP_LIMIT) {
            return Ok(true);
        }
    }
    if let Ok(mut qmp) = qmp::Qmp::connect(&files.qmp_socket())
        && qmp.quit().is_ok()
        && state_is_gone(files, STOP_LIMIT)
    {
        return Ok(true);
    }
    let pid = state.as_ref().map_or(0, |state| state.pid);
    if let Some(supervisor) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && lock::is_held(&files.machine())
        && is_ours(pid)
    {
        // Its children die with it. It may have ended by itself just now.
        let _ = kill_process(supervisor, Signal::KILL);
    }
    if state_is_gone(files, STOP_LIMIT) { Ok(true) } else { Err(Error::DoesNotStop(pid)) }
}

fn state_is_gone(files: &Files, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while lock::is_held(&files.machine()) {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Whether a process id is of a supervisor of this user: the lock says that it lives, this that the id is not stale.
fn is_ours(pid: u32) -> bool {
    let folder = format!("/proc/{pid}");
    let line = fs::read(format!("{folder}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"host-supervise")
        && fs::metadata(folder).is_ok_and(|data| data.uid() == rustix::process::getuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path) -> Files {
        Files { home: dir.into(), dir: dir.into(), sockets: dir.into() }
    }

    #[test]
    fn only_a_lock_makes_a_machine() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let state = State { v: VERSION, pid: 1, ssh_port: 2, cpus: 3, memory_mib: 4, by_hand: false };
        // The state of a machine that was killed.
        fs::write(files.machine(), serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(status(&files), Status::Stopped);
        let held = lock::try_lock(&files.machine()).unwrap().unwrap();
        assert_eq!(status(&files), Status::Running(state));
        held.set_len(0).unwrap();
        assert_eq!(status(&files), Status::Starting);
        drop(held);
        assert_eq!(status(&files), Status::Stopped);
        assert!(!stop(&files, false).unwrap());
    }

    #[test]
    fn what_was_left_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        fs::create_dir(files.requests()).unwrap();
        let (left, waiting) = (files.requests().join("left.json"), files.requests().join("waiting.json"));
        fs::write(&left, "{}").unwrap();
        fs::write(files.ssh_socket(), "").unwrap();
        let _held = lock::try_lock(&waiting).unwrap().unwrap();
        forget(&files);
        assert!(!left.exists() && !files.ssh_socket().exists() && waiting.exists());
    }

    #[test]
    fn paths_that_a_command_line_cannot_hold_are_refused() {
        command_line_can_hold(Path::new("/home/me/my lab/lab")).unwrap();
        for path in ["/a\"b", "/a=b", "/a\nb", "/target/lab (deleted)"] {
            assert!(matches!(command_line_can_hold(Path::new(path)), Err(Error::Path(_))), "{path}");
        }
    }

    #[test]
    fn a_stale_process_id_is_not_ours() {
        assert!(!is_ours(std::process::id()));
        assert!(!is_ours(0));
    }
}
