//! How a machine ends: said once, by whoever notices first, and waited for by the main loop.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's boot CPU faulted three times over, which resets a PC.
    TripleFault,
    /// Somebody asked for it: control socket, signal, or terminal.
    Killed,
    /// The machine cannot go on; why.
    Failed(String),
}

/// The end of one machine.
pub struct Ending {
    event: EventFd,
    decided: AtomicBool,
    end: Mutex<Option<End>>,
}

impl Ending {
    /// Not decided yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            decided: AtomicBool::new(false),
            end: Mutex::new(None),
        })
    }

    /// End the machine. Only the first call counts.
    pub fn decide(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(end);
        self.decided.store(true, Ordering::SeqCst);
        // Cannot fail before 2^64 - 1 calls.
        let _ = self.event.write(1);
    }

    /// The machine cannot go on.
    pub fn fail(&self, why: String) {
        self.decide(End::Failed(why));
    }

    /// A CPU shut down.
    pub fn triple_fault(&self) {
        self.decide(End::TripleFault);
    }

    /// Whether the machine has ended.
    pub fn is_decided(&self) -> bool {
        self.decided.load(Ordering::SeqCst)
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable once the machine has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_counts() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.end(), None);
        assert!(ending.event().read().is_err(), "nothing to wake up for");
        ending.decide(End::PowerOff);
        ending.triple_fault();
        assert_eq!(ending.end(), Some(End::PowerOff));
        assert!(ending.is_decided());
        assert_eq!(ending.event().read().unwrap(), 2);
    }
}
