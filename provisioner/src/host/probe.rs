//! Whether KVM works here, found by running kernel-mode code in a guest.
//!
//! `/dev/kvm` alone says little: in some cloud machines it belongs to a backend that runs a guest's user mode as it is,
//! but sends a guest's kernel mode through KVM's instruction emulator, which is a thousand times slower and knows too
//! few instructions for any stock kernel. So a few of those instructions, and a loop, are tried.

use std::{
    fs, io,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long the whole probe may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Turns of the timed loop, of two instructions each.
const TURNS: u32 = 4_000;
/// How often the loop is timed, unless it is quick: on a busy machine it may lose its processor for a while.
const TRIES: u32 = 5;
/// A processor, even an emulated one, takes a few nanoseconds for an instruction, KVM's instruction emulator about a
/// thousand.
const SLOWEST_NS: f64 = 100.0;

const MEMORY: usize = 64 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STACK: u64 = 0xf000;

/// What KVM is worth here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Guests run, kernel mode included.
    Works,
    /// There is a `/dev/kvm`, but a guest's kernel-mode code is emulated: no stock kernel runs.
    EmulatedKernelMode,
    /// There is no `/dev/kvm`.
    Missing,
    /// This user may not open it.
    NoPermission,
    /// It does not do what it should.
    Broken,
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The verdict.
    pub verdict: Verdict,
    /// Time of an instruction of a guest's kernel mode in nanoseconds.
    pub ns_per_instruction: Option<f64>,
    /// Instructions that this processor has, and that a guest's kernel mode cannot use.
    pub missing_instructions: Vec<String>,
    /// What went wrong, if something did.
    pub error: Option<String>,
}

impl Probe {
    fn only(verdict: Verdict, error: Option<String>) -> Self {
        Self { verdict, ns_per_instruction: None, missing_instructions: Vec::new(), error }
    }

    /// Why labs can't run on this machine's KVM, in a few words; `None` if they can.
    pub fn reason(&self) -> Option<String> {
        Some(match self.verdict {
            Verdict::Works => return None,
            Verdict::EmulatedKernelMode => {
                "this machine's /dev/kvm emulates the kernel mode of guests".into()
            }
            Verdict::Missing => "there is no /dev/kvm".into(),
            Verdict::NoPermission => "/dev/kvm may not be opened by this user".into(),
            Verdict::Broken => {
                format!(
                    "this machine's /dev/kvm does not work: {}",
                    self.error.as_deref().unwrap_or("no reason given")
                )
            }
        })
    }
}

/// Tries KVM out. Takes some milliseconds where it works, and never longer than ten seconds.
pub fn run() -> Probe {
    run_on(Path::new("/dev/kvm"))
}

fn run_on(device: &Path) -> Probe {
    match fs::File::options().read(true).write(true).open(device) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Probe::only(Verdict::NoPermission, None);
        }
        // ENODEV: a device node without a driver behind it.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(19) => {
            return Probe::only(Verdict::Missing, None);
        }
        Err(error) => return Probe::only(Verdict::Broken, Some(error.to_string())),
        Ok(_) => {}
    }
    // A thread that hangs in KVM ends with this process.
    let (sender, receiver) = mpsc::channel();
    let spawned = thread::Builder::new().name("probe".into()).spawn(move || sender.send(measure()));
    let found = match spawned {
        Ok(_) => receiver.recv_timeout(LIMIT).unwrap_or_else(|_| {
            Err(Error { what: "a guest of a few instructions", source: io::ErrorKind::TimedOut.into() })
        }),
        Err(source) => Err(Error { what: "a thread", source }),
    };
    match found {
        Ok((ns, missing)) => Probe {
            verdict: verdict(ns, &missing),
            ns_per_instruction: Some(ns),
            missing_instructions: missing,
            error: None,
        },
        Err(error) => Probe::only(Verdict::Broken, Some(error.to_string())),
    }
}

fn verdict(ns_per_instruction: f64, missing: &[String]) -> Verdict {
    if missing.is_empty() && ns_per_instruction < SLOWEST_NS {
        Verdict::Works
    } else {
        Verdict::EmulatedKernelMode
    }
}

/// What failed of KVM.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error { what, source: error.into() }
}

/// An instruction that kernels use: name, code, and the CPUID bit that says whether the processor has it.
struct Instruction {
    name: &'static str,
    code: &'static [u8],
    /// Leaf, register (0 is EAX) and bit.
    cpuid: (u32, usize, u32),
}

/// `rsi` is the address of 512 free bytes. Intel SDM vol. 2; AMD APM vol. 3.
const INSTRUCTIONS: [Instruction; 5] = [
    Instruction { name: "popcnt", code: &[0xf3, 0x0f, 0xb8, 0xc3], cpuid: (1, 2, 23) },
    // xor ecx, ecx; xgetbv
    Instruction { name: "xgetbv", code: &[0x31, 0xc9, 0x0f, 0x01, 0xd0], cpuid: (1, 2, 26) },
    // cmpxchg16b [rsi]
    Instruction { name: "cmpxchg16b", code: &[0x48, 0x0f, 0xc7, 0x0e], cpuid: (1, 2, 13) },
    // stmxcsr [rsi]
    Instruction { name: "stmxcsr", code: &[0x0f, 0xae, 0x1e], cpuid: (1, 3, 25) },
    Instruction { name: "rdtscp", code: &[0x0f, 0x01, 0xf9], cpuid: (0x8000_0001, 3, 27) },
];
/// `out 0x80, al`: the end of each piece of code.
const END: [u8; 2] = [0xe6, 0x80];

/// Time of an instruction in nanoseconds, and the instructions that do not run.
fn measure() -> Result<(f64, Vec<String>), Error> {
    let kvm = Kvm::new().map_err(failed("/dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|error| failed("guest memory")(io::Error::other(error)))?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| failed("guest memory")(io::Error::other(error)))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is a mapping of MEMORY bytes, and `memory` outlives `vm`, which is dropped in this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let write = |bytes: &[u8], at: u64| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(|error| failed("guest memory")(io::Error::other(error)))
    };
    // One page of 2 MiB, mapped to itself: present, writable, and large where it is the last level.
    write(&(PDPT | 3).to_le_bytes(), PML4)?;
    write(&(PD | 3).to_le_bytes(), PDPT)?;
    write(&0x83u64.to_le_bytes(), PD)?;

    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    enter_long_mode(&vcpu, &cpuid)?;

    let mut missing = Vec::new();
    for instruction in &INSTRUCTIONS {
        if has(&cpuid, instruction.cpuid) {
            write(&[instruction.code, &END].concat(), CODE)?;
            if !execute(&mut vcpu)? {
                missing.push(instruction.name.into());
            }
        }
    }
    // mov ecx, TURNS; 1: dec ecx; jnz 1b
    let turns = TURNS.to_le_bytes();
    write(&[&[0xb9][..], &turns, &[0xff, 0xc9, 0x75, 0xfc], &END].concat(), CODE)?;
    let mut best = f64::INFINITY;
    for _ in 0..TRIES {
        let begin = Instant::now();
        if !execute(&mut vcpu)? {
            return Err(failed("a loop")(io::Error::other("the guest did not come to its end")));
        }
        best = best.min(begin.elapsed().as_nanos() as f64 / f64::from(TURNS * 2));
        if best < SLOWEST_NS {
            break;
        }
    }
    Ok(((best * 10.0).round() / 10.0, missing))
}

fn has(cpuid: &CpuId, (leaf, register, bit): (u32, usize, u32)) -> bool {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == leaf && entry.index == 0);
    let value = entry.map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
    value.and_then(|value| value.get(register).copied()).is_some_and(|value| value >> bit & 1 == 1)
}

/// 64-bit mode, privilege level 0, with flat segments and nothing in the way of SSE and XSAVE.
fn enter_long_mode(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let segment = |selector, kind, long, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: long,
        db,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(8, 11, 1, 0);
    let data = segment(16, 3, 0, 1);
    [sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs] = [data; 5];
    // A task state segment is checked at entry, not used.
    sregs.tr = kvm_segment { limit: 0xffff, selector: 24, type_: 11, present: 1, ..Default::default() };
    let xsave = if has(cpuid, (1, 2, 26)) { 1 << 18 } else { 0 };
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5 | 1 << 9 | xsave; // PAE, OSFXSR, OSXSAVE
    sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1; // PG, NE, ET, MP, PE
    sregs.efer = 1 << 8 | 1 << 10; // LME, LMA
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))
}

/// Runs the code at CODE; whether it came to its end.
fn execute(vcpu: &mut VcpuFd) -> Result<bool, Error> {
    let regs = kvm_regs { rip: CODE, rsi: DATA, rsp: STACK, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    loop {
        return match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => Ok(true),
            // KVM's emulator gave up, or the exception that it made of it found no handler.
            Ok(_) => Ok(false),
            Err(error) if matches!(error.errno(), 4 | 11) => continue, // EINTR, EAGAIN
            Err(error) => Err(failed("KVM_RUN")(error)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_needs_speed_and_instructions() {
        assert_eq!(verdict(4.5, &[]), Verdict::Works);
        assert_eq!(verdict(1000.0, &[]), Verdict::EmulatedKernelMode);
        assert_eq!(verdict(4.5, &["popcnt".into()]), Verdict::EmulatedKernelMode);
    }

    #[test]
    fn no_device_and_no_permission_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run_on(&dir.path().join("kvm")).verdict, Verdict::Missing);
        let reason = Probe::only(Verdict::NoPermission, None).reason().unwrap();
        assert!(reason.contains("may not be opened"), "{reason}");
    }

    #[test]
    fn this_machine_s_verdict_agrees_with_what_its_kernel_says() {
        let probe = run();
        if !Path::new("/dev/kvm").exists() {
            assert_eq!(probe.verdict, Verdict::Missing);
        } else if Path::new("/sys/module/kvm_pvm").exists() {
            assert_eq!(probe.verdict, Verdict::EmulatedKernelMode, "{probe:?}");
            assert!(probe.missing_instructions.contains(&"cmpxchg16b".to_string()), "{probe:?}");
        } else if probe.verdict == Verdict::Works {
            assert!(probe.ns_per_instruction.is_some_and(|ns| ns < SLOWEST_NS), "{probe:?}");
            assert!(probe.reason().is_none());
        } else {
            assert!(probe.reason().is_some(), "{probe:?}");
        }
    }
}
