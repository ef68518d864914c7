//! A driver for tests: rings in real guest memory, an interrupt that can be waited for, and one that misbehaves.
//!
//! virtio-queue's `MockSplitQueue` serves for single chains (see `queue`'s tests); its rings overlap and do not
//! wrap around, so data is moved with the rings made here.

mod hostile;

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use virtio_bindings::virtio_ring;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Interrupt, Position};

/// Guest memory: 32 MiB, the second half behind a hole, so that addresses can be wrong in more ways.
const HALF: usize = 16 << 20;
const SECOND: u64 = 64 << 20;
/// Where the rings of queue `q` are: at `(q + 1) * RINGS`.
const RINGS: u64 = 0x10000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers are.
const BUFFERS: std::ops::Range<u64> = 1 << 20..HALF as u64;

pub(crate) use hostile::hostile;

const LIMIT: Duration = Duration::from_secs(20);

const NEXT: u16 = virtio_ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = virtio_ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = virtio_ring::VRING_DESC_F_INDIRECT as u16;

/// What a device told its driver.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Interrupts of each queue.
    pub queues: HashMap<u16, u64>,
    /// Configuration interrupts.
    pub config: u64,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
}

/// Interrupts that can be waited for.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    told: Mutex<Told>,
    news: Condvar,
}

impl Recorder {
    /// Waits until `enough` says so; fails the test after a while.
    pub fn wait(&self, what: &str, mut enough: impl FnMut(&Told) -> bool) {
        let end = Instant::now() + LIMIT;
        let mut told = self.told.lock().unwrap();
        while !enough(&told) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}; last seen: {told:?}");
            told = self.news.wait_timeout(told, left).unwrap().0;
        }
    }

    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told.lock().unwrap());
        self.news.notify_all();
    }
}

impl Interrupt for Recorder {
    fn signal_queue(&self, queue: u16) {
        self.tell(|told| *told.queues.entry(queue).or_default() += 1);
    }

    fn signal_config(&self) {
        self.tell(|told| told.config += 1);
    }

    fn needs_reset(&self) {
        self.tell(|told| told.needs_reset = true);
    }
}

struct Ring {
    base: u64,
    size: u16,
    bell: EventFd,
    free: Vec<u16>,
    avail: u16,
    used: u16,
    /// What was sent and has not come back: descriptors and writable buffers, by head.
    sent: HashMap<u16, Sent>,
}

/// Descriptors of a chain, and addresses and lengths of what the device may write.
type Sent = (Vec<u16>, Vec<(u64, usize)>);

/// A driver of one device.
pub(crate) struct Driver {
    pub memory: GuestMemoryMmap,
    pub interrupt: Arc<Recorder>,
    rings: Vec<Ring>,
    next_buffer: u64,
    event_idx: bool,
    indirect: bool,
    /// Times that a doorbell was rung.
    pub rung: u64,
}

impl Driver {
    pub fn new(queue_sizes: &[u16]) -> Self {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), HALF), (GuestAddress(SECOND), HALF)]).unwrap();
        let rings = (1u64..)
            .zip(queue_sizes)
            .map(|(number, size)| Ring {
                base: number * RINGS,
                size: *size,
                bell: EventFd::new(EFD_NONBLOCK).unwrap(),
                free: (0..*size).rev().collect(),
                avail: 0,
                used: 0,
                sent: HashMap::new(),
            })
            .collect();
        Self {
            memory,
            interrupt: Arc::new(Recorder::default()),
            rings,
            next_buffer: BUFFERS.start,
            event_idx: false,
            indirect: false,
            rung: 0,
        }
    }

    /// What the transport gives a device; `features` are those that were negotiated.
    pub fn activation(&mut self, features: u64) -> Activation {
        self.event_idx = features & 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = self
            .rings
            .iter()
            .map(|ring| {
                let mut queue = Queue::new(ring.size).unwrap();
                queue.set_desc_table_address(Some(ring.base as u32), Some(0));
                queue.set_avail_ring_address(Some((ring.base + AVAIL) as u32), Some(0));
                queue.set_used_ring_address(Some((ring.base + USED) as u32), Some(0));
                queue.set_ready(true);
                (queue, ring.bell.try_clone().unwrap())
            })
            .collect();
        Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
            restored: false,
        }
    }

    /// What the transport gives a device that goes on where another one stood when it was paused.
    pub fn restored(&mut self, features: u64, positions: &[Position]) -> Activation {
        assert_eq!(positions.len(), self.rings.len());
        let mut activation = self.activation(features);
        activation.restored = true;
        for ((queue, bell), (taken, given)) in activation.queues.iter_mut().zip(positions) {
            queue.set_next_avail(*taken);
            queue.set_next_used(*given);
            bell.write(1).unwrap();
        }
        activation
    }

    /// Sends chains through indirect descriptor tables from now on.
    pub fn use_indirect(&mut self) {
        self.indirect = true;
    }

    /// A place for `length` bytes; places are used again after 15 MiB.
    pub fn place(&mut self, length: usize) -> u64 {
        if self.next_buffer + length as u64 > BUFFERS.end {
            self.next_buffer = BUFFERS.start;
        }
        let place = self.next_buffer;
        self.next_buffer += length as u64;
        place
    }

    fn describe(&self, table: u64, index: u16, address: u64, length: usize, flags: u16, next: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Sends a chain: what the device reads, and how long the buffers are that it writes. Returns its head.
    pub fn send(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let mut buffers = Vec::new();
        for data in readable {
            let place = self.place(data.len());
            self.memory.write_slice(data, GuestAddress(place)).unwrap();
            buffers.push((place, data.len(), 0));
        }
        for length in writable {
            buffers.push((self.place(*length), *length, WRITE));
        }
        self.send_buffers(queue, &buffers)
    }

    fn send_buffers(&mut self, queue: u16, buffers: &[(u64, usize, u16)]) -> u16 {
        let last = buffers.len() - 1;
        let indirect = self.indirect.then(|| self.place(buffers.len() * 16));
        let ring = &mut self.rings[usize::from(queue)];
        let base = ring.base;
        let own: Vec<u16> = (0..if indirect.is_some() { 1 } else { buffers.len() })
            .map(|_| ring.free.pop().expect("the ring is full"))
            .collect();
        let head = own[0];
        let writable = buffers.iter().filter(|b| b.2 & WRITE != 0).map(|b| (b.0, b.1)).collect();
        for (i, (address, length, flags)) in buffers.iter().enumerate() {
            let flags = flags | if i < last { NEXT } else { 0 };
            match indirect {
                Some(table) => self.describe(table, i as u16, *address, *length, flags, i as u16 + 1),
                None => self.describe(
                    base,
                    own[i],
                    *address,
                    *length,
                    flags,
                    own.get(i + 1).copied().unwrap_or_default(),
                ),
            }
        }
        if let Some(table) = indirect {
            self.describe(base, head, table, buffers.len() * 16, INDIRECT, 0);
        }
        self.rings[usize::from(queue)].sent.insert(head, (own, writable));
        self.offer(queue, head);
        head
    }

    /// Puts `head` into the available ring and rings the bell if the device wants that.
    fn offer(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let (avail, used) = (ring.base + AVAIL, ring.base + USED);
        let slot = avail + 4 + 2 * u64::from(ring.avail % ring.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.store(ring.avail, GuestAddress(avail + 2), std::sync::atomic::Ordering::Release).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.memory.read_obj(GuestAddress(used + 4 + 8 * u64::from(ring.size))).unwrap();
            // virtio 1.3 §2.7.10: one chain was added, so only this index can be the awaited one.
            event == ring.avail.wrapping_sub(1)
        } else {
            let flags: u16 = self.memory.read_obj(GuestAddress(used)).unwrap();
            flags & 1 == 0
        };
        if wanted {
            self.rung += 1;
            ring.bell.write(1).unwrap();
        }
    }

    /// The next used buffer, if there is one: its head and what was written.
    pub fn used(&mut self, queue: u16) -> Option<(u16, Vec<u8>)> {
        let ring = &mut self.rings[usize::from(queue)];
        let used = ring.base + USED;
        let index: u16 =
            self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap();
        if index == ring.used {
            // Ask for an interrupt with the next one.
            let event = ring.base + AVAIL + 4 + 2 * u64::from(ring.size);
            self.memory.write_obj(ring.used, GuestAddress(event)).unwrap();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let index: u16 =
                self.memory.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap();
            if index == ring.used {
                return None;
            }
        }
        let slot = GuestAddress(used + 4 + 8 * u64::from(ring.used % ring.size));
        let [head, length]: [u32; 2] = self.memory.read_obj(slot).unwrap();
        ring.used = ring.used.wrapping_add(1);
        let (own, writable) =
            ring.sent.remove(&(head as u16)).unwrap_or_else(|| panic!("{head} came back, but was not sent"));
        ring.free.extend(own);
        let mut left = length as usize;
        let mut written = Vec::new();
        for (address, size) in writable {
            let mut part = vec![0; size.min(left)];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            left -= part.len();
            written.extend(part);
        }
        assert_eq!(left, 0, "the device says it wrote more than it was given");
        Some((head as u16, written))
    }

    /// Waits for a used buffer and returns what was written to it.
    pub fn wait(&mut self, queue: u16) -> Vec<u8> {
        self.wait_head(queue).1
    }

    /// Waits for a used buffer.
    pub fn wait_head(&mut self, queue: u16) -> (u16, Vec<u8>) {
        loop {
            let before = self.interrupt.told().queues.get(&queue).copied().unwrap_or_default();
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.interrupt.wait(&format!("a used buffer of queue {queue}"), |told| {
                assert!(!told.needs_reset, "the device needs a reset");
                told.queues.get(&queue).copied().unwrap_or_default() != before
            });
        }
    }

    /// Buffers of a queue that are with the device.
    pub fn outstanding(&self, queue: u16) -> usize {
        self.rings[usize::from(queue)].sent.len()
    }

    /// Rings the bell of `queue` although nothing asks for it.
    pub fn ring(&self, queue: u16) {
        self.rings[usize::from(queue)].bell.write(1).unwrap();
    }
}
