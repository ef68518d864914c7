//! A function's configuration space: 256 bytes, of which some bits can be written.

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: decode memory, be bus master, raise no INTx.
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A BAR's low bits: 64 bits wide, prefetchable memory.
const BAR_64_PREFETCHABLE: u8 = 0b1100;

/// The first 256 bytes of a function's configuration space; the rest of its 4 KiB reads as zero.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// Where the next capability goes, and the byte that will point at it.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A type 0 header (PCI 3.0 §6.1). `class` is class, subclass, programming interface in 24 bits.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let mut space =
            Self { bytes: [0; 256], writable: [0; 256], next: FIRST_CAPABILITY, link: CAPABILITIES };
        space.set(0x00, &vendor.to_le_bytes());
        space.set(0x02, &device.to_le_bytes());
        space.set(0x08, &[revision]);
        space.set(0x09, &class.to_le_bytes()[..3]);
        // Cache line size and interrupt line are the guest's to keep.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space
    }

    /// Give the subsystem ids.
    pub fn set_subsystem(&mut self, vendor: u16, id: u16) {
        self.set(0x2c, &vendor.to_le_bytes());
        self.set(0x2e, &id.to_le_bytes());
    }

    /// Make BARs 0 and 1 one 64-bit BAR of `size` bytes (a power of two) at `address`, not decoded yet.
    pub fn set_bar(&mut self, size: u64, address: u64) {
        self.allow(BAR0, &(!(size - 1) & !0xf).to_le_bytes());
        self.set(BAR0, &address.to_le_bytes());
        if let Some(low) = self.bytes.get_mut(BAR0) {
            *low |= BAR_64_PREFETCHABLE;
        }
    }

    /// Append a capability: id, then (after the link that is kept here) `body`, of which the bits in `writable` can be
    /// written. Its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.link, &[at as u8]);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at as u16
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8; 256] {
        &self.bytes
    }

    /// Where the BAR is decoded, if it is.
    pub fn bar(&self) -> Option<u64> {
        let decoded = self.bytes.get(COMMAND)? & COMMAND_MEMORY != 0;
        decoded.then(|| self.get::<8>(BAR0).map(u64::from_le_bytes)).flatten().map(|bar| bar & !0xf)
    }

    /// `N` bytes at `offset`.
    pub fn get<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    /// A guest's read.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A guest's write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, new) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// Set bytes, whether they can be written or not.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }

    fn allow(&mut self, offset: usize, bits: &[u8]) {
        for (mask, new) in self.writable.iter_mut().skip(offset).zip(bits) {
            *mask = *new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(space: &ConfigSpace, offset: usize) -> u32 {
        u32::from_le_bytes(space.get(offset).unwrap())
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = ConfigSpace::new(1, 2, 3, 4);
        space.set_bar(0x8000, 0xc000_0000);
        assert_eq!(space.bar(), None, "not decoded at first");
        space.write(0x10, &u32::MAX.to_le_bytes());
        space.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!((u32_at(&space, 0x10), u32_at(&space, 0x14)), (0xffff_800c, u32::MAX));
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        space.write(0x14, &1u32.to_le_bytes());
        space.write(0x04, &[2]);
        assert_eq!(space.bar(), Some(0x1_d000_0000));
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = ConfigSpace::new(1, 2, 3, 4);
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(17, &[4, 5], &[0, 0x80]);
        assert_eq!(space.get::<1>(0x34), Some([first as u8]));
        assert_eq!(space.get::<2>(first.into()), Some([9, second as u8]));
        assert_eq!(space.get::<2>(second.into()), Some([17, 0]));
        assert_eq!(second % 4, 0);
        space.write(second, &[0xff; 4]);
        assert_eq!(space.get::<4>(second.into()), Some([17, 0, 4, 0x85]));
    }
}
