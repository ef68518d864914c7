//! One command, watched: what it prints is passed on as it comes, and it is stopped, with all that it started, at its
//! end or when it has not got on for too long.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};

use crate::progress::Progress;

/// A line is cut at this many bytes: it may be anything.
const LONGEST_LINE: usize = 64 << 10;

/// How long a command may run.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// When it is stopped in any case.
    pub end: Instant,
    /// How long it may go on without getting on.
    pub hang: Duration,
    /// How long it has to end by itself once it is stopped.
    pub grace: Duration,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was stopped at its end.
    Late,
    /// It was stopped since it did not get on.
    Hung,
    /// It was stopped since this program is to end.
    Interrupted,
}

/// What became of a command.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub end: End,
    /// How long it took.
    pub took: Duration,
    /// The last line that was a step forward.
    pub last: String,
    /// How long ago that was, when it ended or was stopped.
    pub idle: Duration,
}

/// Signals that end this program: readable from the first of them on.
pub struct Signals(UnixStream);

impl Signals {
    /// Ctrl-C, SIGTERM and SIGHUP to this process from here on.
    pub fn catch() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
        {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Self(receiver))
    }

    /// Whether there was one.
    pub fn have_come(&self) -> bool {
        let mut waits = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut waits, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }

    /// None, until something is written to the other end.
    #[cfg(test)]
    pub fn by_hand() -> (Self, UnixStream) {
        let (receiver, sender) = UnixStream::pair().unwrap();
        (Self(receiver), sender)
    }
}

/// Runs a command; its output and errors go line by line to `line`. Where `signals` are given, it is stopped by them.
pub fn run(
    command: &mut Command,
    limits: Limits,
    signals: Option<&Signals>,
    line: &mut dyn FnMut(&str),
) -> io::Result<Ran> {
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let started = Instant::now();
    let mut child = dies_with_us(command).process_group(0).spawn()?;
    command.stdout(Stdio::null()).stderr(Stdio::null()); // our ends of the pipe
    let group = Pid::from_child(&child);
    let ended = pidfd_open(group, PidfdFlags::empty())?;
    let mut output = Lines::new(OwnedFd::from(reader).into())?;
    let mut progress = Progress::new();
    let stopped = loop {
        let hangs_in = limits.hang.saturating_sub(progress.idle());
        let ends_in = limits.end.saturating_duration_since(Instant::now());
        if ends_in.is_zero() {
            break Some(End::Late);
        }
        if hangs_in.is_zero() {
            break Some(End::Hung);
        }
        let seen = wait(&ended, output.pipe.as_ref(), signals, ends_in.min(hangs_in))?;
        if seen.output {
            take(&mut output, &mut progress, line)?;
        }
        if seen.signal {
            break Some(End::Interrupted);
        }
        if seen.ended {
            break None;
        }
    };
    let idle = progress.idle();
    if stopped.is_some() {
        stop(group, &ended, &mut output, limits.grace, line)?;
    }
    // Nothing stays behind. While its leader has not been waited for, the group is no other's.
    let _ = kill_process_group(group, Signal::KILL);
    let status = child.wait()?;
    if stopped.is_none() {
        while take(&mut output, &mut progress, line)? {}
        progress.line(&String::from_utf8_lossy(&output.begun));
    }
    if !output.begun.is_empty() {
        output.end_line(line);
    }
    let end = stopped.unwrap_or(End::Exited(status));
    Ok(Ran { end, took: started.elapsed(), last: progress.last().into(), idle })
}

/// Passes on what is there, and takes note of it.
fn take(output: &mut Lines, progress: &mut Progress, line: &mut dyn FnMut(&str)) -> io::Result<bool> {
    output.read(&mut |text| {
        progress.line(text);
        line(text);
    })
}

/// Asks a group to end, and waits for that.
fn stop(
    group: Pid,
    ended: &OwnedFd,
    output: &mut Lines,
    grace: Duration,
    line: &mut dyn FnMut(&str),
) -> io::Result<()> {
    let end = Instant::now() + grace;
    let _ = kill_process_group(group, Signal::TERM);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let seen = wait(ended, output.pipe.as_ref(), None, left)?;
        if seen.output {
            output.read(line)?; // what it says while it ends is of use, too
        }
        if seen.ended || left.is_zero() {
            break;
        }
    }
    // Others of its group, such as a `lab` that ends what it has carried into the emulated host. They are no children of
    // this process, so there is nothing to wait for.
    while has_members(group) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A command that does not outlive this process, or the thread that starts it.
fn dies_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec, prctl(2) is async-signal-safe and touches no memory of the parent.
    unsafe { command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)) }
}

/// What there is to be done.
struct Seen {
    output: bool,
    signal: bool,
    ended: bool,
}

/// Waits for output, a signal, or the command's end.
fn wait(
    ended: &OwnedFd,
    output: Option<&File>,
    signals: Option<&Signals>,
    limit: Duration,
) -> io::Result<Seen> {
    let mut waits = vec![PollFd::new(ended, PollFlags::IN)];
    waits.extend(output.map(|output| PollFd::new(output, PollFlags::IN)));
    waits.extend(signals.map(|signals| PollFd::new(&signals.0, PollFlags::IN)));
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
    match poll(&mut waits, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut seen = waits.iter().map(|wait| !wait.revents().is_empty());
    let ended = seen.next().unwrap_or(false);
    Ok(Seen {
        ended,
        output: output.is_some() && seen.next().unwrap_or(false),
        signal: signals.is_some() && seen.next().unwrap_or(false),
    })
}

/// What comes out of a pipe, in lines.
struct Lines {
    /// `None` when nobody can write any more.
    pipe: Option<File>,
    /// The beginning of a line.
    begun: Vec<u8>,
}

impl Lines {
    fn new(pipe: File) -> io::Result<Self> {
        fcntl_setfl(&pipe, fcntl_getfl(&pipe)? | OFlags::NONBLOCK)?;
        Ok(Self { pipe: Some(pipe), begun: Vec::new() })
    }

    /// Reads what is there, or the first part of it; false if there is nothing.
    fn read(&mut self, line: &mut dyn FnMut(&str)) -> io::Result<bool> {
        let mut bytes = [0; 16 << 10];
        let Some(pipe) = &mut self.pipe else { return Ok(false) };
        let count = match pipe.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        if count == 0 {
            self.pipe = None;
        }
        for byte in bytes.iter().take(count) {
            if *byte == b'\n' || self.begun.len() >= LONGEST_LINE {
                self.end_line(line);
            }
            if *byte != b'\n' {
                self.begun.push(*byte);
            }
        }
        Ok(count > 0)
    }

    /// Passes on the line that has begun.
    fn end_line(&mut self, line: &mut dyn FnMut(&str)) {
        let text = std::mem::take(&mut self.begun);
        line(&String::from_utf8_lossy(&text));
    }
}

/// Whether a group has processes that have not ended.
fn has_members(group: Pid) -> bool {
    let is_member = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name, which may have anything in it (proc_pid_stat(5)): state, parent, group.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let of = fields.nth(1)?.parse().ok()?;
        Some(state != "Z" && state != "X" && Pid::from_raw(of) == Some(group))
    };
    let mut processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.any(|entry| is_member(entry).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LONG: Duration = Duration::from_secs(100);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn limits(end: Duration, hang: Duration) -> Limits {
        Limits { end: Instant::now() + end, hang, grace: Duration::from_secs(10) }
    }

    /// Runs a script; how it ended and what it printed.
    fn ran(script: &str, limits: Limits) -> (Ran, Vec<String>) {
        let mut lines = Vec::new();
        let ran = run(&mut shell(script), limits, None, &mut |line| lines.push(line.to_owned())).unwrap();
        (ran, lines)
    }

    /// Waits until a process that was killed has ended.
    fn is_gone(pid: &str) -> bool {
        let has_ended = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        let end = Instant::now() + Duration::from_secs(20);
        while !has_ended() && Instant::now() < end {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        has_ended()
    }

    #[test]
    fn what_it_prints_is_passed_on_and_nothing_stays_behind() {
        let (ran, lines) =
            ran("echo out; echo err >&2; sleep 1000 & echo $!; printf end; exit 3", limits(LONG, LONG));
        assert!(matches!(ran.end, End::Exited(status) if status.code() == Some(3)), "{ran:?}");
        assert_eq!((&lines[..2], &*lines[3]), (&["out".to_owned(), "err".into()][..], "end"));
        assert_eq!(ran.last, "end");
        assert!(is_gone(&lines[2]));
    }

    #[test]
    fn at_its_end_it_is_stopped_with_all_that_it_started() {
        let script = "trap 'echo ending; exit' TERM; sleep 1000 & echo $!; wait";
        let (ran, lines) = ran(script, limits(Duration::from_secs(5), LONG));
        assert_eq!(ran.end, End::Late);
        assert_eq!(lines[1], "ending");
        assert_eq!(ran.last, lines[0]);
        assert!(is_gone(&lines[0]));
    }

    #[test]
    fn who_does_not_want_to_end_is_killed() {
        let mut limits = limits(Duration::from_secs(5), LONG);
        limits.grace = Duration::from_millis(200);
        let (ran, lines) = ran("trap '' TERM; echo $$; while :; do sleep 0.1; done", limits);
        assert_eq!(ran.end, End::Late);
        assert!(is_gone(&lines[0]));
    }

    #[test]
    fn one_that_only_says_the_same_again_hangs() {
        let script = "i=0; while :; do i=$((i + 1)); echo \"  a  boot: $i s: the same\"; sleep 0.1; done";
        let (ran, lines) = ran(script, limits(LONG, Duration::from_secs(2)));
        assert_eq!(ran.end, End::Hung);
        assert_eq!(ran.last, "a  boot: 1 s: the same");
        assert!(lines.len() > 1, "{lines:?}");
    }

    #[test]
    fn one_that_gets_on_goes_on_to_its_end() {
        let script = "i=0; while :; do i=$((i + 1)); echo \"  a  boot: 1 s: step $i\"; sleep 0.1; done";
        let (ran, _) = ran(script, limits(Duration::from_secs(12), Duration::from_secs(8)));
        assert_eq!(ran.end, End::Late);
        assert_ne!(ran.last, "a  boot: 1 s: step 1");
    }

    #[test]
    fn a_signal_stops_it() {
        let (signals, mut sender) = Signals::by_hand();
        let mut pid = String::new();
        let ran =
            run(&mut shell("echo $$; exec sleep 1000"), limits(LONG, LONG), Some(&signals), &mut |line| {
                pid = line.into();
                sender.write_all(b"x").unwrap();
            });
        assert_eq!(ran.unwrap().end, End::Interrupted);
        assert!(is_gone(&pid));
    }
}
