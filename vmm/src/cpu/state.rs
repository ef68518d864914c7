//! The state of one virtual CPU: taken out of KVM for a snapshot, and put into a fresh CPU of another machine.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, nested::KvmNestedStateBuffer,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{Error, cpuid, features, tsc_offset};

/// Time stamp counter: before all others, since the timer's deadline counts by it.
const MSR_TSC: u32 = 0x10;
/// Intel's switch for VMX (IA32_FEATURE_CONTROL).
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// The local APIC timer's deadline: the last, when the timer's mode and the counter are there.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The local APIC's timer register, and its mode that fires at a deadline (Intel SDM vol. 3 §11.5.4).
const LAPIC_TIMER: usize = 0x320;
const TSC_DEADLINE_MODE: u32 = 0b10;
/// Most MSRs in one call (KVM_MAX_MSR_ENTRIES is 256).
const BATCH: usize = 256;
/// Frequencies that differ by less than this, in parts per million, are the same one measured twice: what KVM takes
/// for the same, too (its `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// All that KVM keeps of a virtual CPU.
#[derive(Serialize, Deserialize)]
pub struct CpuState {
    /// What the guest was told that this CPU can do.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of its time stamp counter; 0 if KVM does not tell.
    pub tsc_khz: u32,
    /// What is added to the host's counter, if KVM tells (Linux 5.16 and later).
    tsc_offset: Option<u64>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    /// Of a CPU that can run virtual machines: what it does about its own.
    #[serde(default)]
    nested: Option<KvmNestedStateBuffer>,
}

/// Take the state of `cpu`, which stands at the gate. `msrs` are those that KVM knows.
pub fn save(cpu: &VcpuFd, msrs: &[u32]) -> Result<CpuState, Error> {
    let read = Error::kvm("read the state of a CPU");
    let mut state = CpuState {
        cpuid: cpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(&read)?.as_slice().to_vec(),
        tsc_khz: cpu.get_tsc_khz().unwrap_or(0),
        tsc_offset: tsc_offset::get(cpu),
        // Before the others: KVM first takes in what has been sent to the CPU.
        mp_state: cpu.get_mp_state().map_err(&read)?,
        regs: cpu.get_regs().map_err(&read)?,
        sregs: cpu.get_sregs().map_err(&read)?,
        xsave: cpu.get_xsave().map_err(&read)?,
        xcrs: cpu.get_xcrs().map_err(&read)?,
        debug: cpu.get_debug_regs().map_err(&read)?,
        lapic: cpu.get_lapic().map_err(&read)?,
        events: cpu.get_vcpu_events().map_err(&read)?,
        msrs: read_msrs(cpu, msrs)?,
        nested: None,
    };
    if cpuid::is_nested(&state.cpuid) {
        state.nested = Some(nested_state(cpu)?);
    }
    keep_deadline(&mut state);
    Ok(state)
}

/// What KVM keeps of the virtual machines of a CPU's guest.
fn nested_state(cpu: &VcpuFd) -> Result<KvmNestedStateBuffer, Error> {
    let mut state = KvmNestedStateBuffer::empty();
    // That it is no longer than its header does not mean that there is none: a guest may have switched VMX on (VMXON) and
    // have no current machine, or have SVM's global interrupt flag cleared.
    cpu.nested_state(&mut state).map_err(Error::kvm("read the state of a guest's own virtual machines"))?;
    Ok(state)
}

/// A deadline that has passed reads as 0 before its interrupt is delivered, and 0 restored would be a timer that is off:
/// a CPU that sleeps until its timer fires would never wake. It becomes one that has just passed.
fn keep_deadline(state: &mut CpuState) {
    let timer = state.lapic.regs.get(LAPIC_TIMER..LAPIC_TIMER + 4).unwrap_or_default();
    // The registers are bytes that bindgen takes for signed ones.
    let timer = timer.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte as u8));
    let Some(now) = state.msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data) else { return };
    for msr in &mut state.msrs {
        if msr.index == MSR_TSC_DEADLINE && msr.data == 0 && timer >> 17 & 0b11 == TSC_DEADLINE_MODE {
            msr.data = now;
        }
    }
}

/// Read those of `indices` that this CPU has.
fn read_msrs(cpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while let [first, ..] = rest {
        let batch: Vec<_> = rest.iter().take(BATCH).map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&batch).map_err(|_| Error::Msr(*first))?;
        let count = cpu.get_msrs(&mut msrs).map_err(Error::kvm("read model-specific registers"))?;
        found.extend(msrs.as_slice().iter().take(count));
        // KVM stops at one that it does not let be read.
        let stuck = usize::from(count < batch.len());
        rest = rest.get(count + stuck..).unwrap_or_default();
    }
    found.sort_by_key(|msr: &kvm_msr_entry| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(found)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Whether the fresh `cpu` of a host that offers `supported` can go on with `state`; if not, why.
pub fn check(cpu: &VcpuFd, supported: &[kvm_cpuid_entry2], state: &CpuState) -> Result<(), String> {
    let fresh = cpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(|error| error.to_string())?;
    if let Some(why) = features::lacking(&state.cpuid, fresh.as_slice(), supported) {
        return Err(why);
    }
    let (theirs, ours) = (u64::from(state.tsc_khz), u64::from(cpu.get_tsc_khz().unwrap_or(0)));
    if theirs.abs_diff(ours) * 1_000_000 > ours * TSC_TOLERANCE_PPM && cpu.set_tsc_khz(state.tsc_khz).is_err()
    {
        return Err(format!(
            "its time stamp counter ran at {theirs} kHz; this host's runs at {ours} kHz and cannot be scaled"
        ));
    }
    Ok(())
}

/// Put `state` into a fresh CPU. Guest memory must be in place already: KVM writes the guest's clock pages there. `boot`
/// is the boot CPU with its state, which has been restored before, if this is another one.
pub fn restore(cpu: &VcpuFd, state: &CpuState, boot: Option<(&VcpuFd, &CpuState)>) -> Result<(), Error> {
    let write = Error::kvm("restore the state of a CPU");
    // First of all, since what else may be set depends on it: what the guest was told, whatever core this runs on.
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| write(kvm_ioctls::Error::new(libc::E2BIG)))?;
    cpu.set_cpuid2(&cpuid).map_err(&write)?;
    cpu.set_mp_state(state.mp_state).map_err(&write)?;
    cpu.set_sregs(&state.sregs).map_err(&write)?;
    if let Some(nested) = &state.nested {
        // KVM wants VMX or SVM switched on before it: EFER is there, the other's switch is not.
        let control = state.msrs.iter().filter(|msr| msr.index == MSR_FEATURE_CONTROL);
        write_msrs(cpu, &control.copied().collect::<Vec<_>>())?;
        cpu.set_nested_state(nested)
            .map_err(Error::kvm("restore the state of a guest's own virtual machines"))?;
    }
    cpu.set_regs(&state.regs).map_err(&write)?;
    // SAFETY: KVM reads as many bytes as the structure has, since nobody has asked for larger, dynamic features.
    unsafe { cpu.set_xsave(&state.xsave) }.map_err(&write)?;
    cpu.set_xcrs(&state.xcrs).map_err(&write)?;
    cpu.set_debug_regs(&state.debug).map_err(&write)?;
    cpu.set_lapic(&state.lapic).map_err(&write)?;
    let counts_with_boot_cpu = boot.is_some_and(|(boot_cpu, boot_state)| {
        // As far from the boot CPU's counter as it was: mostly not at all.
        let apart =
            state.tsc_offset.zip(boot_state.tsc_offset).map_or(0, |(ours, its)| ours.wrapping_sub(its));
        tsc_offset::get(boot_cpu).is_some_and(|its| tsc_offset::set(cpu, its.wrapping_add(apart)))
    });
    // KVM only guesses which counters belong together, from when they are written.
    let msrs = state.msrs.iter().filter(|msr| !(counts_with_boot_cpu && msr.index == MSR_TSC));
    write_msrs(cpu, &msrs.copied().collect::<Vec<_>>())?;
    cpu.set_vcpu_events(&state.events).map_err(&write)
}

fn write_msrs(cpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = msrs;
    while let [first, ..] = rest {
        let batch =
            Msrs::from_entries(rest.get(..BATCH).unwrap_or(rest)).map_err(|_| Error::Msr(first.index))?;
        let count = cpu.set_msrs(&batch).map_err(Error::kvm("set model-specific registers"))?;
        rest = rest.get(count..).unwrap_or_default();
        if let Some((refused, after)) = rest.split_first()
            && count < batch.as_slice().len()
        {
            // Some can be read and not written; that is all right as long as they are what they should be.
            if !read_msrs(cpu, &[refused.index])?.iter().any(|msr| msr.data == refused.data) {
                return Err(Error::Msr(refused.index));
            }
            rest = after;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_has_passed_is_kept_as_one() {
        let kept = |mode: u8, deadline: u64| {
            let mut state = CpuState {
                cpuid: Vec::new(),
                tsc_khz: 0,
                tsc_offset: None,
                mp_state: Default::default(),
                regs: Default::default(),
                sregs: Default::default(),
                xsave: Default::default(),
                xcrs: Default::default(),
                debug: Default::default(),
                lapic: Default::default(),
                events: Default::default(),
                msrs: vec![entry(MSR_TSC, 1000), entry(MSR_TSC_DEADLINE, deadline)],
                nested: None,
            };
            // Vector 0xec; the mode is in bits 17 and 18.
            state.lapic.regs[LAPIC_TIMER] = 0xecu8 as _;
            state.lapic.regs[LAPIC_TIMER + 2] = (mode << 1) as _;
            keep_deadline(&mut state);
            state.msrs[1].data
        };
        assert_eq!(kept(0b10, 0), 1000, "fires at once");
        assert_eq!(kept(0b10, 5000), 5000);
        assert_eq!(
            (kept(0b00, 0), kept(0b01, 0)),
            (0, 0),
            "in one-shot and periodic mode the register is not used"
        );
    }
}
