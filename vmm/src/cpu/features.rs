//! Whether a processor can go on with what another one began: what a guest was told by CPUID, held against what this
//! host offers.
//!
//! A guest relies on the features that it found. It does not rely on the sizes of caches, on the topology below its own
//! or on the name of the processor: KVM reads those (leaves 2, 4, 0x80000005, 0x80000006, 0x8000001D) on whichever core
//! the call happens to run, and the cores of one processor may differ there.

use kvm_bindings::kvm_cpuid_entry2;

/// Most features that an error names.
const MOST_NAMES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits are features.
struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    /// Bits that follow what the guest has switched on, or where a CPU stands in the machine.
    ignored: u32,
    /// Names of the bits from bit 0 on, as in /proc/cpuinfo; `-` and those that are not there have none.
    names: &'static str,
}

use Register::{Eax, Ebx, Ecx, Edx};

const fn word(leaf: u32, index: u32, register: Register, ignored: u32, names: &'static str) -> Word {
    Word { leaf, index, register, ignored, names }
}

/// OSXSAVE, MONITOR and that there is a hypervisor; the TSC deadline, which KVM offers by a capability.
const IGNORED_1_ECX: u32 = 1 << 27 | 1 << 3 | 1 << 31 | 1 << 24;
/// APIC and several threads.
const IGNORED_1_EDX: u32 = 1 << 9 | 1 << 28;
/// OSPKE.
const IGNORED_7_ECX: u32 = 1 << 4;
/// One of several kinds of cores.
const IGNORED_7_EDX: u32 = 1 << 15;
/// Several cores (AMD).
const IGNORED_EXTENDED_ECX: u32 = 1 << 1;

/// Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; KVM's own leaf: Documentation/virt/kvm/x86/cpuid.rst.
const WORDS: [Word; 23] = [
    word(
        1,
        0,
        Edx,
        IGNORED_1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss ht tm ia64 pbe",
    ),
    word(
        1,
        0,
        Ecx,
        IGNORED_1_ECX,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    word(
        7,
        0,
        Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Ecx,
        IGNORED_7_ECX,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
         enqcmd sgx_lc pks",
    ),
    word(
        7,
        0,
        Edx,
        IGNORED_7_EDX,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile \
         amx_int8 spec_ctrl stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    word(
        7,
        1,
        Eax,
        0,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs - - amx_fp16 - \
         avx_ifma - - lam",
    ),
    word(7, 1, Ebx, 0, ""),
    word(7, 1, Ecx, 0, ""),
    word(7, 1, Edx, 0, ""),
    word(7, 2, Edx, 0, ""),
    // What XCR0 and IA32_XSS may be.
    word(0xd, 0, Eax, 0, ""),
    word(0xd, 0, Edx, 0, ""),
    word(0xd, 1, Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(0xd, 1, Ecx, 0, ""),
    word(0xd, 1, Edx, 0, ""),
    word(0x4000_0001, 0, Eax, 0, ""),
    word(
        0x8000_0001,
        0,
        Ecx,
        IGNORED_EXTENDED_ECX,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(
        0x8000_0001,
        0,
        Edx,
        IGNORED_1_EDX,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(0x8000_0007, 0, Edx, 0, ""),
    word(
        0x8000_0008,
        0,
        Ebx,
        0,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - amd_ppin \
         amd_ssbd virt_ssbd amd_ssb_no - amd_psfd btc_no ibpb_ret",
    ),
    word(0x8000_000a, 0, Edx, 0, ""),
    word(0x8000_0021, 0, Eax, 0, ""),
    word(0xc000_0001, 0, Edx, 0, ""),
];

fn find(list: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    list.iter().find(|entry| (entry.function, entry.index) == (leaf, index))
}

fn register(list: &[kvm_cpuid_entry2], leaf: u32, index: u32, register: Register) -> u32 {
    find(list, leaf, index).map_or(0, |entry| match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    })
}

/// Why a processor cannot go on with a guest that was told `told`; none if it can. `fresh` is what a fresh CPU tells here,
/// `supported` what KVM says that it offers: the first lacks what guests are not shown, and with PVM, whose guests see the
/// processor itself, the second lacks what they find all the same.
pub fn lacking(
    told: &[kvm_cpuid_entry2],
    fresh: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Option<String> {
    let (theirs, ours) = (model(told), model(fresh));
    if theirs != ours {
        return Some(format!("it was made on a host with another processor: {theirs}; this one is {ours}"));
    }
    let signature = |list| find(list, 0x4000_0000, 0).map(|entry| [entry.ebx, entry.ecx, entry.edx]);
    if signature(told) != signature(fresh) {
        return Some("it was made with another hypervisor than this KVM".into());
    }
    let missing = missing(told, fresh, supported);
    if !missing.is_empty() {
        let more = match missing.len().saturating_sub(MOST_NAMES) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named: Vec<&str> = missing.iter().take(MOST_NAMES).map(String::as_str).collect();
        return Some(format!(
            "its guest uses what this host's processor, or its KVM, does not offer: {}{more}",
            named.join(", ")
        ));
    }
    let bits = |list, shift: u32| register(list, 0x8000_0008, 0, Eax) >> shift & 0xff;
    for (kind, shift) in [("physical", 0), ("linear", 8)] {
        let (theirs, ours) = (bits(told, shift), bits(fresh, shift));
        if theirs > ours {
            return Some(format!(
                "it was made with {kind} addresses of {theirs} bits, this host's have {ours}"
            ));
        }
    }
    layout(told, fresh, supported).map(|component| {
        format!(
            "the state of component {component} of XSAVE has another size or place on this host's processor"
        )
    })
}

/// Vendor, family and model: what kernels choose their workarounds by. The stepping may differ.
fn model(list: &[kvm_cpuid_entry2]) -> String {
    let vendor = find(list, 0, 0).map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]).map(u32::to_le_bytes);
    let version = register(list, 1, 0, Eax);
    let family = match version >> 8 & 0xf {
        0xf => 0xf + (version >> 20 & 0xff),
        family => family,
    };
    let model = version >> 4 & 0xf | if family == 6 || family >= 0xf { version >> 12 & 0xf0 } else { 0 };
    let vendor = vendor.as_flattened().escape_ascii();
    format!("{vendor} family {family} model {model}")
}

/// The features that are told and not offered.
fn missing(
    told: &[kvm_cpuid_entry2],
    fresh: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Vec<String> {
    let mut missing = Vec::new();
    for word in &WORDS {
        let of = |list| register(list, word.leaf, word.index, word.register);
        let lost = of(told) & !of(fresh) & !of(supported) & !word.ignored;
        for bit in (0..32).filter(|bit| lost >> bit & 1 == 1) {
            let name = word.names.split(' ').nth(bit).filter(|name| !matches!(*name, "" | "-"));
            missing.push(name.map_or_else(
                || format!("bit {bit} of {:?} in CPUID {:#x}.{}", word.register, word.leaf, word.index),
                Into::into,
            ));
        }
    }
    missing
}

/// The first component that the guest may have and that XSAVE keeps in another way here.
fn layout(
    told: &[kvm_cpuid_entry2],
    fresh: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Option<u32> {
    let components = u64::from(register(told, 0xd, 0, Eax) | register(told, 0xd, 1, Ecx))
        | u64::from(register(told, 0xd, 0, Edx) | register(told, 0xd, 1, Edx)) << 32;
    // 0 and 1 are in the legacy area.
    (2..63).filter(|component| components >> component & 1 == 1).find(|component| {
        let of = |list| find(list, 0xd, *component).map(|leaf| (leaf.eax, leaf.ebx));
        of(told) != of(fresh) && of(told) != of(supported)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A core of a laptop's processor (Alder Lake), in part; `kind` differs between its two sorts of cores.
    fn laptop(performance: bool) -> Vec<kvm_cpuid_entry2> {
        let pick = |performance_core: u32, efficient_core: u32| match performance {
            true => performance_core,
            false => efficient_core,
        };
        vec![
            leaf(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0x906a3, pick(0x0010_0800, 0x1010_0800), 0xfffa_3203, 0x1f8b_fbff]),
            leaf(2, 0, [pick(0x00fe_ff01, 0x00fe_ff01), 0xf0, 0, 0]),
            leaf(4, 0, [0x7c00_4121, pick(0x02c0_003f, 0x01c0_003f), 0x3f, 0]),
            leaf(4, 2, [0x7c01_c143, pick(0x0240_003f, 0x03c0_003f), pick(0x7ff, 0x7ff), 0]),
            leaf(7, 0, [1, 0x239c_27a9, 0x1840_07ac, 0xac00_4410]),
            leaf(0xd, 0, [0x207, 0xa88, 0xa88, 0]),
            leaf(0xd, 1, [0xf, 0, 0, 0]),
            leaf(0xd, 2, [0x100, 0x240, 0, 0]),
            leaf(0xd, 9, [8, 0xa80, 0, 0]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
            leaf(0x8000_0006, 0, [0, 0, pick(0x0500_7040, 0x0800_7040), 0]),
            leaf(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ]
    }

    fn lacking(told: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<String> {
        super::lacking(told, here, here)
    }

    fn change(list: &mut [kvm_cpuid_entry2], function: u32, index: u32, by: impl Fn(&mut kvm_cpuid_entry2)) {
        by(list.iter_mut().find(|entry| (entry.function, entry.index) == (function, index)).unwrap());
    }

    #[test]
    fn cores_of_one_processor_are_alike() {
        assert_ne!(laptop(true), laptop(false));
        assert_eq!(lacking(&laptop(true), &laptop(false)), None);
        assert_eq!(lacking(&laptop(false), &laptop(true)), None);
    }

    #[test]
    fn what_is_not_shown_is_offered_and_what_pvm_shows_too() {
        let (saved, mut less) = (laptop(true), laptop(true));
        change(&mut less, 1, 0, |leaf| leaf.ecx &= !(1 << 12));
        assert_eq!(super::lacking(&saved, &less, &saved), None);
        assert_eq!(super::lacking(&saved, &saved, &less), None);
        assert!(super::lacking(&saved, &less, &less).unwrap().ends_with(": fma"));
    }

    #[test]
    fn an_update_that_adds_is_no_harm_and_one_that_takes_is_named() {
        let (before, mut after) = (laptop(true), laptop(true));
        // Microcode brings a bit, KVM offers some more, and the stepping is another.
        change(&mut after, 7, 0, |leaf| leaf.edx |= 1 << 30 | 1 << 28);
        change(&mut after, 0x4000_0001, 0, |leaf| leaf.eax |= 1 << 16);
        change(&mut after, 1, 0, |leaf| leaf.eax += 1);
        assert_eq!(lacking(&before, &after), None);
        let why = lacking(&after, &before).unwrap();
        assert!(
            why.ends_with(
                "does not offer: flush_l1d, core_capabilities, bit 16 of Eax in CPUID 0x40000001.0"
            ),
            "{why}"
        );
    }

    #[test]
    fn what_the_guest_has_switched_on_is_no_feature() {
        let (mut saved, fresh) = (laptop(true), laptop(true));
        change(&mut saved, 1, 0, |leaf| leaf.ecx |= 1 << 27);
        change(&mut saved, 7, 0, |leaf| leaf.ecx |= 1 << 4);
        change(&mut saved, 0xd, 0, |leaf| leaf.ebx = 0x340);
        assert_eq!(lacking(&saved, &fresh), None);
    }

    #[test]
    fn an_older_processor_is_refused_by_name() {
        let (ours, mut older) = (laptop(true), laptop(true));
        change(&mut older, 7, 0, |leaf| leaf.ebx &= !(1 << 5 | 1 << 29));
        assert!(lacking(&ours, &older).unwrap().ends_with(": avx2, sha_ni"));
        change(&mut older, 7, 0, |leaf| (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0));
        assert!(lacking(&ours, &older).unwrap().contains(" more"));

        let mut other = laptop(true);
        change(&mut other, 1, 0, |leaf| leaf.eax = 0xb0671);
        assert_eq!(
            lacking(&ours, &other).unwrap(),
            "it was made on a host with another processor: GenuineIntel family 6 model 154; this one is \
             GenuineIntel family 6 model 183"
        );
    }

    #[test]
    fn addresses_and_state_must_fit() {
        let (ours, mut narrow) = (laptop(true), laptop(true));
        change(&mut narrow, 0x8000_0008, 0, |leaf| leaf.eax = 0x3024);
        assert!(
            lacking(&ours, &narrow).unwrap().contains("physical addresses of 39 bits, this host's have 36")
        );
        assert_eq!(lacking(&narrow, &ours), None, "a guest may see fewer than there are");
        let mut shuffled = laptop(true);
        change(&mut shuffled, 0xd, 9, |leaf| leaf.ebx = 0x980);
        assert!(lacking(&ours, &shuffled).unwrap().contains("component 9"));
    }

    #[test]
    fn names_stand_at_their_bits() {
        let name = |leaf: u32, index: u32, register: Register, bit: usize| {
            let at = |word: &&Word| (word.leaf, word.index, word.register) == (leaf, index, register);
            WORDS.iter().find(at).unwrap().names.split(' ').nth(bit).unwrap()
        };
        for (leaf, index, register, bit, expected) in [
            (1, 0, Edx, 26, "sse2"),
            (1, 0, Ecx, 5, "vmx"),
            (1, 0, Ecx, 30, "rdrand"),
            (7, 0, Ebx, 16, "avx512f"),
            (7, 0, Ebx, 31, "avx512vl"),
            (7, 0, Ecx, 16, "la57"),
            (7, 0, Ecx, 22, "rdpid"),
            (7, 0, Ecx, 31, "pks"),
            (7, 0, Edx, 26, "spec_ctrl"),
            (7, 0, Edx, 31, "ssbd"),
            (7, 1, Eax, 23, "avx_ifma"),
            (0x8000_0001, 0, Ecx, 22, "topoext"),
            (0x8000_0001, 0, Edx, 29, "lm"),
            (0x8000_0008, 0, Ebx, 12, "ibpb"),
            (0x8000_0008, 0, Ebx, 25, "virt_ssbd"),
        ] {
            assert_eq!(name(leaf, index, register, bit), expected);
        }
    }
}
