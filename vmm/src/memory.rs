//! Guest memory: private anonymous mappings around the hole below 4 GiB, which live as long as the process.

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::layout::{HOLE, HOLE_END, MIB};

/// Size and alignment in bytes of the pages that a processor's second stage of address translation likes best.
const HUGE_PAGE: usize = 2 << 20;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host did not map it.
    #[error("cannot map {mib} MiB of guest memory: {source}; give the machine less memory")]
    Map {
        /// What was asked for.
        mib: u64,
        /// What the host said.
        source: io::Error,
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

/// Map `mib` MiB. Nothing is taken from the host before the guest touches it; with `huge`, it then is in pages of 2 MiB
/// where the host has them and does not refuse (`/sys/kernel/mm/transparent_hugepage/enabled`).
pub fn map(mib: u64, huge: bool) -> Result<GuestMemoryMmap, Error> {
    let failed = |source| Error::Map { mib, source };
    let mut regions = Vec::new();
    for (at, length) in ranges(mib) {
        let region = aligned(length as usize, huge).map_err(failed)?;
        // It ends far below the largest address.
        regions.extend(GuestRegionMmap::new(region, GuestAddress(at)));
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}

/// A mapping that begins at a multiple of [`HUGE_PAGE`]: guest and host addresses must agree in their low bits for KVM to
/// map large pages, and kernels before 6.7 place mappings anywhere.
fn aligned(length: usize, huge: bool) -> io::Result<MmapRegion> {
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    let room = length.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping of which nobody knows.
    let whole = unsafe { libc::mmap(std::ptr::null_mut(), room, access, flags, -1, 0) };
    if whole == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = (whole as usize).wrapping_neg() % HUGE_PAGE;
    let start = whole.wrapping_byte_add(before);
    // SAFETY: both ends of the mapping above, outside of the part that is kept, and used by nobody.
    unsafe {
        if before > 0 {
            libc::munmap(whole, before);
        }
        libc::munmap(start.wrapping_byte_add(length), HUGE_PAGE - before);
    }
    if huge {
        // SAFETY: advice about a mapping of ours. A kernel without huge pages refuses it, and small ones will do.
        unsafe { libc::madvise(start, length, libc::MADV_HUGEPAGE) };
    }
    keep_out_of_core_dumps(start.cast(), length);
    // SAFETY: a mapping with this access and these flags, which is never unmapped.
    unsafe { MmapRegion::build_raw(start.cast(), length, access, flags) }.map_err(io::Error::other)
}

/// What a guest has in its memory is not to lie about in the dump of a monitor that has crashed, and its size does not help
/// either.
pub fn keep_out_of_core_dumps(start: *mut u8, length: usize) {
    // SAFETY: advice that changes nothing of what is in memory; an address that is not mapped is refused.
    unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTDUMP) };
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
        let memory = map(65536, true).unwrap();
        assert_eq!(memory.last_addr(), GuestAddress(65 * GIB - 1));
    }

    /// What the kernel says of the mapping at an address (proc_pid_smaps(5)).
    fn flags(address: usize) -> Vec<String> {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let range = range.map(|(from, to)| [from, to].map(|end| usize::from_str_radix(end, 16)));
            if let Some([Ok(from), Ok(to)]) = range {
                inside = (from..to).contains(&address);
            } else if let Some(flags) = line.strip_prefix("VmFlags: ").filter(|_| inside) {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("nothing is mapped at {address:#x}");
    }

    #[test]
    fn memory_is_for_huge_pages_and_not_for_core_dumps() {
        for mib in [65, 3073] {
            for region in map(mib, true).unwrap().iter() {
                let start = region.as_ptr() as usize;
                assert_eq!(start % HUGE_PAGE, 0);
                let flags = flags(start + region.len() as usize - 4096);
                assert!(flags.contains(&"dd".to_owned()), "{flags:?}");
                // No such flag where the kernel knows no such pages.
                if std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
                    assert!(flags.contains(&"hg".to_owned()), "{flags:?}");
                }
            }
        }
    }
}
