//! Frames for the guest: received into the buffers that it has provided, several for a large one (mergeable
//! buffers). Without buffers nothing is received, and `lab-net` sees a full socket.

use std::{collections::VecDeque, sync::Arc};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::GuestMemoryMmap;

use super::{
    HEADER, MAX_PACKET, RECEIVED,
    link::{BATCH, Link},
    offload::Offload,
};
use crate::virtio::{
    counters::Counters,
    queue::{DeviceQueue, MAX_PIECES},
    segments::Pieces,
    worker::Fault,
};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// The receiving half of a card.
pub(super) struct Receiver {
    pub queue: DeviceQueue,
    /// Buffers taken from the ring and not filled yet.
    buffers: VecDeque<Buffer>,
    /// Bytes that they have room for.
    room: usize,
    /// Packets to ask for at once: more than there were the last time.
    expected: usize,
    mergeable: bool,
    offload: Offload,
    counters: Arc<Counters<4>>,
}

struct Buffer {
    head: u16,
    pieces: Pieces,
}

impl Receiver {
    pub fn new(queue: DeviceQueue, features: u64, counters: Arc<Counters<4>>) -> Self {
        Self {
            queue,
            buffers: VecDeque::new(),
            room: 0,
            expected: 1,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            offload: Offload::new(features),
            counters,
        }
    }

    /// Puts the buffers back that were taken and not filled. Where packets came together, some of them lie between those
    /// that were filled.
    pub fn put_back(&mut self, memory: &GuestMemoryMmap) {
        self.queue.put_back(memory, self.buffers.drain(..).map(|buffer| buffer.head));
        self.room = 0;
    }

    /// Receives as much as is there, and as there are buffers for.
    pub fn work(&mut self, memory: &GuestMemoryMmap, link: &mut Link) -> Result<(), Fault> {
        self.queue.silence(memory)?;
        let mut budget = self.queue.size();
        while link.readable && budget > 0 {
            self.fill(memory)?;
            let mut groups = self.groups();
            if groups.is_empty() {
                // Not enough for the longest packet, but perhaps for the next one.
                budget -= 1;
                let Some(length) = link.next_length() else { continue };
                if self.mergeable && length <= self.room {
                    groups.push(self.buffers.len());
                } else if self.buffers.len() >= self.queue.size() {
                    // The driver has no more to give.
                    link.skip();
                    continue;
                } else {
                    self.queue.tell(memory)?;
                    if self.queue.listen(memory)? {
                        self.queue.silence(memory)?;
                        continue;
                    }
                    // Goes on when the bell rings.
                    return Ok(());
                }
            }
            let count = self.receive(memory, link, &groups)?;
            self.expected = (count * 2).clamp(1, BATCH);
            budget = budget.saturating_sub(count.max(1));
        }
        self.queue.tell(memory)?;
        if link.readable {
            self.queue.ring();
        }
        Ok(())
    }

    /// Takes buffers from the ring, until what is expected would fit.
    fn fill(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        while self.room < self.expected * MAX_PACKET && self.buffers.len() < self.queue.size() {
            let Some(chain) = self.queue.pop(memory)? else { return Ok(()) };
            if chain.writable.len() < HEADER {
                return Err(self.queue.fault("a receive buffer shorter than a header"));
            }
            // SAFETY: the device's handler holds this memory and this receiver.
            let pieces = unsafe { Pieces::new(&chain.writable) };
            self.room += pieces.len();
            self.buffers.push_back(Buffer { head: chain.head, pieces });
        }
        Ok(())
    }

    /// Divides the buffers into groups that each hold any packet; gives the number of buffers of each.
    fn groups(&self) -> Vec<usize> {
        if !self.mergeable {
            // A packet that does not fit into its buffer is lost.
            return vec![1; self.buffers.len().min(self.expected)];
        }
        let mut groups = Vec::with_capacity(self.expected);
        let (mut count, mut room, mut pieces) = (0, 0, 0);
        for buffer in &self.buffers {
            count += 1;
            room += buffer.pieces.len();
            pieces += buffer.pieces.list().len();
            if room >= MAX_PACKET || pieces >= MAX_PIECES {
                groups.push(count);
                if groups.len() == self.expected {
                    break;
                }
                (count, room, pieces) = (0, 0, 0);
            }
        }
        groups
    }

    /// Receives packets into groups of buffers; gives back those that were filled. Returns how many packets there
    /// were.
    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        link: &mut Link,
        groups: &[usize],
    ) -> Result<usize, Fault> {
        // One list for all, since the pieces of a packet must lie together.
        let mut all = Vec::new();
        let mut ends = Vec::with_capacity(groups.len());
        let mut buffers = self.buffers.iter();
        for group in groups {
            for buffer in buffers.by_ref().take(*group) {
                all.extend_from_slice(buffer.pieces.list());
            }
            ends.push(all.len());
        }
        let mut start = 0;
        let packets: Vec<&[libc::iovec]> = ends
            .iter()
            .map(|end| all.get(std::mem::replace(&mut start, *end)..*end).unwrap_or_default())
            .collect();
        let lengths = link.receive(&packets);

        let mut unused = Vec::new();
        for (length, group) in lengths.iter().zip(groups) {
            let mut packet: Vec<Buffer> = self.buffers.drain(..*group).collect();
            let used = self.finish(memory, &packet, *length)?;
            unused.extend(packet.drain(used..));
            self.room -= packet.iter().map(|buffer| buffer.pieces.len()).sum::<usize>();
        }
        for buffer in unused.into_iter().rev() {
            self.buffers.push_front(buffer);
        }
        Ok(lengths.len())
    }

    /// Completes the header of a packet of `length` bytes and gives its buffers back to the guest. Returns how many
    /// of them it takes: none if it is dropped.
    fn finish(
        &mut self,
        memory: &GuestMemoryMmap,
        buffers: &[Buffer],
        length: usize,
    ) -> Result<usize, Fault> {
        let whole = || Pieces::concat(buffers.iter().map(|buffer| &buffer.pieces), length);
        if length <= HEADER || !self.offload.help(whole) {
            return Ok(0);
        }
        let mut covered = 0;
        let used = buffers
            .iter()
            .take_while(|buffer| {
                let wanted = covered < length;
                covered += buffer.pieces.len();
                wanted
            })
            .count();
        let used_number = u16::try_from(used).unwrap_or(u16::MAX);
        if let Some(first) = buffers.first() {
            first.pieces.write(NUM_BUFFERS, &used_number.to_le_bytes());
        }
        let mut left = length;
        for buffer in buffers.iter().take(used) {
            let part = left.min(buffer.pieces.len());
            left -= part;
            self.queue.push(memory, buffer.head, part)?;
        }
        self.counters.add(RECEIVED, 1);
        self.counters.add(RECEIVED + 1, (length - HEADER) as u64);
        Ok(used)
    }
}
