//! The guest's wall clock: a service in the guest listens at a vsock port, says one line, reads the host's time, sets or slews
//! its clock, and says another line. Told every minute as long as the machine runs, it follows a host that was suspended or
//! whose own clock was set, and makes up for ticks that were lost.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use crate::{config::VsockConfig, virtio::vsock};

/// Time between two times that a guest is told. Images slew their clocks so that what is missing is made up for by then.
const PERIOD: Duration = Duration::from_secs(60);
/// How long a guest may take to answer; a machine that is paused does not.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a line of a guest's may be.
const LINE_MAX: u64 = 200;

/// Tells the guest the time once.
pub fn tell(socket: &Path, port: u32, limit: Duration) -> io::Result<()> {
    let mut stream = vsock::connect(socket, port)?;
    stream.set_read_timeout(Some(limit.max(Duration::from_secs(1))))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    expect_line(&mut answers)?;
    say_time(&mut stream)?;
    expect_line(&mut answers)
}

/// A guest that hangs up, or talks without end, has not done it.
pub fn expect_line(from: &mut dyn BufRead) -> io::Result<()> {
    let mut line = Vec::new();
    from.take(LINE_MAX).read_until(b'\n', &mut line)?;
    if line.ends_with(b"\n") { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The time as a guest reads it: seconds since 1970, with three decimals.
pub fn say_time(to: &mut dyn Write) -> io::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    to.write_all(format!("{}.{:03}\n", now.as_secs(), now.subsec_millis()).as_bytes())
}

/// Starts a thread that tells the guest the time as long as this process lives, if the configuration wants it.
pub fn keep(config: Option<&VsockConfig>) -> io::Result<()> {
    let Some((socket, port)) = config.and_then(|vsock| Some((vsock.socket.clone(), vsock.clock_port?)))
    else {
        return Ok(());
    };
    thread::Builder::new().name("clock".into()).spawn(move || follow(socket, port)).map(drop)
}

fn follow(socket: PathBuf, port: u32) {
    loop {
        thread::sleep(PERIOD);
        // A guest that does not answer boots, is paused, or has no such service any more: the next time will do.
        drop(tell(&socket, port, LIMIT));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A guest that answers with these lines, each after what it waits for, and what it was told.
    fn guest(answers: &'static [&'static str]) -> (io::Result<()>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        let told = thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            let mut told = Vec::new();
            for answer in answers {
                if told.len() < 2 && !answer.is_empty() && *answer != "go\n" {
                    let mut line = String::new();
                    stream.read_line(&mut line).unwrap();
                    told.push(line);
                }
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            told
        });
        (tell(&socket, 9123, Duration::from_secs(20)), told.join().unwrap())
    }

    #[test]
    fn a_guest_is_told_when_it_asks() {
        let (result, told) = guest(&["OK 1\n", "go\n", "done\n"]);
        result.unwrap();
        assert_eq!(told[0], "CONNECT 9123\n");
        let (seconds, millis) = told[1].trim().split_once('.').unwrap();
        assert!(seconds.parse::<u64>().unwrap() > 1_700_000_000 && millis.len() == 3, "{told:?}");
    }

    #[test]
    fn a_guest_that_does_not_listen_or_hangs_up_has_not_been_told() {
        let (result, _) = guest(&["NO\n"]);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let (result, _) = guest(&["OK 1\n"]);
        assert!(result.is_err());
    }
}
