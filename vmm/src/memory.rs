//! Guest memory: private anonymous mappings around the hole below 4 GiB.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::{HOLE, HOLE_END, MIB};

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host did not map it.
    #[error("cannot map {mib} MiB of guest memory: {source}; give the machine less memory")]
    Map {
        /// What was asked for.
        mib: u64,
        /// What the host said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM did not take it.
    #[error("KVM refused {mib} MiB of guest memory: {source}")]
    Kvm {
        /// What was asked for.
        mib: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// Ranges of RAM (address, length in bytes) of a machine with `mib` MiB.
pub fn ranges(mib: u64) -> Vec<(u64, u64)> {
    let bytes = mib.saturating_mul(MIB);
    let low = bytes.min(HOLE);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

/// Map `mib` MiB. Nothing is taken from the host before the guest touches it.
pub fn map(mib: u64) -> Result<GuestMemoryMmap, Error> {
    let ranges: Vec<_> = ranges(mib).into_iter().map(|(at, len)| (GuestAddress(at), len as usize)).collect();
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| Error::Map { mib, source })
}

/// Make `memory` the RAM of `vm`. The caller keeps `memory` alive as long as the machine exists.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    let mut total = 0;
    for (slot, region) in memory.iter().enumerate() {
        total += region.len();
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping owned by `memory`, which outlives the machine as the contract of this
        // function says; nothing but guest memory lives in it.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|source| Error::Kvm { mib: total / MIB, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ranges(128), [(0, 128 * MIB)]);
        assert_eq!(ranges(3072), [(0, 3 * GIB)]);
        assert_eq!(ranges(3073), [(0, 3 * GIB), (4 * GIB, MIB)]);
        assert_eq!(ranges(65536), [(0, 3 * GIB), (4 * GIB, 61 * GIB)]);
    }

    #[test]
    fn the_largest_machine_can_be_mapped() {
        let memory = map(65536).unwrap();
        assert_eq!(memory.last_addr(), GuestAddress(65 * GIB - 1));
    }
}
