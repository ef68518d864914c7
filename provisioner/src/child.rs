//! Child processes with a limit: what they print goes to a log and to the progress line; no wait is for ever.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::terminal_text;

/// Lines of output that are kept to be shown when a command fails.
const TAIL_LINES: usize = 12;

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; `None` if it was ended at its limit.
    pub status: Option<ExitStatus>,
    /// Last lines of its output and errors.
    pub tail: Vec<String>,
}

impl Outcome {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// How it ended, in words: "status 1", "no end after 60 s".
    pub fn describe(&self, limit: Duration) -> String {
        use std::os::unix::process::ExitStatusExt;
        match self.status {
            None => format!("it had not ended after {} s", limit.as_secs()),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("it ended with status {code}"),
                (None, Some(signal)) => format!("it was ended by signal {signal}"),
                _ => "it ended".into(),
            },
        }
    }
}

/// Runs a command: `input` goes to its standard input, its output and errors line by line to `line` and, if given, to
/// the file `log`. At `limit` it is killed.
pub fn run(
    mut command: Command,
    mut input: impl Read + Send,
    log: Option<&Path>,
    limit: Duration,
    line: &mut dyn FnMut(&str),
) -> io::Result<Outcome> {
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    drop(command); // its ends of the pipe: the reader must see the end of the file
    let mut log = log.map(File::create).transpose()?;
    let (lines, received) = std::sync::mpsc::sync_channel::<String>(64);
    std::thread::scope(|scope| {
        if let Some(mut stdin) = child.stdin.take() {
            // A child that does not read its input has reasons of its own, told by its status.
            scope.spawn(move || drop(io::copy(&mut input, &mut stdin)));
        }
        scope.spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut bytes = Vec::new();
            // Lines are cut at 64 KiB: the output is not ours.
            while reader.by_ref().take(64 << 10).read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
                let text = terminal_text::line(&String::from_utf8_lossy(&bytes));
                if lines.send(text).is_err() {
                    break;
                }
                bytes.clear();
            }
        });
        let end = Instant::now() + limit;
        let mut tail = VecDeque::new();
        let timed_out = loop {
            match received.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(text) => {
                    if let Some(log) = &mut log {
                        writeln!(log, "{text}")?;
                    }
                    if !text.is_empty() {
                        line(&text);
                        tail.push_back(text);
                        if tail.len() > TAIL_LINES {
                            tail.pop_front();
                        }
                    }
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break false,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => break true,
            }
        };
        let status =
            if timed_out { None } else { wait(&mut child, end.saturating_duration_since(Instant::now()))? };
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        drop(received);
        Ok(Outcome { status, tail: tail.into() })
    })
}

/// Waits for a child's end; `None` if it has not ended within `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Keeps what this process was started with, but for standard input, output and errors, from all that it starts: a lock
/// or a pipe of the caller's (`flock 9`) would be held for as long as a lab runs.
pub fn keep_descriptors() {
    use rustix::fd::BorrowedFd;
    let listed = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> = listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: marks a descriptor of this process, which does nothing else yet; one that is closed by now is refused.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let _ = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
    }
}

/// Lets a command outlive the terminal and, unless it is `bound` to that, the thread that starts it: a session of its own.
pub fn detach(command: &mut Command, bound: bool) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec, setsid(2) and prctl(2) are async-signal-safe and touch no memory of the parent.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            if bound {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_goes_to_the_log_and_the_tail() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut seen = Vec::new();
        let outcome = run(
            shell("read x; echo got $x; echo bad >&2; exit 3"),
            b"this\n".as_slice(),
            Some(&log),
            Duration::from_secs(20),
            &mut |line| seen.push(line.to_string()),
        )
        .unwrap();
        assert_eq!(outcome.status.unwrap().code(), Some(3));
        assert_eq!(outcome.tail, ["got this", "bad"]);
        assert_eq!(seen, outcome.tail);
        assert_eq!(std::fs::read_to_string(log).unwrap(), "got this\nbad\n");
    }

    #[test]
    fn a_command_is_ended_at_its_limit() {
        let outcome =
            run(shell("exec tail -f /dev/null"), io::empty(), None, Duration::from_millis(100), &mut |_| ())
                .unwrap();
        assert!(outcome.status.is_none());
        assert!(outcome.describe(Duration::from_secs(1)).contains("had not ended after 1 s"));
    }
}
