//! Registers of the boot CPU at the kernel's first instruction, and the MSRs of every CPU.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Error;
use crate::{
    boot::Entry,
    layout::{GDT, PAGE_TABLES, START_INFO, ZERO_PAGE},
};

const CR0_PROTECTION: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Fast string operations; no branch trace store, no precise event-based sampling (there is no PMU).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// Default memory type; without it a kernel believes that all its memory is uncached.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Set the MSRs that differ from what KVM starts a CPU with. All others are as KVM has them: what it does not know
/// gives the guest a general protection fault.
pub fn set_msrs(cpu: &VcpuFd) -> Result<(), Error> {
    for (index, data) in [(MSR_MISC_ENABLE, MISC_ENABLE), (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)] {
        let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
            .map_err(|_| Error::Msr(index))?;
        if cpu.set_msrs(&msrs).map_err(Error::kvm("set a model-specific register"))? != 1 {
            return Err(Error::Msr(index));
        }
    }
    Ok(())
}

/// Type field of a segment: code, execute and read; data, read and write; busy task state.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TASK: u8 = 0xb;

/// A flat segment of 4 GiB, or the task state segment.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        ..Default::default()
    }
}

fn task_segment(selector: u16) -> kvm_segment {
    kvm_segment { limit: 0x67, selector, type_: TASK, present: 1, ..Default::default() }
}

/// The descriptor (Intel SDM vol. 3 §3.4.5) of a segment with base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

/// Let `cpu` start at `entry`. Writes a GDT to [`GDT`].
pub fn set_entry(cpu: &VcpuFd, memory: &GuestMemoryMmap, entry: &Entry) -> Result<(), Error> {
    let mut sregs = cpu.get_sregs().map_err(Error::kvm("read a CPU's segment registers"))?;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    // Selectors as the Linux 64-bit boot protocol wants them; PVH leaves them open.
    let long = matches!(entry, Entry::Linux64 { .. });
    let code = segment(0x10, CODE, long);
    let mut data = segment(0x18, DATA, false);
    data.db = 1;
    let task = task_segment(0x20);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (at, descriptor) in (GDT..).step_by(8).zip(gdt) {
        memory.write_obj(descriptor, GuestAddress(at)).map_err(Error::Memory)?;
    }
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&gdt) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE;
    match entry {
        Entry::Pvh { address } => {
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rip = *address;
            regs.rbx = START_INFO;
        }
        Entry::Linux64 { address, .. } => {
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG_MODE;
            regs.rip = *address;
            regs.rsi = ZERO_PAGE;
        }
    }
    cpu.set_sregs(&sregs).map_err(Error::kvm("set a CPU's segment registers"))?;
    cpu.set_regs(&regs).map_err(Error::kvm("set a CPU's registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_that_linux_uses() {
        // GDT_ENTRY(0xc09b, 0, 0xfffff), GDT_ENTRY(0xa09b, …), GDT_ENTRY(0xc093, …) in the kernel's notation.
        assert_eq!(descriptor(&segment(0x10, CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x10, CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x18, DATA, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment(0x20)), 0x0000_8b00_0000_0067);
    }
}
