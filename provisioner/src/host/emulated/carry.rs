//! Commands that are carried into the emulated host, as seen from outside: same arguments, folder, environment and
//! file mode mask, the terminal if there is one, and the exit status back. The carrier is the system's OpenSSH client;
//! what it would lose (arguments as they are, status 255, the end of an interrupted command) goes through two files.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, IsTerminal, Read},
    os::unix::{ffi::OsStrExt, net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use lab_net::config::Forward;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::{
    Error, State, VERSION,
    files::Files,
    forwards, init, keys,
    machine::{self, Status},
    tools,
};
use crate::{json_file, lock, paths::Paths};

/// File that counts reports, below `LAB_HOME/host`; only touched from inside.
pub const SEQUENCE: &str = "report.sequence";
/// How long an interrupted command may take to put things in order.
const INTERRUPTED_LIMIT: Duration = Duration::from_secs(90);
/// How long the machine may take for a question of ours.
const QUESTION_LIMIT: Duration = Duration::from_secs(30);
/// Variables that mean something else on another machine.
const NOT_CARRIED: [&str; 12] = [
    "XDG_RUNTIME_DIR",
    "SSH_AUTH_SOCK",
    "SSH_CONNECTION",
    "SSH_CLIENT",
    "SSH_TTY",
    "DBUS_SESSION_BUS_ADDRESS",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "NOTIFY_SOCKET",
    "JOURNAL_STREAM",
    "INVOCATION_ID",
    "LAB_HOST",
];

/// A command to be run in the emulated host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub v: u32,
    /// The program and its arguments; none for a report alone.
    pub command: Vec<OsString>,
    /// Folder to run it in.
    pub folder: OsString,
    /// File mode mask.
    pub umask: u32,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Forwards that it will open.
    pub forwards: Vec<Forward>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Exit status, 128 and the signal's number if a signal ended it, or why it could not be started.
    pub ended: Result<u8, String>,
    /// What is running after it.
    pub report: Report,
}

/// What is running in the emulated host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Later reports have greater numbers.
    pub sequence: u64,
    /// Names of the labs that have a process.
    pub labs: Vec<String>,
    /// Forwards of all labs' networks.
    pub forwards: Vec<Forward>,
}

/// What a command wants of the machine.
#[derive(Debug, Clone, Default)]
pub struct Wants {
    /// That it is started, rather than that the command runs outside if it is not.
    pub start: bool,
    /// Ports of the real machine, which are opened before the command runs so that one in use is told first.
    pub forwards: Vec<Forward>,
}

/// What became of a command.
#[derive(Debug)]
pub enum Carried {
    /// It ran in the emulated host, and ended so.
    Ended(u8),
    /// There is no machine, nor will there be one while this file is open: run the command here.
    Here(File),
}

/// Runs a command in the emulated host, then brings forwards and machine to what the labs need: the machine that the
/// first lab started ends with the last.
pub fn run(
    paths: &Paths,
    command: Vec<OsString>,
    wants: Wants,
    say: &mut dyn FnMut(&str),
) -> Result<Carried, Error> {
    let files = Files::new(paths);
    files.create()?;
    let start = machine::lock_start(&files, !wants.start && machine::status(&files) == Status::Stopped, say)?;
    if !wants.start && machine::status(&files) == Status::Stopped {
        return Ok(Carried::Here(start));
    }
    let state = machine::ensure(&files, paths, false, say)?;
    let request = Request {
        v: VERSION,
        command,
        folder: folder()?,
        umask: umask(),
        environment: environment(&files),
        terminal: io::stdin().is_terminal() && io::stdout().is_terminal() && io::stderr().is_terminal(),
        forwards: wants.forwards,
    };
    let written = Written::new(&files, &request)?;
    drop(start);
    forwards::claim(&files, &request.forwards)?;
    let carried = carry(&files, &state, &request, &written);
    drop(written);
    let answer = match carried {
        Ok(answer) => answer,
        Err(error) => return Err(lost(&files, error)),
    };
    let synced = forwards::sync(&files, answer.report.sequence, &answer.report.forwards);
    if answer.report.labs.is_empty() && !state.by_hand {
        stop_if_idle(&files)?;
    } else {
        synced?;
    }
    answer.ended.map(Carried::Ended).map_err(|said| Error::Failed { what: "the emulated host", said })
}

/// What is running in the emulated host.
pub fn report(files: &Files, state: &State) -> Result<Report, Error> {
    let request = Request {
        v: VERSION,
        command: Vec::new(),
        folder: "/".into(),
        umask: umask(),
        environment: environment(files),
        terminal: false,
        forwards: Vec::new(),
    };
    let written = Written::new(files, &request)?;
    let mut ssh = ssh(files, state, false)?;
    ssh.arg(remote_line(files, &["host-carried".as_ref(), written.request.as_os_str()])?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    finish_within(ssh, QUESTION_LIMIT)?;
    written.answer()?.map(|answer| answer.report).ok_or_else(|| Error::Lost(String::new()))
}

/// Tells the machine's first process something.
pub fn order(files: &Files, state: &State, order: &str) -> Result<(), Error> {
    let mut ssh = ssh(files, state, false)?;
    ssh.arg(remote_line(files, &["host-order".as_ref(), order.as_ref()])?);
    ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    finish_within(ssh, QUESTION_LIMIT).map(drop)
}

/// Stops the machine unless a lab runs in it or a command is on its way into it.
fn stop_if_idle(files: &Files) -> Result<(), Error> {
    let _start = machine::lock_start(files, false, &mut |_| ())?;
    let requests = fs::read_dir(files.requests()).into_iter().flatten().flatten();
    if requests.into_iter().any(|entry| lock::is_held(&entry.path())) {
        return Ok(());
    }
    match machine::stop(files, false) {
        // Another command has started a lab in the meantime.
        Ok(_) | Err(Error::LabsRunning(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A request on disk, locked while its command is under way.
struct Written {
    request: PathBuf,
    answer: PathBuf,
    _lock: File,
}

impl Written {
    fn new(files: &Files, request: &Request) -> Result<Self, Error> {
        let io = |source| Error::Io { what: "cannot write a request to the emulated host".into(), source };
        let bytes = serde_json::to_vec(request).map_err(|error| io(error.into()))?;
        // A name that nobody has had: what is remembered of a name in there need not be current.
        let mut file =
            tempfile::Builder::new().prefix("r").suffix(".json").tempfile_in(files.requests()).map_err(io)?;
        rustix::fs::flock(file.as_file(), rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| io(e.into()))?;
        io::Write::write_all(&mut file, &bytes).map_err(io)?;
        let (lock, request) = file.keep().map_err(|error| io(error.error))?;
        Ok(Self { answer: request.with_extension("answer"), request, _lock: lock })
    }

    fn answer(&self) -> Result<Option<Answer>, Error> {
        Ok(json_file::read(&self.answer)?)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.request);
        let _ = fs::remove_file(&self.answer);
    }
}

/// The command line for the shell in there that runs this `lab` with arguments of its own.
fn remote_line(files: &Files, arguments: &[&OsStr]) -> Result<OsString, Error> {
    let lab = std::env::current_exe()
        .map_err(|source| Error::Io { what: "cannot find the lab binary".into(), source })?;
    let mut line = OsString::from("export LAB_HOME=");
    line.push(quoted(files.home.as_os_str()));
    line.push(format!(" XDG_RUNTIME_DIR={}; exec", runtime_folder()));
    for word in [lab.as_os_str()].iter().chain(arguments) {
        line.push(" ");
        line.push(quoted(word));
    }
    Ok(line)
}

/// A word as the shell reads it.
fn quoted(word: &OsStr) -> OsString {
    let mut bytes = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => bytes.extend(b"'\\''"),
            byte => bytes.push(*byte),
        }
    }
    bytes.push(b'\'');
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

/// Carries a request with this process' own standard input and output, until the command ends or this process is told
/// to end.
fn carry(files: &Files, state: &State, request: &Request, written: &Written) -> Result<Answer, Error> {
    let io = |source| Error::Io { what: "cannot wait for the emulated host".into(), source };
    // One byte a signal. In a terminal Ctrl-C goes to the carried command by itself, as a character.
    let (signals, sender) = UnixStream::pair().map_err(io)?;
    signals.set_nonblocking(true).map_err(io)?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let sender = sender.try_clone().map_err(io)?;
        signal_hook::low_level::pipe::register(signal, sender).map_err(io)?;
    }
    let mut command = ssh(files, state, request.terminal)?;
    command.arg(remote_line(files, &["host-carried".as_ref(), written.request.as_os_str()])?);
    let mut ssh =
        command.spawn().map_err(|source| Error::Program { program: command.get_program().into(), source })?;
    let ended = pidfd_open(Pid::from_child(&ssh), PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    loop {
        let mut waits = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut waits, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io(errno.into())),
        }
        let interrupted = drain(&signals);
        if let Some(status) = ssh.try_wait().map_err(io)? {
            if let Some(answer) = written.answer()? {
                return Ok(answer);
            }
            // The connection has ended, the command perhaps not: by Ctrl-C without a terminal, which reaches ssh too.
            let limit = if interrupted || status.signal().is_some() || status.code() == Some(255) {
                INTERRUPTED_LIMIT
            } else {
                Duration::ZERO
            };
            return answer_within(files, written, limit, &signals, status);
        }
        if interrupted {
            // The wrapper in there sees that nobody listens any more, and interrupts the command.
            let _ = rustix::process::kill_process(Pid::from_child(&ssh), Signal::TERM);
        }
    }
}

/// Waits for the answer of a command whose connection has ended, while there is a machine that may give it.
fn answer_within(
    files: &Files,
    written: &Written,
    limit: Duration,
    signals: &UnixStream,
    status: ExitStatus,
) -> Result<Answer, Error> {
    let end = Instant::now() + limit;
    loop {
        let alive = lock::is_held(&files.machine());
        if let Some(answer) = written.answer()? {
            return Ok(answer);
        }
        if !alive || Instant::now() >= end || drain(signals) {
            let how =
                status.code().map_or_else(|| "by a signal".into(), |code| format!("with status {code}"));
            return Err(Error::Lost(format!(" (ssh ended {how})")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a signal has come in.
fn drain(mut signals: &UnixStream) -> bool {
    let mut any = false;
    let mut bytes = [0; 16];
    while signals.read(&mut bytes).is_ok_and(|count| count > 0) {
        any = true;
    }
    any
}

/// Says of a broken connection what is known about the machine.
fn lost(files: &Files, error: Error) -> Error {
    match error {
        Error::Lost(_) if machine::status(files) == Status::Stopped => Error::Lost(", since it ended".into()),
        other => other,
    }
}

/// The SSH client, up to the command. All of them share one connection, whose making costs the emulated processor a
/// second.
fn ssh(files: &Files, state: &State, terminal: bool) -> Result<Command, Error> {
    let program = tools::find("ssh").ok_or(tools::Error::Missing("ssh"))?;
    let mut command = Command::new(program);
    let option = |name: &str, value: &dyn std::fmt::Display| format!("-o{name}={value}");
    let path = |path: PathBuf| escaped(&path);
    command
        .args(["-F", "none", "-e", "none", if terminal { "-tt" } else { "-T" }, "-p"])
        .arg(state.ssh_port.to_string())
        .arg("-i")
        .arg(files.key())
        .arg(option("UserKnownHostsFile", &path(files.known_hosts())))
        .arg(option("GlobalKnownHostsFile", &"none"))
        .arg(option("HostKeyAlias", &keys::HOST_ALIAS))
        .arg(option("HostKeyAlgorithms", &"ssh-ed25519"))
        .arg(option("StrictHostKeyChecking", &"yes"))
        .arg(option("UpdateHostKeys", &"no"))
        .arg(option("IdentitiesOnly", &"yes"))
        .arg(option("IdentityAgent", &"none"))
        .arg(option("PreferredAuthentications", &"publickey"))
        .arg(option("KexAlgorithms", &"curve25519-sha256"))
        .arg(option("BatchMode", &"yes"))
        .arg(option("LogLevel", &"QUIET"))
        .arg(option("ConnectTimeout", &20))
        .arg(option("ServerAliveInterval", &30))
        .arg(option("ControlMaster", &"auto"))
        .arg(option("ControlPath", &path(files.ssh_socket())))
        .arg(option("ControlPersist", &"yes"))
        .arg(format!("{}@127.0.0.1", init::USER));
    Ok(command)
}

/// A path in an option of ssh(1), where `%` begins a token and spaces separate files.
fn escaped(path: &Path) -> String {
    let text = path.display().to_string().replace('%', "%%");
    if text.contains(' ') { format!("\"{text}\"") } else { text }
}

fn finish_within(mut command: Command, limit: Duration) -> Result<ExitStatus, Error> {
    let program = command.get_program().into();
    let mut child: Child = command.spawn().map_err(|source| Error::Program { program, source })?;
    let io = |source| Error::Io { what: "cannot wait for ssh".into(), source };
    match crate::child::wait(&mut child, limit).map_err(io)? {
        Some(status) => Ok(status),
        None => {
            child.kill().and_then(|()| child.wait()).map_err(io)?;
            Err(Error::Lost(format!(" (no answer within {} s)", limit.as_secs())))
        }
    }
}

fn folder() -> Result<OsString, Error> {
    std::env::current_dir()
        .map(Into::into)
        .map_err(|source| Error::Io { what: "cannot find the current folder".into(), source })
}

fn umask() -> u32 {
    // There is no way to read it but to set it; /proc has it since Linux 4.7.
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022)
}

fn environment(files: &Files) -> Vec<(OsString, OsString)> {
    let carried = std::env::vars_os()
        .filter(|(name, _)| !NOT_CARRIED.iter().any(|not| name == not) && name != "LAB_HOME");
    carried
        .chain([
            ("LAB_HOME".into(), files.home.clone().into()),
            ("LAB_HOST".into(), "local".into()),
            ("LAB_CARRIED".into(), "1".into()),
            ("XDG_RUNTIME_DIR".into(), runtime_folder().into()),
        ])
        .collect()
}

/// The folder that init has made in there.
fn runtime_folder() -> String {
    format!("/run/user/{}", rustix::process::getuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME; \"x\" \\ *";
        let mut script = OsString::from("printf %s ");
        script.push(quoted(word.as_ref()));
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
    }

    #[test]
    fn the_environment_says_where_it_is() {
        let files = Files { home: "/h".into(), dir: "/h/host".into(), sockets: "/s".into() };
        let environment = environment(&files);
        let get = |name: &str| {
            let values: Vec<_> = environment.iter().filter(|(n, _)| n == name).map(|(_, v)| v).collect();
            assert!(values.len() <= 1, "{name} is given twice");
            values.first().map(|value| value.to_string_lossy().into_owned())
        };
        assert_eq!(get("LAB_HOST").as_deref(), Some("local"));
        assert_eq!(get("LAB_HOME").as_deref(), Some("/h"));
        assert!(get("XDG_RUNTIME_DIR").unwrap().starts_with("/run/user/"));
        assert!(get("PATH").is_some());
    }

    #[test]
    fn a_request_is_locked_and_then_gone() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { home: dir.path().into(), dir: dir.path().into(), sockets: dir.path().into() };
        fs::create_dir(files.requests()).unwrap();
        let request = Request {
            v: VERSION,
            command: vec!["a b".into(), std::os::unix::ffi::OsStringExt::from_vec(vec![0xff, b'x'])],
            folder: "/".into(),
            umask: 0o27,
            environment: vec![("A".into(), "B".into())],
            terminal: false,
            forwards: Vec::new(),
        };
        let written = Written::new(&files, &request).unwrap();
        assert!(lock::is_held(&written.request));
        assert_eq!(json_file::read(&written.request).unwrap(), Some(request));
        assert_eq!(written.answer().unwrap(), None);
        drop(written);
        assert_eq!(fs::read_dir(files.requests()).unwrap().count(), 0);
    }

    #[test]
    fn options_of_ssh_hold_any_path() {
        assert_eq!(escaped(Path::new("/a/b")), "/a/b");
        assert_eq!(escaped(Path::new("/a b/100%")), "\"/a b/100%%\"");
    }
}
