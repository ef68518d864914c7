//! The serial console of the emulated machine, as its supervisor reads it.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
    process::ChildStdout,
};

/// Largest file of console messages, in bytes; what comes after is dropped.
const LOG_LIMIT: usize = 1 << 20;
/// Longest line, in bytes; what comes after is dropped.
const LINE_LIMIT: usize = 1024;

/// The machine's serial console.
pub struct Console {
    /// QEMU's end of it.
    pub pipe: ChildStdout,
    /// Whether more can come.
    pub open: bool,
    log: File,
    written: usize,
    partial: Vec<u8>,
    /// The last line.
    pub last: String,
}

impl Console {
    /// Reads from a pipe and writes to a log.
    pub fn new(pipe: ChildStdout, log: &Path) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Self {
            pipe,
            open: true,
            log: File::create(log)?,
            written: 0,
            partial: Vec::new(),
            last: "nothing".into(),
        })
    }

    /// The lines that have come in.
    pub fn read(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    return lines;
                }
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    let room = LOG_LIMIT.saturating_sub(self.written).min(length);
                    if self.log.write_all(bytes.get(..room).unwrap_or_default()).is_ok() {
                        self.written += room;
                    }
                    self.split(bytes, &mut lines);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.open = error.kind() == io::ErrorKind::WouldBlock;
                    return lines;
                }
            }
        }
    }

    fn split(&mut self, bytes: &[u8], lines: &mut Vec<String>) {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.partial).trim().to_string();
                    self.partial.clear();
                    if !line.is_empty() {
                        self.last = line.clone();
                        lines.push(line);
                    }
                }
                _ if self.partial.len() < LINE_LIMIT => self.partial.push(*byte),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_console_is_read_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("printf")
            .args(["one\\r\\ntw%s\\n\\nrest", "o"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let log = dir.path().join("console.log");
        let mut console = Console::new(child.stdout.take().unwrap(), &log).unwrap();
        child.wait().unwrap();
        assert_eq!(console.read(), ["one", "two"]);
        assert!(!console.open);
        assert_eq!(console.last, "two");
        assert_eq!(fs::read(log).unwrap(), b"one\r\ntwo\n\nrest");
    }
}
