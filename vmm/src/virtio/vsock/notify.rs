//! What the guest's systemd says on the notification port (`vmm.notify_socket=vsock-stream:2:PORT`): lines such as
//! READY=1, as in sd_notify(3).

use std::sync::{Mutex, PoisonError};

/// Lines kept.
const MAX_LINES: usize = 256;
/// Longest line kept, in bytes.
const MAX_LINE: usize = 1024;

/// The lines that were said, for whoever asks.
#[derive(Debug, Default)]
pub struct Notified(Mutex<Vec<String>>);

impl Notified {
    /// `KEY=VALUE` lines since the guest started, the newest last, at most 256, without repeats.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets all, because the guest starts anew.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn add(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|known| *known != line);
        if lines.len() >= MAX_LINES {
            lines.remove(0);
        }
        lines.push(line);
    }
}

/// One connection's bytes on their way to lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    too_long: bool,
}

impl Lines {
    /// Takes in what was received.
    pub fn receive(&mut self, data: &[u8], notified: &Notified) {
        for byte in data {
            match byte {
                b'\n' | 0 => self.end(notified),
                _ if self.begun.len() < MAX_LINE => self.begun.push(*byte),
                _ => self.too_long = true,
            }
        }
    }

    /// The line is complete; the last one of a connection need not end in a line feed.
    pub fn end(&mut self, notified: &Notified) {
        let line = std::mem::take(&mut self.begun);
        let too_long = std::mem::take(&mut self.too_long);
        let Ok(line) = String::from_utf8(line) else { return };
        let named = line.split_once('=').is_some_and(|(key, _)| !key.is_empty());
        if named && !too_long && !line.contains(char::is_control) {
            notified.add(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_once_and_not_without_end() {
        let notified = Notified::default();
        let mut lines = Lines::default();
        lines.receive(b"READY=1\nSTATUS=a\nnonsense\n=x\nBELL=\x07\nREA", &notified);
        lines.receive(b"DY=1\nSTATUS=b", &notified);
        assert_eq!(notified.lines(), ["STATUS=a", "READY=1"]);
        lines.end(&notified);
        assert_eq!(notified.lines(), ["STATUS=a", "READY=1", "STATUS=b"]);
        lines.receive(format!("LONG={}\nX=\u{fc}\nY=", "x".repeat(MAX_LINE)).as_bytes(), &notified);
        lines.receive(b"\xff\n", &notified);
        assert_eq!(notified.lines().last().unwrap(), "X=\u{fc}");
        for i in 0..1000 {
            lines.receive(format!("N={i}\n").as_bytes(), &notified);
        }
        assert_eq!(notified.lines().len(), MAX_LINES);
        assert_eq!(notified.lines().last().unwrap(), "N=999");
    }
}
