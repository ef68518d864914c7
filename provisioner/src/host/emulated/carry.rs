//! Commands that are carried into the emulated host, as seen from outside: same arguments, folder, environment and
//! file mode mask, the terminal if there is one, and the exit status back. The carrier of standard input and output is
//! the system's OpenSSH client. What it would lose (arguments as they are, signals, status 255) goes through a file and
//! a TCP connection that comes back from the wrapper in there; its end is the end of the one side for the other.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, IsTerminal, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{ffi::OsStrExt, net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use lab_net::config::Forward;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::{
    Error, State, VERSION,
    files::Files,
    forwards, init, keys,
    machine::{self, Status},
    supervisor::die_with_us,
    tools,
};
use crate::{lock, paths::Paths};

/// File that counts reports, below `LAB_HOME/host`; only touched from inside.
pub const SEQUENCE: &str = "report.sequence";
/// How long the last of a command's output may take.
const OUTPUT_LIMIT: Duration = Duration::from_secs(10);
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
    /// Port of the real machine's 127.0.0.1 where signals come from and the answer is expected.
    pub port: u16,
    /// What has to be said there first.
    pub token: String,
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
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal() && io::stderr().is_terminal();
    let (line, request) = request(&files, command, wants.forwards, terminal)?;
    let written = Written::new(&files, &request)?;
    drop(start);
    forwards::claim(&files, &request.forwards)?;
    let mut ssh = ssh(&files, &state, terminal)?;
    if !terminal {
        // Ctrl-C is for us: ssh would end, and with it the rest of the command's output. Outside of the terminal's
        // process group it may not read from the terminal.
        ssh.process_group(0).stdin(if io::stdin().is_terminal() { Stdio::piped() } else { Stdio::inherit() });
    }
    let carried = carry(&files, ssh, &written, line, None);
    drop(written);
    let answer = match carried {
        Ok(answer) => answer,
        Err(error) => {
            // A machine that was started for this command alone must not stay; whatever else is wrong with it is
            // the next command's to find.
            if !state.by_hand {
                let _ = stop_if_idle(&files);
            }
            return Err(error);
        }
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
    let (line, request) = request(files, Vec::new(), Vec::new(), false)?;
    let written = Written::new(files, &request)?;
    let mut ssh = ssh(files, state, false)?;
    ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(carry(files, ssh, &written, line, Some(QUESTION_LIMIT))?.report)
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
    path: PathBuf,
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
        file.write_all(&bytes).map_err(io)?;
        let (lock, path) = file.keep().map_err(|error| io(error.error))?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
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

/// A request, and the line on which its wrapper will call back.
fn request(
    files: &Files,
    command: Vec<OsString>,
    forwards: Vec<Forward>,
    terminal: bool,
) -> Result<(Line, Request), Error> {
    let io = |source| Error::Io { what: "cannot make a line to the emulated host".into(), source };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    let port = listener.local_addr().map_err(io)?.port();
    let mut bytes = [0; 16];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes)).map_err(io)?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = Line { listener, token: token.clone(), stream: None, input: Vec::new() };
    let request = Request {
        v: VERSION,
        command,
        folder: folder()?,
        umask: umask(),
        environment: environment(files),
        terminal,
        forwards,
        port,
        token,
    };
    Ok((line, request))
}

/// Where the wrapper calls back.
struct Line {
    listener: TcpListener,
    token: String,
    /// The connection, once the token has been said.
    stream: Option<TcpStream>,
    input: Vec<u8>,
}

/// What has come in on a line.
enum Heard {
    /// Nothing whole yet.
    Nothing,
    /// The answer.
    Answer(Box<Answer>),
    /// The other side is gone.
    End,
}

impl Line {
    /// What to wait for.
    fn waits(&self) -> BorrowedFd<'_> {
        self.stream.as_ref().map_or(self.listener.as_fd(), |stream| stream.as_fd())
    }

    /// Takes what has come in.
    fn hear(&mut self) -> Result<Heard, Error> {
        let io = |source| Error::Io { what: "cannot hear of the emulated host".into(), source };
        let Some(stream) = &mut self.stream else {
            let Ok((mut stream, _)) = self.listener.accept() else { return Ok(Heard::Nothing) };
            // Anybody on this machine may call; who does not know the token is hung up on.
            let mut said = vec![0; self.token.len() + 1];
            let known = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(Duration::from_secs(1))))
                .and_then(|()| stream.read_exact(&mut said))
                .is_ok_and(|()| said == format!("{}\n", self.token).as_bytes());
            if known {
                stream.set_nonblocking(true).map_err(io)?;
                self.stream = Some(stream);
            }
            return Ok(Heard::Nothing);
        };
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => return Ok(Heard::End),
                Ok(count) => {
                    self.input.extend(bytes.get(..count).unwrap_or_default());
                    if self.input.ends_with(b"\n") {
                        let answer = serde_json::from_slice(&self.input).map_err(|error| io(error.into()))?;
                        return Ok(Heard::Answer(Box::new(answer)));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(Heard::End),
            }
        }
    }

    /// Passes a signal on. Before there is a connection there is no command to be told.
    fn signal(&mut self, signal: i32) -> bool {
        self.stream.as_mut().is_some_and(|stream| writeln!(stream, "{signal}").is_ok())
    }
}

/// Carries a request until its command has ended, or for `limit`. Signals to this process go to the command.
fn carry(
    files: &Files,
    mut command: Command,
    written: &Written,
    mut line: Line,
    limit: Option<Duration>,
) -> Result<Answer, Error> {
    let io = |source| Error::Io { what: "cannot wait for the emulated host".into(), source };
    // One byte a signal. In a terminal Ctrl-C goes to the carried command by itself, as a character.
    let mut signals = Vec::new();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let (receiver, sender) = UnixStream::pair().map_err(io)?;
        receiver.set_nonblocking(true).map_err(io)?;
        signal_hook::low_level::pipe::register(signal, sender).map_err(io)?;
        signals.push((signal, receiver));
    }
    command.arg(remote_line(files, &["host-carried".as_ref(), written.path.as_os_str()])?);
    let mut ssh = die_with_us(&mut command)
        .spawn()
        .map_err(|source| Error::Program { program: command.get_program().into(), source })?;
    if let Some(mut input) = ssh.stdin.take() {
        // It ends with this process, if not before.
        std::thread::spawn(move || io::copy(&mut io::stdin(), &mut input));
    }
    let result = converse(files, &mut ssh, &mut line, &signals, limit);
    // Its output has been passed on, or there is nobody to pass it on for.
    let ended = crate::child::wait(&mut ssh, if result.is_ok() { OUTPUT_LIMIT } else { Duration::ZERO });
    if !matches!(ended, Ok(Some(_))) {
        ssh.kill().and_then(|()| ssh.wait()).map_err(io)?;
    }
    result
}

fn converse(
    files: &Files,
    ssh: &mut Child,
    line: &mut Line,
    signals: &[(i32, UnixStream)],
    limit: Option<Duration>,
) -> Result<Answer, Error> {
    let io = |source| Error::Io { what: "cannot wait for the emulated host".into(), source };
    let ended = pidfd_open(Pid::from_child(ssh), PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    let stdout = io::stdout();
    let mut end = limit.map(|limit| Instant::now() + limit);
    let mut ssh_ended = None;
    let mut unread = false;
    loop {
        let mut waits = vec![PollFd::from_borrowed_fd(line.waits(), PollFlags::IN)];
        waits.extend(signals.iter().map(|(_, receiver)| PollFd::new(receiver, PollFlags::IN)));
        if ssh_ended.is_none() {
            waits.push(PollFd::new(&ended, PollFlags::IN));
        }
        // Nobody may read our output any more, which ssh does not tell the other side.
        if !unread {
            waits.push(PollFd::new(&stdout, PollFlags::empty()));
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        match poll(&mut waits, timeout.as_ref()) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Err(lost(files, ssh_ended)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io(errno.into())),
        }
        let closed = waits.last().is_some_and(|wait| wait.revents().contains(PollFlags::ERR));
        match line.hear()? {
            Heard::Answer(answer) => return Ok(*answer),
            Heard::End => return Err(lost(files, ssh_ended)),
            Heard::Nothing => {}
        }
        for (signal, receiver) in signals {
            if drain(receiver) {
                if !line.signal(*signal) {
                    return Err(Error::Interrupted);
                }
                end.get_or_insert_with(|| Instant::now() + INTERRUPTED_LIMIT);
            }
        }
        if !unread && closed {
            unread = true;
            line.signal(signal_hook::consts::SIGPIPE);
        }
        if ssh_ended.is_none()
            && let Some(status) = ssh.try_wait().map_err(io)?
        {
            ssh_ended = Some(status);
            // The answer may be on its way; and Ctrl-C without a terminal reaches ssh too.
            let limit = if line.stream.is_some() { INTERRUPTED_LIMIT } else { Duration::from_secs(1) };
            end.get_or_insert_with(|| Instant::now() + limit);
        }
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

/// Says of a broken connection what is known about it.
fn lost(files: &Files, ssh: Option<ExitStatus>) -> Error {
    Error::Lost(match (machine::status(files), ssh.and_then(|status| status.code())) {
        (Status::Stopped, _) => ", since it ended".into(),
        (_, Some(code)) => format!(" (ssh ended with status {code})"),
        _ => String::new(),
    })
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
    use crate::json_file;

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
            port: 1,
            token: "x".into(),
        };
        let written = Written::new(&files, &request).unwrap();
        assert!(lock::is_held(&written.path));
        assert_eq!(json_file::read(&written.path).unwrap(), Some(request));
        drop(written);
        assert_eq!(fs::read_dir(files.requests()).unwrap().count(), 0);
    }

    #[test]
    fn only_who_knows_the_token_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { home: dir.path().into(), dir: dir.path().into(), sockets: dir.path().into() };
        let (mut line, request) = request(&files, Vec::new(), Vec::new(), false).unwrap();
        let call = |token: &str| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, request.port)).unwrap();
            writeln!(stream, "{token}").unwrap();
            stream
        };
        let wait =
            |line: &Line| poll(&mut [PollFd::from_borrowed_fd(line.waits(), PollFlags::IN)], None).unwrap();
        let stranger = call("0123456789abcdef0123456789abcdef");
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing) && !line.signal(15));
        drop(stranger);
        let mut wrapper = call(&request.token);
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing) && line.signal(15));
        let answer = Answer { ended: Ok(7), report: Report { labs: vec!["a".into()], ..Report::default() } };
        let text = serde_json::to_string(&answer).unwrap();
        let (begin, end) = text.split_at(5);
        wrapper.write_all(begin.as_bytes()).unwrap();
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing));
        writeln!(wrapper, "{end}").unwrap();
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Answer(it) if *it == answer));
        drop(wrapper);
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::End));
    }

    #[test]
    fn options_of_ssh_hold_any_path() {
        assert_eq!(escaped(Path::new("/a/b")), "/a/b");
        assert_eq!(escaped(Path::new("/a b/100%")), "\"/a b/100%%\"");
    }
}
