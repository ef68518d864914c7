//! What the CPU threads pass before each entry into the guest: open, or closed while the machine is paused.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// The gate of one machine.
#[derive(Default)]
pub(super) struct Gate {
    /// Whether `state` must be looked at.
    attention: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// The CPUs that wait, a bit each: a machine has at most 32.
    waiting: u64,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    Closed,
    Ended,
}

/// How a CPU came to the gate.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// It was open.
    Through,
    /// It was closed, and has been opened.
    Waited,
    /// The machine has ended: there is nothing behind it.
    Ended,
}

impl Gate {
    /// Whether a CPU may pass without waiting. Costs no lock.
    pub fn is_open(&self) -> bool {
        !self.attention.load(Ordering::SeqCst)
    }

    /// Let CPU `index` through as soon as the gate is open.
    pub fn pass(&self, index: usize) -> Pass {
        if self.is_open() {
            return Pass::Through;
        }
        let mut state = self.state();
        let waited = state.phase == Phase::Closed;
        while state.phase == Phase::Closed {
            state.waiting |= 1 << index;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting &= !(1 << index);
        match (state.phase, waited) {
            (Phase::Ended, _) => Pass::Ended,
            (_, true) => Pass::Waited,
            (_, false) => Pass::Through,
        }
    }

    /// Whether CPU `index` waits before the closed gate.
    pub fn waits(&self, index: usize) -> bool {
        let state = self.state();
        state.phase == Phase::Closed && state.waiting & 1 << index != 0
    }

    /// Hold whoever comes.
    pub fn close(&self) {
        self.turn(Phase::Closed);
    }

    /// Let them go on.
    pub fn open(&self) {
        self.turn(Phase::Open);
    }

    /// Send them home; nothing else can follow.
    pub fn end(&self) {
        self.turn(Phase::Ended);
    }

    fn turn(&self, phase: Phase) {
        let mut state = self.state();
        if state.phase != Phase::Ended {
            state.phase = phase;
        }
        self.attention.store(state.phase != Phase::Open, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread, time::Duration};

    use super::*;

    #[test]
    fn a_closed_gate_holds_until_it_is_opened() {
        let gate = Arc::new(Gate::default());
        assert_eq!(gate.pass(3), Pass::Through);
        for end in [false, true] {
            gate.close();
            assert!(!gate.waits(3));
            let there = gate.clone();
            let cpu = thread::spawn(move || there.pass(3));
            for _ in 0..10_000 {
                if gate.waits(3) {
                    break;
                }
                thread::park_timeout(Duration::from_millis(1));
            }
            assert!(gate.waits(3) && !gate.waits(2));
            if end {
                gate.end()
            } else {
                gate.open()
            }
            assert_eq!(cpu.join().unwrap(), if end { Pass::Ended } else { Pass::Waited });
        }
        gate.open();
        assert_eq!(gate.pass(0), Pass::Ended);
    }
}
