//! Frames from the guest: sent from where they are in its memory. If `lab-net` does not take them fast enough, they
//! stay in the ring and the guest notices; without a link they are dropped.

use std::{collections::VecDeque, sync::Arc};

use vm_memory::GuestMemoryMmap;

use super::{
    HEADER, MAX_PACKET, SENT,
    link::{BATCH, Link},
};
use crate::virtio::{
    counters::Counters,
    queue::DeviceQueue,
    segments::Pieces,
    worker::{Fault, Poll},
};

/// The sending half of a card.
pub(super) struct Transmitter {
    pub queue: DeviceQueue,
    /// Taken from the ring and not sent yet.
    waiting: VecDeque<Packet>,
    counters: Arc<Counters<4>>,
}

struct Packet {
    head: u16,
    pieces: Pieces,
}

impl Transmitter {
    pub fn new(queue: DeviceQueue, counters: Arc<Counters<4>>) -> Self {
        Self { queue, waiting: VecDeque::with_capacity(BATCH), counters }
    }

    /// Puts the packets back that were taken and not sent.
    pub fn put_back(&mut self, memory: &GuestMemoryMmap) {
        self.queue.put_back(memory, self.waiting.drain(..).map(|packet| packet.head));
    }

    /// Sends as much as there is, and as there is room for.
    pub fn work(&mut self, memory: &GuestMemoryMmap, link: &mut Link, poll: &Poll) -> Result<(), Fault> {
        self.queue.silence(memory)?;
        let mut budget = self.queue.size();
        while budget > 0 {
            self.fill(memory)?;
            if self.waiting.is_empty() {
                self.queue.tell(memory)?;
                link.has_room(poll);
                if self.queue.listen(memory)? {
                    self.queue.silence(memory)?;
                    budget -= 1;
                    continue;
                }
                return Ok(());
            }
            let count = if link.is_up() {
                if !link.writable {
                    // The bell stays silent until there is room.
                    return self.queue.tell(memory);
                }
                let packets: Vec<&[libc::iovec]> =
                    self.waiting.iter().map(|packet| packet.pieces.list()).collect();
                link.send(&packets, poll)
            } else {
                self.waiting.len()
            };
            for packet in self.waiting.drain(..count) {
                if link.is_up() {
                    self.counters.add(SENT, 1);
                    self.counters.add(SENT + 1, (packet.pieces.len() - HEADER) as u64);
                }
                self.queue.push(memory, packet.head, 0)?;
            }
            budget = budget.saturating_sub(count.max(1));
        }
        self.queue.tell(memory)?;
        self.queue.ring();
        Ok(())
    }

    /// Takes packets from the ring, up to a batch. What is no packet is given back at once.
    fn fill(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        while self.waiting.len() < BATCH {
            let Some(chain) = self.queue.pop(memory)? else { return Ok(()) };
            let length = chain.readable.len();
            if length > HEADER && length <= MAX_PACKET {
                // What the header says is checked by lab-net, which cannot trust a guest's memory to stay either.
                // SAFETY: the device's handler holds this memory and this transmitter.
                let pieces = unsafe { Pieces::new(&chain.readable) };
                self.waiting.push_back(Packet { head: chain.head, pieces });
            } else {
                self.queue.push(memory, chain.head, 0)?;
            }
        }
        Ok(())
    }
}
