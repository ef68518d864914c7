//! A virtqueue as a device sees it (virtio 1.3 §2.7): chains come out as lists of guest memory, checked; used buffers
//! go back; notifications are suppressed in both directions while the device is busy.

use std::sync::Arc;

use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    Activation, Error, Interrupt,
    segments::Segments,
    worker::{Fault, Poll},
};

/// Features that every device offers: virtio 1, suppression of notifications by index, indirect descriptors.
pub(crate) const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Longest chain taken, in pieces of host memory: what one `preadv` takes (IOV_MAX), and more than any driver sends.
pub(crate) const MAX_PIECES: usize = 1024;

/// Offset of the entries in the available ring (virtio 1.3 §2.7.6).
const AVAIL_ENTRIES: u64 = 4;

/// How far a device has come in a queue: chains taken from the driver and given back, modulo 2^16.
pub type Position = (u16, u16);

/// What a driver gave a device of `N` queues.
pub(crate) struct Given<const N: usize> {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Negotiated features.
    pub features: u64,
    /// The queues in order.
    pub queues: [DeviceQueue; N],
    /// Its interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// Whether the driver knows the device from before a snapshot.
    pub restored: bool,
}

impl<const N: usize> Given<N> {
    /// Takes an activation apart.
    pub fn new(device: &str, activation: Activation) -> Result<Self, Error> {
        let Activation { memory, features, queues, interrupt, restored } = activation;
        let event_idx = features & 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
        let queues: Vec<DeviceQueue> = (0u16..)
            .zip(queues)
            .map(|(index, (mut queue, bell))| {
                queue.set_event_idx(event_idx);
                DeviceQueue { queue, bell, index, interrupt: Arc::clone(&interrupt), used: 0 }
            })
            .collect();
        let given = queues.len();
        let queues = queues
            .try_into()
            .map_err(|_| Error::Device(format!("{device}: activated with {given} queues instead of {N}")))?;
        Ok(Self { memory, features, queues, interrupt, restored })
    }
}

/// A queue, its doorbell and its interrupt.
pub(crate) struct DeviceQueue {
    queue: Queue,
    bell: EventFd,
    index: u16,
    interrupt: Arc<dyn Interrupt>,
    /// Buffers given back since the driver was last told.
    used: usize,
}

impl DeviceQueue {
    /// Checks where the rings are and starts waiting for the doorbell, whose token is the queue's index. The bell is
    /// edge-triggered, so nobody has to read it.
    pub fn start(&self, memory: &GuestMemoryMmap, poll: &Poll) -> Result<(), Fault> {
        if !self.queue.ready() {
            return Ok(());
        }
        if !self.queue.is_valid(memory) {
            return Err(self.fault("rings that lie outside its memory"));
        }
        poll.add(&self.bell, EventSet::IN | EventSet::EDGE_TRIGGERED, u64::from(self.index))
            .map_err(|source| Fault::Io { action: "wait for a doorbell", source })
    }

    /// The next chain, if there is one.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let index = self.index;
        let queue_error = |source| Fault::Queue { queue: index, source };
        let Some(descriptors) = self.queue.iter(memory).map_err(queue_error)?.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Segments::default(), writable: Segments::default() };
        // virtio-queue ends a chain silently at what is wrong with it; then the descriptor before has promised more.
        let mut more = true;
        for descriptor in descriptors {
            more = descriptor.has_next();
            let (segments, permissions) = if descriptor.is_write_only() {
                (&mut chain.writable, Permissions::Write)
            } else if chain.writable.is_empty() {
                (&mut chain.readable, Permissions::Read)
            } else {
                return Err(self.fault("a readable buffer behind a writable one"));
            };
            let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let slices = memory
                .get_slices(descriptor.addr(), length, permissions)
                .map_err(|_| self.fault("a buffer outside its memory"))?;
            for slice in slices {
                segments.push(slice.map_err(|_| self.fault("a buffer outside its memory"))?);
            }
            if chain.readable.slices().len() + chain.writable.slices().len() > MAX_PIECES {
                return Err(self.fault("a chain of more than 1024 pieces"));
            }
        }
        if more {
            return Err(self.fault("a chain that does not end"));
        }
        Ok(Some(chain))
    }

    /// Puts the last chain back that [`Self::pop`] gave: it will come again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Puts all chains back that were taken and not given back, in the order in which they were taken; the driver stands
    /// still. Others that were taken between them may have been given back before them, and then the available ring has
    /// those in their places: these are written to it, which is the driver's (virtio 1.3 §2.7.6), but never read by one. So
    /// how far the device has come is all that a snapshot needs to know.
    pub fn put_back(&mut self, memory: &GuestMemoryMmap, heads: impl ExactSizeIterator<Item = u16>) {
        for _ in 0..heads.len() {
            self.undo_pop();
        }
        let mut index = self.queue.next_avail();
        for head in heads {
            let slot =
                self.queue.avail_ring() + AVAIL_ENTRIES + 2 * u64::from(index % self.queue.size().max(1));
            // The ring was found to lie in memory when the device started.
            let _ = memory.write_obj(head.to_le(), GuestAddress(slot));
            index = index.wrapping_add(1);
        }
    }

    /// How far the device has come.
    pub fn position(&self) -> Position {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Gives a chain back, with `length` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, length: usize) -> Result<(), Fault> {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.used += 1;
        self.queue.add_used(memory, head, length).map_err(|source| Fault::Queue { queue: self.index, source })
    }

    /// Number of chains given back since the driver was last told.
    pub fn untold(&self) -> usize {
        self.used
    }

    /// Tells the driver that chains came back, if some did and it wants to know.
    pub fn tell(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        if std::mem::take(&mut self.used) == 0 {
            return Ok(());
        }
        let wanted = self
            .queue
            .needs_notification(memory)
            .map_err(|source| Fault::Queue { queue: self.index, source })?;
        if wanted {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to ring while the device looks by itself.
    pub fn silence(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue.disable_notification(memory).map_err(|source| Fault::Queue { queue: self.index, source })
    }

    /// Asks the driver to ring for the next chain. If one came in the meantime, returns true: the device must look
    /// again, no ring will tell of it.
    pub fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(memory).map_err(|source| Fault::Queue { queue: self.index, source })
    }

    /// Rings the queue's own bell: there is more to do after other events were looked at.
    pub fn ring(&self) {
        // Fails only if the counter is at its end, which rings too.
        let _ = self.bell.write(1);
    }

    /// Number of entries of the ring.
    pub fn size(&self) -> usize {
        usize::from(self.queue.size())
    }

    /// A fault of this queue.
    pub fn fault(&self, what: &'static str) -> Fault {
        Fault::Chain { queue: self.index, what }
    }
}

/// A descriptor chain: what the device may read, then what it may write.
pub(crate) struct Chain<'m> {
    /// Index of its first descriptor, by which it is given back.
    pub head: u16,
    /// From the driver.
    pub readable: Segments<'m>,
    /// For the driver.
    pub writable: Segments<'m>,
}

/// Reads a configuration space that is `space`; bytes past its end are zero.
pub(crate) fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let source = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(source) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::virtio::testing::Recorder;

    const NEXT: u16 = virtio_ring::VRING_DESC_F_NEXT as u16;
    const WRITE: u16 = virtio_ring::VRING_DESC_F_WRITE as u16;
    const INDIRECT: u16 = virtio_ring::VRING_DESC_F_INDIRECT as u16;

    /// Address, length, flags, next.
    type Shape = (u64, u32, u16, u16);

    /// What comes out of a queue with these descriptors, the first of which is a chain's head.
    fn pop(descriptors: &[Shape]) -> Result<(usize, usize), String> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        for (index, (address, length, flags, next)) in (0u16..).zip(descriptors) {
            let descriptor = RawDescriptor::from(Descriptor::new(*address, *length, *flags, *next));
            mock.desc_table().store(index, descriptor).unwrap();
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let mut queue = DeviceQueue {
            queue: mock.create_queue().unwrap(),
            bell: EventFd::new(EFD_NONBLOCK).unwrap(),
            index: 5,
            interrupt: Arc::new(Recorder::default()),
            used: 0,
        };
        match queue.pop(&memory) {
            Ok(chain) => {
                let chain = chain.expect("there is a chain");
                assert!(queue.pop(&memory).unwrap().is_none());
                Ok((chain.readable.len(), chain.writable.len()))
            }
            Err(fault) => Err(fault.to_string()),
        }
    }

    #[test]
    fn sound_chains_come_out() {
        assert_eq!(pop(&[(0x1000, 16, 0, 0)]), Ok((16, 0)));
        let chain =
            [(0x1000, 16, NEXT, 2), (0x3000, 1, WRITE, 0), (0x2000, 512, NEXT | WRITE, 1), (0, 0, 0, 0)];
        assert_eq!(pop(&chain), Ok((16, 513)));
        // Up to the last byte of memory.
        assert_eq!(pop(&[(0xfff0, 16, WRITE, 0)]), Ok((0, 16)));
    }

    #[test]
    fn unsound_chains_are_faults() {
        let cases: [(&[Shape], &str); 9] = [
            (&[(0x1000, 16, NEXT, 0)], "a chain that does not end"),
            (&[(0x1000, 16, NEXT, 1), (0x1000, 16, NEXT, 0)], "a chain that does not end"),
            (&[(0x1000, 16, NEXT, 16)], "a chain that does not end"),
            (&[(0x1000, 16, NEXT | WRITE, 1), (0x1000, 16, 0, 0)], "a readable buffer behind a writable one"),
            (&[(0xfff1, 16, 0, 0)], "a buffer outside its memory"),
            (&[(u64::MAX - 3, 16, WRITE, 0)], "a buffer outside its memory"),
            (&[(0x1000, u32::MAX, 0, 0)], "a buffer outside its memory"),
            (&[(0x1000, 17, INDIRECT, 0)], "a chain that does not end"),
            (&[(0x20000, 16, INDIRECT, 0)], "a chain that does not end"),
        ];
        for (descriptors, expected) in cases {
            let told = pop(descriptors).unwrap_err();
            assert_eq!(told, format!("queue 5: the guest sent {expected}"), "{descriptors:x?}");
        }
    }

    #[test]
    fn configuration_ends() {
        let mut data = [7; 6];
        read_config(&[1, 2, 3, 4], 2, &mut data);
        assert_eq!(data, [3, 4, 0, 0, 0, 0]);
        read_config(&[1, 2, 3, 4], u64::MAX, &mut data);
        assert_eq!(data, [0; 6]);
    }
}
