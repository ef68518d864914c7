//! Commands that are carried into the emulated host, as seen from outside: same arguments, folder, environment and
//! file mode mask, the terminal if there is one, and the exit status back. The carrier of standard input and output is
//! the system's OpenSSH client. What it would lose (arguments as they are, signals, status 255) goes through a file and
//! a TCP connection that comes back from the wrapper in there; its end is the end of the one side for the other.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, IsTerminal, Read},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use lab_net::config::Forward;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{
    Error, State,
    files::Files,
    forwards,
    line::{Heard, Line},
    machine::{self, Status, Wanted},
    request::{Answer, Report, Request, Written},
    ssh,
    supervisor::die_with_us,
};
use crate::{lock, paths::Paths, progress::Progress};

/// File that counts reports, below `LAB_HOME/host`; only touched from inside.
pub const SEQUENCE: &str = "report.sequence";
/// How long an interrupted command may take to put things in order.
const INTERRUPTED_LIMIT: Duration = Duration::from_secs(90);
/// How long the machine may take for a question of ours.
const QUESTION_LIMIT: Duration = Duration::from_secs(30);

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
    progress: &Progress,
) -> Result<Carried, Error> {
    let files = Files::new(paths);
    files.create()?;
    // A line that stays, and a task until the next one: each may take minutes.
    let mut task = None;
    let say = &mut |line: &str| {
        progress.say(line);
        task = Some(progress.begin("host", line));
    };
    let start = machine::lock_start(&files, !wants.start && machine::status(&files) == Status::Stopped, say)?;
    if !wants.start && machine::status(&files) == Status::Stopped {
        return Ok(Carried::Here(start));
    }
    let state = machine::ensure(&files, paths, Wanted::default(), say)?;
    drop(task);
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal() && io::stderr().is_terminal();
    let line = Line::new()?;
    let mut request = Request::new(&files, command, line.port, line.token.clone())?;
    (request.terminal, request.forwards) = (terminal, wants.forwards);
    let written = Written::new(&files, &request)?;
    drop(start);
    let mut ssh = ssh::client(&files, &state, terminal)?;
    if !terminal {
        // Ctrl-C is for us: ssh would end, and with it the rest of the command's output. Outside of the terminal's
        // process group it may not read from the terminal.
        ssh.process_group(0).stdin(if io::stdin().is_terminal() { Stdio::piped() } else { Stdio::inherit() });
    }
    let carried =
        forwards::claim(&files, &request.forwards).and_then(|()| carry(&files, ssh, &written, line, None));
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
    let line = Line::new()?;
    let request = Request::new(files, Vec::new(), line.port, line.token.clone())?;
    let written = Written::new(files, &request)?;
    let mut ssh = ssh::client(files, state, false)?;
    ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(carry(files, ssh, &written, line, Some(QUESTION_LIMIT))?.report)
}

/// Tells the machine's first process something.
pub fn order(files: &Files, state: &State, order: &str) -> Result<(), Error> {
    let mut ssh = ssh::client(files, state, false)?;
    ssh.arg(ssh::command_line(files, &["host-order".as_ref(), order.as_ref()])?);
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
    command.arg(ssh::command_line(files, &["host-carried".as_ref(), written.path.as_os_str()])?);
    let mut ssh = die_with_us(&mut command)
        .spawn()
        .map_err(|source| Error::Program { program: command.get_program().into(), source })?;
    if let Some(mut input) = ssh.stdin.take() {
        // It ends with this process, if not before.
        std::thread::spawn(move || io::copy(&mut io::stdin(), &mut input));
    }
    // Opened while there is such a process: it may end, and be waited for, before its answer has been read.
    let ended = pidfd_open(Pid::from_child(&ssh), PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    let result = converse(files, &mut ssh, &ended, &mut line, &signals, limit);
    if result.is_ok() && limit.is_none() {
        finish_output(&ended, &signals)?;
    }
    // It may have ended by itself.
    ssh.kill().and_then(|()| ssh.wait()).map_err(io)?;
    result
}

/// Waits until the last of a command's output has been passed on, as slowly as it may be read, or until a signal.
fn finish_output(ended: &OwnedFd, signals: &[(i32, UnixStream)]) -> Result<(), Error> {
    let io =
        |errno: rustix::io::Errno| Error::Io { what: "cannot wait for ssh".into(), source: errno.into() };
    let mut waits = vec![PollFd::new(ended, PollFlags::IN)];
    waits.extend(signals.iter().map(|(_, receiver)| PollFd::new(receiver, PollFlags::IN)));
    loop {
        match poll(&mut waits, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io(errno)),
        }
    }
}

fn converse(
    files: &Files,
    ssh: &mut Child,
    ended: &OwnedFd,
    line: &mut Line,
    signals: &[(i32, UnixStream)],
    limit: Option<Duration>,
) -> Result<Answer, Error> {
    let io = |source| Error::Io { what: "cannot wait for the emulated host".into(), source };
    let stdout = io::stdout();
    let mut end = limit.map(|limit| Instant::now() + limit);
    let mut ssh_ended = None;
    let mut unread = false;
    loop {
        let mut waits = vec![PollFd::from_borrowed_fd(line.waits(), PollFlags::IN)];
        waits.extend(signals.iter().map(|(_, receiver)| PollFd::new(receiver, PollFlags::IN)));
        if ssh_ended.is_none() {
            waits.push(PollFd::new(ended, PollFlags::IN));
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
            let limit = if line.is_open() { INTERRUPTED_LIMIT } else { Duration::from_secs(1) };
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
