//! Guest memory in pieces, as a chain describes it: read, written, or handed to the kernel as it is.

use vm_memory::{ByteValued, Bytes, VolatileSlice};

/// Pieces of guest memory, one after the other. The guest may change them at any time.
#[derive(Default, Clone)]
pub(crate) struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Segments<'m> {
    /// Adds a piece at the end.
    pub fn push(&mut self, slice: VolatileSlice<'m>) {
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

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

    use super::*;

    #[test]
    fn segments_are_taken_apart_anywhere() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        for cut in 0..=30 {
            let mut segments = Segments::default();
            for address in [0x100, 0x300, 0x200] {
                let slice = memory.get_slices(GuestAddress(address), 10, Permissions::Write).unwrap().next();
                segments.push(slice.unwrap().unwrap());
            }
            let data: Vec<u8> = (0..40).collect();
            assert_eq!(segments.write(&data), 30);
            let front = segments.take(cut);
            assert_eq!((front.len(), segments.len()), (cut, 30 - cut));
            let mut read = vec![0; 40];
            let count = front.read(&mut read);
            assert_eq!(count + segments.read(&mut read[count..]), 30);
            assert_eq!(read[..30], data[..30]);
            // SAFETY: `memory` lives to the end of this test.
            let pieces = unsafe { Pieces::new(&segments) };
            pieces.write(1, &[99; 50]);
            let mut read = vec![0; 40];
            assert_eq!(pieces.read(0, &mut read), 30 - cut);
            assert!(read[..30 - cut].iter().skip(1).all(|byte| *byte == 99), "{read:?}");
        }
    }
}
