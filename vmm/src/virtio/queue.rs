//! A virtqueue as a device sees it (virtio 1.3 §2.7): chains come out as lists of guest memory, checked; used buffers
//! go back; notifications are suppressed in both directions while the device is busy.

use std::sync::Arc;

use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    Activation, Error, Interrupt,
    worker::{Fault, Poll},
};

/// Features that every device offers: virtio 1, suppression of notifications by index, indirect descriptors.
pub(crate) const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Longest chain taken, in pieces of host memory: what one `preadv` takes (IOV_MAX), and more than any driver sends.
pub(crate) const MAX_PIECES: usize = 1024;

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
}

impl<const N: usize> Given<N> {
    /// Takes an activation apart.
    pub fn new(device: &str, activation: Activation) -> Result<Self, Error> {
        let Activation { memory, features, queues, interrupt } = activation;
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
        Ok(Self { memory, features, queues, interrupt })
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
            if chain.readable.slices.len() + chain.writable.slices.len() > MAX_PIECES {
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

/// Pieces of guest memory, one after the other. The guest may change them at any time.
#[derive(Default, Clone)]
pub(crate) struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Segments<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // A chain is shorter than 4 GiB (virtio-queue), so this cannot overflow.
        self.length += slice.len();
        if !slice.is_empty() {
            self.slices.push(slice);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The pieces.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Takes the first `count` bytes off, or all of them if there are fewer.
    pub fn take(&mut self, count: usize) -> Segments<'m> {
        let mut taken = Segments::default();
        let mut whole = 0;
        for slice in &mut self.slices {
            let wanted = count - taken.length;
            if let Ok((front, rest)) = slice.split_at(wanted)
                && !rest.is_empty()
            {
                taken.push(front);
                *slice = rest;
                break;
            }
            taken.push(*slice);
            whole += 1;
        }
        self.slices.drain(..whole);
        self.length -= taken.length;
        taken
    }

    /// Copies from the front; returns how many bytes there were.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(rest) = buffer.get_mut(done..) else { break };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies to the front; returns how many bytes found room.
    pub fn write(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) else { break };
            let count = rest.len().min(slice.len());
            let Some(part) = rest.get(..count) else { break };
            if slice.write_slice(part, 0).is_err() {
                break;
            }
            done += count;
        }
        done
    }

    /// Takes an object off the front; nothing if there are too few bytes.
    pub fn take_object<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        let front = self.take(size_of::<T>());
        (front.read(object.as_mut_slice()) == size_of::<T>()).then_some(object)
    }
}

/// Pieces of guest memory for system calls, which can be kept while the guest waits for them.
#[derive(Default)]
pub(crate) struct Pieces {
    list: Vec<libc::iovec>,
    length: usize,
}

// SAFETY: the pointers are into guest memory, which any thread may use.
unsafe impl Send for Pieces {}

impl Pieces {
    /// The pieces of `segments`.
    ///
    /// # Safety
    ///
    /// The guest memory that `segments` come from must stay mapped as long as the result is used.
    pub unsafe fn new(segments: &Segments<'_>) -> Self {
        let list = segments
            .slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        Self { list, length: segments.length }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.length
    }

    /// The list for a system call. The guest may change what it points to at any time.
    pub fn list(&self) -> &[libc::iovec] {
        &self.list
    }

    /// The first `length` bytes of many pieces as one list.
    pub fn concat<'a>(parts: impl Iterator<Item = &'a Pieces>, length: usize) -> Self {
        let mut whole = Self::default();
        for piece in parts.flat_map(|part| &part.list) {
            let count = piece.iov_len.min(length - whole.length);
            if count == 0 {
                break;
            }
            whole.list.push(libc::iovec { iov_base: piece.iov_base, iov_len: count });
            whole.length += count;
        }
        whole
    }

    /// Copies from `offset` on; returns how many bytes there were.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        self.each(offset, |piece| {
            let Some(rest) = buffer.get_mut(done..) else { return false };
            done += piece.copy_to(rest);
            true
        });
        done
    }

    /// Copies to `offset` on, as far as there is room.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut data = data;
        self.each(offset, |piece| {
            let (now, later) = data.split_at(data.len().min(piece.len()));
            piece.copy_from(now);
            data = later;
            !data.is_empty()
        });
    }

    /// Hands out the pieces behind `offset` until `f` has had enough.
    fn each(&self, mut offset: usize, mut f: impl FnMut(VolatileSlice<'_>) -> bool) {
        for piece in &self.list {
            // SAFETY: a piece is guest memory, mapped while `self` is used (see `new`).
            let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
            match slice.offset(offset) {
                Ok(slice) if !slice.is_empty() => {
                    offset = 0;
                    if !f(slice) {
                        return;
                    }
                }
                _ => offset -= slice.len(),
            }
        }
    }
}

/// Reads a configuration space that is `space`; bytes past its end are zero.
pub(crate) fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let source = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(source) {
        *to = *from;
    }
}
