//! The state of one virtual CPU: taken out of KVM for a snapshot, and put into a fresh CPU of another machine.

use kvm_bindings::{
    Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::Error;

/// Time stamp counter: before all others, since the timer's deadline counts by it.
const MSR_TSC: u32 = 0x10;
/// The local APIC timer's deadline: the last, when the timer's mode and the counter are there.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
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
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

/// Take the state of `cpu`, which stands at the gate. `msrs` are those that KVM knows.
pub fn save(cpu: &VcpuFd, msrs: &[u32]) -> Result<CpuState, Error> {
    let read = Error::kvm("read the state of a CPU");
    Ok(CpuState {
        cpuid: cpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(&read)?.as_slice().to_vec(),
        tsc_khz: cpu.get_tsc_khz().unwrap_or(0),
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
    })
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

/// Whether the fresh `cpu`, which has been described to the guest, can go on with `state`; if not, why.
pub fn check(cpu: &VcpuFd, state: &CpuState) -> Result<(), String> {
    let cpuid = cpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(|error| error.to_string())?;
    for theirs in &state.cpuid {
        let same = |ours: &&kvm_cpuid_entry2| (ours.function, ours.index) == (theirs.function, theirs.index);
        if cpuid.as_slice().iter().find(same).map(lasting) != Some(lasting(theirs)) {
            return Err(format!(
                "it was made on a host with another processor, or another KVM: CPUID leaf {:#x}.{} is not the same",
                theirs.function, theirs.index
            ));
        }
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

/// The registers of a leaf, without what depends on what the guest has switched on.
fn lasting(leaf: &kvm_cpuid_entry2) -> [u32; 4] {
    let kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, .. } = *leaf;
    match function {
        // OSXSAVE and MONITOR; APIC.
        1 => [eax, ebx, ecx & !(1 << 27 | 1 << 3), edx & !(1 << 9)],
        // OSPKE.
        7 => [eax, ebx, ecx & !(1 << 4), edx],
        // The present size of the XSAVE area.
        0xd => [eax, 0, ecx, edx],
        _ => [eax, ebx, ecx, edx],
    }
}

/// Put `state` into a fresh CPU, whose CPUID is set. Guest memory must be in place already: KVM writes the guest's clock
/// pages there.
pub fn restore(cpu: &VcpuFd, state: &CpuState) -> Result<(), Error> {
    let write = Error::kvm("restore the state of a CPU");
    cpu.set_mp_state(state.mp_state).map_err(&write)?;
    cpu.set_regs(&state.regs).map_err(&write)?;
    cpu.set_sregs(&state.sregs).map_err(&write)?;
    // SAFETY: KVM reads as many bytes as the structure has, since nobody has asked for larger, dynamic features.
    unsafe { cpu.set_xsave(&state.xsave) }.map_err(&write)?;
    cpu.set_xcrs(&state.xcrs).map_err(&write)?;
    cpu.set_debug_regs(&state.debug).map_err(&write)?;
    cpu.set_lapic(&state.lapic).map_err(&write)?;
    write_msrs(cpu, &state.msrs)?;
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
