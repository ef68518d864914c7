//! MSI-X (PCI 3.0 §6.8.2): a table of messages, one a vector, each with a mask; and the bits of those that are pending.
//!
//! Shared between the CPU threads, which write the table, and the device's thread, which signals.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::wires::{Message, Wires};

/// Bytes of a table entry.
pub const ENTRY: usize = 16;
/// Id of the capability.
pub const CAPABILITY: u8 = 0x11;
/// Message control register: MSI-X enabled, function masked.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control register: all vectors masked.
pub const CONTROL_MASK: u16 = 1 << 14;
/// The vector that stands for none (virtio 1.3 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

const ENTRY_CONTROL: usize = 12;
const ENTRY_MASKED: u8 = 1;

struct Vector {
    entry: [u8; ENTRY],
    pending: bool,
    gsi: u32,
    /// Joined to `gsi` once the guest has unmasked the vector for the first time.
    line: Option<EventFd>,
    /// The message that `gsi` sends.
    routed: Option<Message>,
}

/// What a snapshot keeps of a vector.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VectorState {
    entry: [u8; ENTRY],
    pending: bool,
}

struct State {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
}

/// MSI-X of one function.
pub struct Msix {
    state: Mutex<State>,
    wires: Arc<dyn Wires>,
}

impl Vector {
    fn is_masked(&self) -> bool {
        self.entry.get(ENTRY_CONTROL).is_none_or(|control| control & ENTRY_MASKED != 0)
    }

    fn message(&self) -> Message {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = self.entry;
        Message {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        }
    }

    /// The vector is not masked: send its present message from now on, and what is pending.
    fn connect(&mut self, wires: &dyn Wires) -> std::io::Result<()> {
        let message = self.message();
        if self.routed != Some(message) {
            wires.route(self.gsi, message)?;
            self.routed = Some(message);
        }
        if self.line.is_none() {
            let line = EventFd::new(EFD_NONBLOCK)?;
            wires.join(&line, self.gsi)?;
            self.line = Some(line);
        }
        if self.pending {
            self.pending = false;
            self.raise();
        }
        Ok(())
    }

    fn raise(&self) {
        if let Some(line) = &self.line {
            // Fails only if 2^64 - 2 interrupts wait already.
            let _ = line.write(1);
        }
    }
}

impl State {
    fn connect(&mut self, index: usize, wires: &dyn Wires) {
        if !self.enabled || self.masked {
            return;
        }
        if let Some(vector) = self.vectors.get_mut(index)
            && !vector.is_masked()
            && vector.connect(wires).is_err()
        {
            // KVM does not take the guest's message: interrupts of this vector go nowhere, as on a real bus. The
            // guest tries again by writing the entry.
            vector.routed = None;
        }
    }
}

impl Msix {
    /// `count` masked vectors, whose interrupt numbers are `gsi`, `gsi + 1`, ….
    pub fn new(count: u16, gsi: u32, wires: Arc<dyn Wires>) -> Self {
        let vector = |index: u16| {
            let mut entry = [0; ENTRY];
            entry[ENTRY_CONTROL] = ENTRY_MASKED;
            Vector { entry, pending: false, gsi: gsi + u32::from(index), line: None, routed: None }
        };
        let vectors = (0..count).map(vector).collect();
        Self { state: Mutex::new(State { enabled: false, masked: false, vectors }), wires }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wrote the message control register.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if (state.enabled, state.masked) == (enabled, masked) {
            return;
        }
        (state.enabled, state.masked) = (enabled, masked);
        for index in 0..state.vectors.len() {
            if !enabled && let Some(vector) = state.vectors.get_mut(index) {
                vector.pending = false;
            }
            state.connect(index, &*self.wires);
        }
    }

    /// The state of all vectors; the control register is in configuration space.
    pub fn save(&self) -> Vec<VectorState> {
        let state = |vector: &Vector| VectorState { entry: vector.entry, pending: vector.pending };
        self.state().vectors.iter().map(state).collect()
    }

    /// Become what [`Self::save`] told of another machine's, under the message control register `control`.
    pub fn restore(&self, vectors: &[VectorState], control: u16) {
        for (vector, saved) in self.state().vectors.iter_mut().zip(vectors) {
            vector.entry = saved.entry;
            vector.pending = saved.pending;
        }
        self.set_control(control);
    }

    /// A guest's read of the table; bytes past its end read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset as usize..).zip(data) {
            let entry = state.vectors.get(at / ENTRY).map(|vector| &vector.entry);
            *byte = entry.and_then(|entry| entry.get(at % ENTRY)).copied().unwrap_or(0);
        }
    }

    /// A guest's write to the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let first = offset as usize;
        for (at, new) in (first..).zip(data) {
            let vector = state.vectors.get_mut(at / ENTRY);
            let Some(byte) = vector.and_then(|vector| vector.entry.get_mut(at % ENTRY)) else { continue };
            *byte = match at % ENTRY {
                ENTRY_CONTROL => new & ENTRY_MASKED,
                at if at > ENTRY_CONTROL => 0,
                _ => *new,
            };
        }
        let last = first + data.len().saturating_sub(1);
        for index in first / ENTRY..=last / ENTRY {
            state.connect(index, &*self.wires);
        }
    }

    /// A guest's read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset as usize..).zip(data) {
            let vectors = state.vectors.iter().skip(at.saturating_mul(8)).take(8);
            *byte = vectors.enumerate().fold(0, |bits, (bit, vector)| bits | u8::from(vector.pending) << bit);
        }
    }

    /// Send the message of `vector`, or keep it pending while it is masked. False if MSI-X is not enabled.
    pub fn signal(&self, vector: u16) -> bool {
        let mut state = self.state();
        if !state.enabled {
            return false;
        }
        let masked = state.masked;
        if let Some(vector) = state.vectors.get_mut(usize::from(vector)) {
            if masked || vector.is_masked() {
                vector.pending = true;
            } else {
                vector.raise();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::wires::Recorder;

    fn msix() -> (Msix, Arc<Recorder>) {
        let wires = Arc::new(Recorder::default());
        (Msix::new(3, 24, wires.clone()), wires)
    }

    fn write_message(msix: &Msix, vector: u64, message: Message, masked: bool) {
        msix.write_table(vector * 16 + 12, &[1, 0, 0, 0]);
        msix.write_table(vector * 16, &message.address.to_le_bytes());
        msix.write_table(vector * 16 + 8, &message.data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &[u8::from(masked), 0, 0, 0]);
    }

    const MESSAGE: Message = Message { address: 0xfee0_1000, data: 0x31 };

    #[test]
    fn an_unmasked_vector_is_routed_and_raised() {
        let (msix, wires) = msix();
        assert!(!msix.signal(1), "not enabled yet");
        msix.set_control(CONTROL_ENABLE);
        write_message(&msix, 1, MESSAGE, false);
        assert_eq!(wires.routes.lock().unwrap().get(&25), Some(&MESSAGE));
        assert!(msix.signal(1));
        assert_eq!((wires.raised(25), wires.raised(24)), (1, 0));
        assert!(msix.signal(7), "a vector that is not there is ignored");
    }

    #[test]
    fn what_is_masked_is_pending_until_it_is_not() {
        let (msix, wires) = msix();
        msix.set_control(CONTROL_ENABLE);
        write_message(&msix, 2, MESSAGE, true);
        msix.signal(2);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wires.raised(26), 0);
        // The function's mask holds it back even when the vector's is gone.
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        write_message(&msix, 2, MESSAGE, false);
        assert_eq!(wires.raised(26), 0);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(wires.raised(26), 1);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn a_moved_interrupt_is_routed_anew() {
        let (msix, wires) = msix();
        msix.set_control(CONTROL_ENABLE);
        write_message(&msix, 0, MESSAGE, false);
        let moved = Message { address: 0xfee0_2000, data: 0x41 };
        write_message(&msix, 0, moved, false);
        assert_eq!(wires.routes.lock().unwrap().get(&24), Some(&moved));
    }

    proptest! {
        #[test]
        fn no_access_breaks_the_table(
            accesses in prop::collection::vec((0u64..0x1100, 1usize..=8, any::<u64>(), 0u8..5), 1..200)
        ) {
            let (msix, _wires) = msix();
            for (offset, length, value, kind) in accesses {
                let bytes = value.to_le_bytes();
                let mut data = [0; 8];
                match kind {
                    0 => msix.write_table(offset, &bytes[..length]),
                    1 => msix.read_table(offset, &mut data[..length]),
                    2 => msix.read_pending(offset, &mut data[..length]),
                    3 => msix.set_control(value as u16),
                    _ => { msix.signal(value as u16); }
                }
            }
            // Whatever happened, the table can be set up and works.
            msix.set_control(CONTROL_ENABLE);
            write_message(&msix, 1, MESSAGE, false);
            let _ = _wires.raised(25);
            msix.signal(1);
            prop_assert_eq!(_wires.raised(25), 1);
        }
    }
}
