//! The memory map that the kernel is given: RAM, ACPI tables, and the reserved ECAM window.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// Type of a range, as in the BIOS call E820.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Memory to use.
    Ram = 1,
    /// Not to be touched without a driver that knows it.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// A range of physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What lies there.
    pub kind: Kind,
}

/// The memory map of a machine, by address.
pub fn build(memory: &GuestMemoryMmap) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, size: layout::LOW_RAM_END, kind: Kind::Ram },
        Range { start: layout::ACPI, size: layout::ACPI_END - layout::ACPI, kind: Kind::Acpi },
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(layout::HIGH_RAM);
        let end = region.start_addr().raw_value() + region.len();
        if end > start {
            map.push(Range { start, size: end - start, kind: Kind::Ram });
        }
    }
    map.push(Range { start: layout::ECAM, size: layout::ECAM_SIZE, kind: Kind::Reserved });
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_ordered_and_do_not_overlap() {
        for mib in [32, 3072, 8192] {
            let map = build(&crate::memory::map(mib, false).unwrap());
            assert!(map.windows(2).all(|pair| pair[0].start + pair[0].size <= pair[1].start), "{map:x?}");
            let ram: u64 = map.iter().filter(|r| r.kind == Kind::Ram).map(|r| r.size).sum();
            assert_eq!(ram, mib * layout::MIB - (layout::HIGH_RAM - layout::LOW_RAM_END));
        }
    }
}
