//! CPUID: what KVM supports, with this machine's topology, and without what a snapshot does not keep or what guests are
//! better off without: a PMU, AMX, CET, WAITPKG, and, unless they want it, nested virtualization.
//!
//! The guest sees one package of N cores of one thread each; the APIC id of core i is i.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::host_kernel;

/// What a CPU of this host can be, before it is told which CPU of the guest it is.
pub struct Template {
    /// What KVM says.
    supported: Vec<kvm_cpuid_entry2>,
    /// What guests are told of it.
    cpuid: CpuId,
    amd: bool,
}

impl Template {
    /// Ask KVM.
    ///
    /// With `nested`, guests find VMX or SVM where KVM offers it.
    pub fn new(kvm: &Kvm, nested: bool) -> Result<Self, kvm_ioctls::Error> {
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let supported = cpuid.as_slice().to_vec();
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let async_page_faults = host_kernel::async_page_faults();
        for entry in cpuid.as_mut_slice() {
            common(entry, tsc_deadline);
            if !nested {
                hide_virtualization(entry);
            }
            if !async_page_faults {
                hide_async_page_faults(entry);
            }
        }
        let amd = cpuid.as_slice().iter().any(|entry| entry.function == 0 && is_amd(entry));
        Ok(Self { supported, cpuid, amd })
    }

    /// All that KVM offers on this host.
    pub fn supported(&self) -> &[kvm_cpuid_entry2] {
        &self.supported
    }

    /// Whether guests can run virtual machines.
    pub fn is_nested(&self) -> bool {
        is_nested(self.cpuid.as_slice())
    }

    /// Bits of a physical address.
    pub fn physical_bits(&self) -> u32 {
        self.cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xff)
    }

    /// CPUID of CPU `index` of `count`.
    pub fn cpu(&self, index: u8, count: u8) -> Result<CpuId, kvm_ioctls::Error> {
        let mut entries = Vec::with_capacity(self.cpuid.as_slice().len());
        for entry in self.cpuid.as_slice() {
            // These leaves are made whole below.
            if !matches!(entry.function, 0xb | 0x1f) {
                let mut entry = *entry;
                topology(&mut entry, self.amd, index, count);
                entries.push(entry);
            }
        }
        let highest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
        for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= highest) {
            entries.extend(extended_topology(leaf, index, count));
        }
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
    }
}

/// Whether leaf 0 names AMD or Hygon, which copies it.
fn is_amd(leaf: &kvm_cpuid_entry2) -> bool {
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

/// Bits of an APIC id that count the cores of the package.
fn core_bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

/// What is the same for every CPU of the machine.
fn common(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
    match (entry.function, entry.index) {
        (1, _) => {
            set(&mut entry.ecx, 24, tsc_deadline);
            // Runs under a hypervisor.
            set(&mut entry.ecx, 31, true);
            // No performance monitoring (PDCM): a guest would only start its NMI watchdog with it.
            set(&mut entry.ecx, 15, false);
        }
        (7, 0) => {
            // WAITPKG: a guest would wait for as long as it likes. SHSTK: a snapshot has no shadow stack pointer.
            set(&mut entry.ecx, 5, false);
            set(&mut entry.ecx, 7, false);
            // IBT; AMX_BF16, AMX_TILE, AMX_INT8. KVM before Linux 6.4 offers AMX in part to who has not asked for its
            // 8 KiB of state, and guests die at boot.
            for bit in [20, 22, 24, 25] {
                set(&mut entry.edx, bit, false);
            }
        }
        // AMX_FP16; AMX_COMPLEX.
        (7, 1) => {
            set(&mut entry.eax, 21, false);
            set(&mut entry.edx, 8, false);
        }
        // XTILECFG and XTILEDATA.
        (0xd, 0) => entry.eax &= !(1 << 17 | 1 << 18),
        // XFD, which AMX alone has; CET_U and CET_S.
        (0xd, 1) => {
            set(&mut entry.eax, 4, false);
            entry.ecx &= !(1 << 11 | 1 << 12);
        }
        // Performance monitoring: none, neither Intel's nor AMD's. The components of CET and AMX; AMX's tiles.
        (0xa | 0x8000_0022, _) | (0xd, 11 | 12 | 17 | 18) | (0x1d | 0x1e, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (0x8000_0001, _) => {
            // SKINIT.
            set(&mut entry.ecx, 12, false);
            set(&mut entry.ecx, 23, false);
            set(&mut entry.ecx, 24, false);
            set(&mut entry.ecx, 28, false);
        }
        // No time stamp counter that never stops: a guest then keeps time by KVM's clock, which alone goes on from where
        // it was when the machine is paused or restored.
        (0x8000_0007, _) => set(&mut entry.edx, 8, false),
        _ => {}
    }
}

/// Neither VMX nor SVM: who does not want machines in a machine finds no door to them.
fn hide_virtualization(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => set(&mut entry.ecx, 5, false),
        0x8000_0001 => set(&mut entry.ecx, 2, false),
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Whether CPUs that are told this can run virtual machines.
pub fn is_nested(told: &[kvm_cpuid_entry2]) -> bool {
    told.iter().any(|entry| match entry.function {
        1 => entry.ecx & 1 << 5 != 0,
        0x8000_0001 => entry.ecx & 1 << 2 != 0,
        _ => false,
    })
}

/// KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT (Linux, virt/kvm/x86/cpuid.rst): before Linux 5.13, a guest that waits for a page
/// in this way spins.
fn hide_async_page_faults(entry: &mut kvm_cpuid_entry2) {
    if entry.function == 0x4000_0001 {
        for bit in [4, 10, 14] {
            set(&mut entry.eax, bit, false);
        }
    }
}

/// Where the CPU stands in the machine.
fn topology(entry: &mut kvm_cpuid_entry2, amd: bool, index: u8, count: u8) {
    let many = count > 1;
    match entry.function {
        1 => {
            let logical = 1 << core_bits(count);
            entry.ebx = entry.ebx & 0xffff | u32::from(index) << 24 | logical << 16;
            set(&mut entry.edx, 28, many);
        }
        // Intel's caches: shared by one thread up to level 2, by the package from level 3; cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let cores = (1u32 << core_bits(count)) - 1;
            let sharing = if level >= 3 { cores } else { 0 };
            entry.eax = entry.eax & 0x3fff | cores << 26 | sharing << 14;
        }
        // AMD's caches, the same.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        // Core multiprocessing with legacy ids; topology extensions stay as KVM has them.
        0x8000_0001 if amd => set(&mut entry.ecx, 1, many),
        0x8000_0008 if amd => entry.ecx = core_bits(count) << 12 | (u32::from(count) - 1),
        // AMD: APIC id, core id with one thread each, node 0 of 1.
        0x8000_001e => {
            entry.eax = index.into();
            entry.ebx = index.into();
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The leaves 0xB and 0x1F: level 0 is the thread (one), level 1 the core.
fn extended_topology(leaf: u32, index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |number: u32, kind: u32, shift: u32, cpus: u32| kvm_cpuid_entry2 {
        function: leaf,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: number | kind << 8,
        edx: index.into(),
        ..Default::default()
    };
    [level(0, 1, 0, 1), level(1, 2, core_bits(count), count.into()), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn a_cpu_knows_its_place() {
        let mut one = entry(1);
        topology(&mut one, false, 5, 6);
        assert_eq!(one.ebx >> 24, 5);
        assert_eq!(one.ebx >> 16 & 0xff, 8, "room for 6 cores");
        assert_ne!(one.edx & 1 << 28, 0);
        let mut alone = entry(1);
        topology(&mut alone, false, 0, 1);
        assert_eq!(alone.edx & 1 << 28, 0, "no HTT with one CPU");
        let levels = extended_topology(0xb, 5, 6);
        assert_eq!((levels[1].eax, levels[1].ebx, levels[1].edx), (3, 6, 5));
        assert_eq!(levels[2].ecx >> 8, 0, "the last level ends the list");
    }

    #[test]
    fn amd_has_leaves_of_its_own() {
        let words = |text: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
            kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..Default::default() }
        };
        assert!(is_amd(&words(b"AuthenticAMD")) && is_amd(&words(b"HygonGenuine")));
        assert!(!is_amd(&words(b"GenuineIntel")));
        let mut size = entry(0x8000_0008);
        topology(&mut size, true, 0, 6);
        assert_eq!(size.ecx, 3 << 12 | 5);
        let mut size = entry(0x8000_0008);
        topology(&mut size, false, 0, 6);
        assert_eq!(size.ecx, u32::MAX, "reserved on other CPUs");
    }

    #[test]
    fn what_a_snapshot_does_not_keep_is_not_shown() {
        let told = |function, index| {
            let mut leaf = kvm_cpuid_entry2 { index, ..entry(function) };
            common(&mut leaf, true);
            hide_virtualization(&mut leaf);
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
        };
        let without = |bits: &[u32]| bits.iter().fold(u32::MAX, |word, bit| word & !(1 << bit));
        assert_eq!(told(1, 0)[2], without(&[5, 15]), "VMX");
        assert_eq!(told(7, 0), [u32::MAX, u32::MAX, without(&[5, 7]), without(&[20, 22, 24, 25])]);
        assert_eq!(told(7, 1), [without(&[21]), u32::MAX, u32::MAX, without(&[8])]);
        assert_eq!(told(0xd, 0)[0], without(&[17, 18]), "AMX is not permitted");
        assert_eq!(told(0xd, 1), [without(&[4]), u32::MAX, without(&[11, 12]), u32::MAX]);
        assert_eq!(told(0x8000_0001, 0)[2], without(&[2, 12, 23, 24, 28]), "SVM");
        for (leaf, index) in
            [(0xd, 11), (0xd, 12), (0xd, 17), (0xd, 18), (0x1d, 1), (0x1e, 0), (0x8000_000a, 0)]
        {
            assert_eq!(told(leaf, index), [0; 4], "{leaf:#x}.{index}");
        }
        assert_eq!(told(0xd, 9), [u32::MAX; 4]);
    }

    #[test]
    fn an_old_kernel_s_guests_know_no_asynchronous_page_faults() {
        let mut leaf = entry(0x4000_0001);
        hide_async_page_faults(&mut leaf);
        assert_eq!((!leaf.eax, leaf.edx), (1 << 4 | 1 << 10 | 1 << 14, u32::MAX));
        let mut other = entry(1);
        hide_async_page_faults(&mut other);
        assert_eq!(other.eax, u32::MAX);
    }

    #[test]
    fn virtualization_is_found_where_it_is_wanted() {
        let mut leaves = [entry(1), entry(0x8000_0001), entry(0x8000_000a)];
        leaves.iter_mut().for_each(|leaf| common(leaf, true));
        assert!(is_nested(&leaves) && leaves[2].ebx != 0);
        leaves.iter_mut().for_each(hide_virtualization);
        assert!(!is_nested(&leaves) && leaves[2].ebx == 0);
    }

    #[test]
    fn there_is_no_pmu() {
        let mut leaf = entry(0xa);
        common(&mut leaf, true);
        assert_eq!((leaf.eax, leaf.edx), (0, 0));
        let mut one = entry(1);
        common(&mut one, false);
        assert_eq!((one.ecx >> 31, one.ecx >> 24 & 1, one.ecx >> 15 & 1), (1, 0, 0));
    }
}
