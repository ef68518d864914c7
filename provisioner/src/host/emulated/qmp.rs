//! QEMU's control socket (QMP): one JSON object a line each way, events in between.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

/// How long QEMU may take for an answer.
const LIMIT: Duration = Duration::from_secs(20);
/// Longest line that is read, in bytes.
const LONGEST_LINE: u64 = 1 << 20;

/// Why QEMU did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not answer.
    #[error("QEMU gives no answer on {socket}: {source}")]
    Io {
        /// The socket.
        socket: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// What it said.
        reason: String,
    },
}

/// A connection.
pub struct Qmp {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { socket: socket.into(), source };
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
        stream.set_write_timeout(Some(LIMIT)).map_err(failed)?;
        let mut qmp = Self { socket: socket.into(), stream: BufReader::new(stream) };
        qmp.read()?; // the greeting
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command of the human monitor and returns what it printed, empty for most that succeed.
    pub fn monitor(&mut self, line: &str) -> Result<String, Error> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().trim().to_string())
    }

    /// Ends QEMU.
    pub fn quit(&mut self) -> Result<(), Error> {
        self.execute("quit", json!({})).map(drop)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let sent = self.stream.get_mut().write_all(line.as_bytes());
        sent.map_err(|source| Error::Io { socket: self.socket.clone(), source })?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").into();
                return Err(Error::Refused { command: command.into(), reason });
            }
            // Anything else is an event.
        }
    }

    fn read(&mut self) -> Result<Value, Error> {
        let failed = |source| Error::Io { socket: self.socket.clone(), source };
        let mut line = String::new();
        let length = self.stream.by_ref().take(LONGEST_LINE).read_line(&mut line).map_err(failed)?;
        if length == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|error| failed(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Answers each line with the next of `answers`, after a greeting; returns what was asked.
    fn server(socket: &Path, answers: &'static [&'static str]) -> std::thread::JoinHandle<Vec<Value>> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut asked = Vec::new();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in [&"{\"return\": {}}"].into_iter().chain(answers) {
                asked.push(serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap());
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
            asked
        })
    }

    #[test]
    fn answers_are_found_between_events() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let server = server(&socket, &["{\"event\": \"RTC_CHANGE\"}\n{\"return\": \"Hub -1\\r\\n\"}"]);
        let mut qmp = Qmp::connect(&socket).unwrap();
        assert_eq!(qmp.monitor("info usernet").unwrap(), "Hub -1");
        let asked = server.join().unwrap();
        assert_eq!(asked[1]["arguments"]["command-line"], "info usernet");
    }

    #[test]
    fn refusals_and_broken_connections_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let server =
            server(&socket, &["{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}"]);
        let mut qmp = Qmp::connect(&socket).unwrap();
        assert_eq!(
            qmp.monitor("x").unwrap_err().to_string(),
            "QEMU refused human-monitor-command: no such thing"
        );
        server.join().unwrap();
        assert!(matches!(qmp.monitor("x"), Err(Error::Io { .. })));
        assert!(matches!(Qmp::connect(&dir.path().join("none")), Err(Error::Io { .. })));
    }
}
