//! This process' own terminal as the guest's console: raw while the machine runs, as it was afterwards.

use std::{
    io::{self, Write},
    os::fd::BorrowedFd,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr},
};

use crate::say::say;

/// Control-A: the next key is for lab-vmm. `x` ends the machine, control-A is itself.
const ESCAPE: u8 = 1;
const END: u8 = b'x';

/// Standard input and output.
pub struct Terminal {
    before: Option<Termios>,
    escaped: bool,
    ended: bool,
}

impl Terminal {
    /// Make the terminal raw, if it is one.
    pub fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        let mut before = None;
        if isatty(&stdin) {
            let attributes = tcgetattr(&stdin)?;
            let mut raw = attributes.clone();
            raw.make_raw();
            tcsetattr(&stdin, OptionalActions::Now, &raw)?;
            before = Some(attributes);
            say("this terminal is the guest's console; Ctrl-A x ends the machine\r");
        }
        Ok(Self { before, escaped: false, ended: false })
    }

    /// What to wait for, until the input ends.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: standard input stays open as long as the process.
        (!self.ended).then(|| unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) })
    }

    /// Hand what was typed to `guest`. True if the user wants the machine to end.
    pub fn read(&mut self, guest: &mut impl Write) -> bool {
        let stdin = io::stdin();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Not made non-blocking: the terminal belongs to other processes too.
        let ready =
            !self.ended && poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0);
        if !ready {
            return false;
        }
        let mut buffer = [0; 256];
        // Not through std's buffer, which poll does not see.
        match rustix::io::read(&stdin, &mut buffer[..]) {
            Ok(0) => self.ended = true,
            Ok(read) => return self.pass(buffer.get(..read).unwrap_or_default(), guest),
            Err(error) => self.ended = error != rustix::io::Errno::INTR,
        }
        false
    }

    fn pass(&mut self, typed: &[u8], guest: &mut impl Write) -> bool {
        let mut out = Vec::with_capacity(typed.len());
        let raw = self.before.is_some();
        for byte in typed {
            match (self.escaped, *byte) {
                (false, ESCAPE) if raw => self.escaped = true,
                (true, END) => return true,
                (_, byte) => {
                    self.escaped = false;
                    out.push(byte);
                }
            }
        }
        // Dropped if the guest does not read: see `Hub::input`.
        let _ = guest.write(&out);
        false
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // The terminal may be gone.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_passes_through() {
        let mut terminal = Terminal { before: None, escaped: false, ended: false };
        let mut guest = Vec::new();
        assert!(!terminal.pass(b"a\x01x", &mut guest));
        assert_eq!(guest, b"a\x01x");
    }
}
