//! A carried command, as seen from inside the emulated host: started as it was asked for outside, given the signals
//! that its other half gets there, ended with it, and its end reported with what runs after it.

use std::{
    ffi::OsString,
    io::{self, Read, Seek, Write},
    net::TcpStream,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use lab_net::config::Forward;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open},
};

use super::{
    Error, VERSION,
    carry::SEQUENCE,
    files::{Files, lock_within},
    init, orders,
    request::{Answer, Report, Request},
};
use crate::{
    control, json_file,
    paths::Paths,
    state::{self, LabState},
};

/// How long an interrupted command may take before it is told more firmly, and for how long then.
const LIMITS: [(Signal, Duration); 3] = [
    (Signal::INT, Duration::from_secs(60)),
    (Signal::TERM, Duration::from_secs(10)),
    (Signal::KILL, Duration::from_secs(10)),
];

/// Runs the request of a file and sends the answer to who made it.
pub fn run(path: &Path) -> Result<u8, Error> {
    // What has changed outside since the last command must be seen.
    orders::order("refresh")
        .map_err(|source| Error::Io { what: "cannot reach the first process".into(), source })?;
    let request: Request =
        json_file::read(path)?.ok_or_else(|| Error::Lost(", since its request is gone".into()))?;
    let io = |source| Error::Io { what: "cannot call back".into(), source };
    let mut line = TcpStream::connect((init::GATEWAY, request.port)).map_err(io)?;
    writeln!(line, "{}", request.token).map_err(io)?;
    let mut ended = Ok(0);
    if request.v != VERSION {
        ended =
            Err("it was started by another version of lab: `lab host stop` it, then run the command again"
                .into());
    } else if let Some((program, arguments)) = request.command.split_first() {
        ended = execute(&request, program, arguments, &line).map_err(|error| error.to_string());
    }
    let report = report(&Paths::from_env()?)?;
    let status = *ended.as_ref().unwrap_or(&1);
    let answer = serde_json::to_string(&Answer { ended, report }).map_err(|error| io(error.into()))?;
    // Who is gone does not need it.
    let _ = writeln!(line, "{answer}");
    Ok(status)
}

fn execute(
    request: &Request,
    program: &OsString,
    arguments: &[OsString],
    line: &TcpStream,
) -> Result<u8, Error> {
    let folder = PathBuf::from(&request.folder);
    if !folder.is_dir() {
        return Err(Error::Folder(folder));
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(request.umask));
    // In a terminal, its signals come to the command by themselves, and must not end this process before it.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGQUIT, signal_hook::consts::SIGHUP] {
        // SAFETY: the handler does nothing, so it is async-signal-safe. Unlike "ignore", it is not inherited.
        unsafe { signal_hook::low_level::register(signal, || ()) }
            .map_err(|source| Error::Io { what: "cannot handle signals".into(), source })?;
    }
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).env_clear().envs(request.environment.iter().cloned());
    if !request.terminal {
        command.process_group(0);
    }
    let mut child = command.spawn().map_err(|source| Error::Program { program: program.into(), source })?;
    wait(&mut child, !request.terminal, line)
}

/// Waits for the command's end, and passes signals on that come in on the line. When the line ends, whoever ran the
/// command is gone, and it is ended.
fn wait(child: &mut Child, own_group: bool, mut line: &TcpStream) -> Result<u8, Error> {
    let io = |source| Error::Io { what: "cannot wait for the command".into(), source };
    line.set_nonblocking(true).map_err(io)?;
    let pid = Pid::from_child(child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| io(e.into()))?;
    // It may have ended just now, which is no error. A command in a terminal shares our group.
    let kill = |signal| {
        let _ = if own_group { kill_process_group(pid, signal) } else { kill_process(pid, signal) };
    };
    let mut limits = LIMITS.into_iter();
    let mut end: Option<Instant> = None;
    let mut input = Vec::new();
    loop {
        if let Some(status) = child.try_wait().map_err(io)? {
            line.set_nonblocking(false).map_err(io)?;
            let signal = status.signal().and_then(|signal| u8::try_from(signal).ok());
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.unwrap_or_else(|| signal.unwrap_or(0).saturating_add(128)));
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let Some((signal, limit)) = limits.next() else {
                return Err(Error::Failed { what: "the command", said: "it cannot be ended".into() });
            };
            kill(signal);
            end = Some(Instant::now() + limit);
            continue;
        }
        let mut waits = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&line, PollFlags::IN)];
        let watched = if end.is_none() { 2 } else { 1 };
        let timeout = left.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        match poll(waits.get_mut(..watched).unwrap_or_default(), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io(errno.into())),
        }
        if end.is_none() {
            match signals(&mut line, &mut input) {
                Some(signals) => signals.into_iter().for_each(kill),
                None => end = Some(Instant::now()),
            }
        }
    }
}

/// The signals that have come in on a line, one number a line of text; `None` at its end.
fn signals(line: &mut impl Read, input: &mut Vec<u8>) -> Option<Vec<Signal>> {
    let mut bytes = [0; 64];
    let mut found = Vec::new();
    loop {
        match line.read(&mut bytes) {
            Ok(0) => return None,
            Ok(count) => input.extend(bytes.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
        let text: Vec<u8> = input.drain(..=end).collect();
        let number = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
        found.extend(number.and_then(Signal::from_named_raw));
    }
    Some(found)
}

/// What is running, numbered.
fn report(paths: &Paths) -> Result<Report, Error> {
    let path = Files::new(paths).dir.join(SEQUENCE);
    let io = |source| Error::Io { what: format!("cannot use {}", path.display()), source };
    // The number is taken before looking, so that what a greater number saw is not older.
    let mut lock = lock_within(&path, false, Duration::from_secs(30), || ())
        .map_err(io)?
        .ok_or(Error::Busy("reports what runs in the emulated host"))?;
    let mut text = String::new();
    lock.read_to_string(&mut text).map_err(io)?;
    let sequence = text.trim().parse::<u64>().unwrap_or(0).saturating_add(1);
    lock.rewind().and_then(|()| write!(lock, "{sequence}")).map_err(io)?;

    let mut report = Report { sequence, ..Report::default() };
    for name in state::labs(paths) {
        let lab = paths.lab(&name);
        if state::is_running(&lab) {
            report.labs.push(name);
        }
        if state::net_is_running(&lab) {
            // A network that is too busy to answer has the forwards that are recorded.
            report.forwards.extend(match control::net_status(&lab.net_control()) {
                Ok(status) => status.forwards,
                Err(_) => LabState::read(&lab).ok().flatten().map_or(Vec::new(), |lab| lab.all_forwards()),
            });
        }
    }
    for address in addresses(&report.forwards) {
        orders::order(&format!("address {address}"))
            .map_err(|source| Error::Io { what: format!("cannot listen on {address}"), source })?;
    }
    Ok(report)
}

/// Addresses of the real machine's that forwards listen on, which the emulated one does not have by itself.
fn addresses(forwards: &[Forward]) -> Vec<std::net::Ipv4Addr> {
    let mut found: Vec<_> = forwards
        .iter()
        .map(|forward| forward.bind)
        .filter(|bind| !bind.is_loopback() && !bind.is_unspecified() && *bind != init::ADDRESS)
        .collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script as a carried command; `outside` is given the other end of its line.
    fn carried(script: &str, outside: impl FnOnce(TcpStream) + Send) -> u8 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let line = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        let mut child = Command::new("sh").args(["-c", script]).process_group(0).spawn().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || outside(other));
            let status = wait(&mut child, true, &line).unwrap();
            drop(line);
            status
        })
    }

    #[test]
    fn a_command_s_end_is_told() {
        // Kept open: a line that ends is the next test's.
        let status = |script: &str| {
            let (sender, kept) = std::sync::mpsc::channel();
            let status = carried(script, move |line| sender.send(line).unwrap());
            drop(kept);
            status
        };
        assert_eq!(status("exit 0"), 0);
        assert_eq!(status("exit 255"), 255);
        assert_eq!(status("kill -TERM $$"), 128 + 15);
    }

    #[test]
    fn signals_and_the_line_s_end_reach_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = dir.path().join("waiting");
        // The file says that the trap is set. A shell can't trap what was ignored when the tests were started.
        let trap = format!("trap 'exit 7' INT; touch {}; while :; do sleep 0.02; done", waiting.display());
        std::fs::write(dir.path().join("script"), trap).unwrap();
        let script = format!("exec env --default-signal=INT sh {}/script", dir.path().display());
        let set = || {
            let end = Instant::now() + Duration::from_secs(20);
            while !waiting.exists() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let status = carried(&script, |mut line| {
            set();
            writeln!(line, "2").unwrap();
            // Until the command's side ends.
            let _ = line.read(&mut [0]);
        });
        assert_eq!(status, 7);
        std::fs::remove_file(&waiting).unwrap();
        let status = carried(&script, |line| {
            set();
            drop(line);
        });
        assert_eq!(status, 7);
    }

    #[test]
    fn signals_are_numbers() {
        let mut input = b"1".to_vec();
        assert_eq!(signals(&mut &b""[..], &mut input), None);
        struct Open<'a>(&'a [u8]);
        impl Read for Open<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                match self.0.read(buffer)? {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    count => Ok(count),
                }
            }
        }
        let found = signals(&mut Open(b"5\n2\nrubbish\n9999\n1"), &mut input).unwrap();
        assert_eq!(found, [Signal::TERM, Signal::INT]);
        assert_eq!(input, b"1");
    }

    #[test]
    fn addresses_are_those_of_the_real_machine() {
        let forward = |bind: [u8; 4]| Forward {
            bind: bind.into(),
            host_port: 1,
            guest_ip: [10, 0, 0, 1].into(),
            guest_port: 1,
            protocol: lab_net::config::Protocol::Tcp,
        };
        let all =
            [forward([127, 0, 0, 1]), forward([0; 4]), forward([192, 168, 7, 1]), forward([192, 168, 7, 1])];
        assert_eq!(addresses(&all), [std::net::Ipv4Addr::new(192, 168, 7, 1)]);
    }
}
