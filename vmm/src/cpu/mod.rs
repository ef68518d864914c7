//! Virtual CPUs: one thread each, which runs the guest and serves its exits. What a CPU is (`cpuid`) and where it
//! starts (`registers`) are beside it; `gate` holds the threads while the machine is paused, `state` is what a snapshot
//! keeps of a CPU, `features` whether another host can go on with it.

pub mod cpuid;
mod features;
mod gate;
pub mod registers;
pub mod state;
mod tsc_offset;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering, fence},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{bus::Bus, ending::Ending};
use gate::{Gate, Pass};

/// Why a CPU cannot be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A model-specific register cannot be set.
    #[error("KVM does not let model-specific register {0:#x} be set")]
    Msr(u32),
    /// Guest memory ends before the GDT.
    #[error("cannot write the boot CPU's descriptor table: {0}")]
    Memory(vm_memory::GuestMemoryError),
    /// No thread.
    #[error("cannot start a CPU's thread: {0}")]
    Thread(std::io::Error),
    /// A CPU did not stop or pause.
    #[error("CPU {0} did not stop within {1} s: it was last seen inside KVM")]
    Stuck(usize, u64),
}

impl Error {
    /// For `map_err`.
    pub fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }
}

/// Stack of a CPU's thread in bytes: less than a huge page, which the host might otherwise give each of them.
const STACK: usize = 1 << 20;
/// How long a CPU may take to leave KVM when told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What the CPUs count.
#[derive(Debug, Default)]
pub struct Counters {
    /// Exits to user space.
    pub exits: AtomicU64,
    /// Microseconds from process start to the boot CPU's first KVM_RUN.
    pub first_run_us: AtomicU64,
}

/// All running CPUs.
pub struct Cpus {
    threads: Vec<JoinHandle<()>>,
    /// The same CPUs; a thread holds its own except while it waits at the gate.
    cpus: Vec<Arc<Mutex<VcpuFd>>>,
    gate: Arc<Gate>,
}

fn lock(cpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    cpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the CPU threads share.
#[derive(Clone)]
pub struct Surroundings {
    /// Where their accesses go.
    pub bus: Arc<Bus>,
    /// Where they say that the machine ends.
    pub ending: Arc<Ending>,
    /// What they count.
    pub counters: Arc<Counters>,
    /// When the process started.
    pub started: Instant,
}

thread_local! {
    /// `kvm_run.immediate_exit` of this thread's CPU.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// A kick: whatever the thread is doing, its next (or current) KVM_RUN returns at once.
extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `run` sets the pointer to a byte of the mapped kvm_run and clears it before the mapping goes; the
        // handler runs in the same thread.
        unsafe { ptr::write_volatile(flag, 1) };
        fence(Ordering::SeqCst);
    }
}

impl Cpus {
    /// Run the machine: every CPU in a thread of its own. If it is to be `paused`, they wait for [`Self::resume`].
    pub fn start(cpus: Vec<VcpuFd>, around: &Surroundings, paused: bool) -> Result<Self, Error> {
        register_signal_handler(SIGRTMIN(), kicked).map_err(|e| Error::Thread(e.into()))?;
        let cpus: Vec<_> = cpus.into_iter().map(|cpu| Arc::new(Mutex::new(cpu))).collect();
        let mut started = Self { threads: Vec::with_capacity(cpus.len()), cpus, gate: Arc::default() };
        if paused {
            started.gate.close();
        }
        for (index, cpu) in started.cpus.clone().into_iter().enumerate() {
            let (around, gate) = (around.clone(), started.gate.clone());
            let body = move || {
                let run = AssertUnwindSafe(|| run(index, &cpu, &around, &gate));
                if catch_unwind(run).is_err() {
                    around.ending.fail(format!("CPU {index}'s thread panicked: a bug in lab-vmm"));
                }
                IMMEDIATE_EXIT.set(ptr::null_mut());
            };
            let thread = thread::Builder::new().name(format!("cpu{index}")).stack_size(STACK);
            match thread.spawn(body) {
                Ok(thread) => started.threads.push(thread),
                Err(error) => {
                    started.stop()?;
                    return Err(Error::Thread(error));
                }
            }
        }
        Ok(started)
    }

    /// Have every CPU leave the guest and wait; all do when this returns. An error leaves the machine paused in part:
    /// it can only be resumed or stopped.
    pub fn pause(&self) -> Result<(), Error> {
        self.gate.close();
        self.until(|index, thread| self.gate.waits(index) || thread.is_finished())
    }

    /// The state of all CPUs, which are paused. `msrs` are those that KVM knows.
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<state::CpuState>, Error> {
        self.cpus.iter().map(|cpu| state::save(&lock(cpu), msrs)).collect()
    }

    /// Go on after a pause.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Make every CPU leave the guest, and end its thread.
    pub fn stop(self) -> Result<(), Error> {
        self.gate.end();
        self.until(|_, thread| thread.is_finished())?;
        for thread in self.threads {
            // It catches its panics.
            let _ = thread.join();
        }
        Ok(())
    }

    /// Kick the CPUs, one after the other, until each is as it should be.
    fn until(&self, done: impl Fn(usize, &JoinHandle<()>) -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + STOP_LIMIT;
        for (index, thread) in self.threads.iter().enumerate() {
            let mut pause = Duration::from_micros(20);
            while !done(index, thread) {
                // The thread may have ended meanwhile: then there is nobody to kick.
                let _ = thread.kill(SIGRTMIN());
                if Instant::now() > deadline {
                    return Err(Error::Stuck(index, STOP_LIMIT.as_secs()));
                }
                thread::park_timeout(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
        }
        Ok(())
    }
}

/// Run the guest until the machine ends.
fn run(index: usize, shared: &Mutex<VcpuFd>, around: &Surroundings, gate: &Gate) {
    let mut cpu = lock(shared);
    IMMEDIATE_EXIT.set(&raw mut cpu.get_kvm_run().immediate_exit);
    let counters = &around.counters;
    if index == 0 {
        counters.first_run_us.store(around.started.elapsed().as_micros() as u64, Ordering::Relaxed);
    }
    // Whether KVM has taken in what the last exit was answered with: it does when it runs the next time, and the state
    // of the CPU is whole only then (KVM API §4.10).
    let mut settled = true;
    while !around.ending.is_decided() {
        if !gate.is_open() {
            if settled {
                drop(cpu);
                let pass = gate.pass(index);
                cpu = lock(shared);
                match pass {
                    Pass::Through => {}
                    Pass::Waited => {
                        // So that the guest's watchdogs forgive the gap; a guest without KVM's clock has none to tell.
                        let _ = cpu.kvmclock_ctrl();
                    }
                    Pass::Ended => return,
                }
            } else {
                // Takes it in, and comes back before the guest runs.
                cpu.set_kvm_immediate_exit(1);
            }
        }
        settled = false;
        match cpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => around.bus.io_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => around.bus.io_read(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => around.bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => around.bus.mmio_write(address, data),
            Ok(VcpuExit::Shutdown) => around.ending.triple_fault(),
            Ok(VcpuExit::InternalError) => around.ending.fail(internal_error(index, &mut cpu)),
            Ok(VcpuExit::FailEntry(reason, _)) => around
                .ending
                .fail(format!("CPU {index} cannot enter the guest: the processor says {reason:#x}")),
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(other) => {
                let message = format!("CPU {index} left the guest for a reason not known here: {other:?}");
                around.ending.fail(message);
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                cpu.set_kvm_immediate_exit(0);
                settled = true;
                continue;
            }
            Err(error) => around.ending.fail(format!("CPU {index} cannot run: {error}")),
        }
        counters.exits.fetch_add(1, Ordering::Relaxed);
    }
}

/// What KVM could not do, and what to do about it.
fn internal_error(index: usize, cpu: &mut VcpuFd) -> String {
    let place =
        cpu.get_regs().map_or_else(|_| "an unknown address".into(), |regs| format!("{:#x}", regs.rip));
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, whose member of the union this is; it is plain data.
    let suberror = unsafe { cpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    format!(
        "KVM gave up on CPU {index} at {place} (internal error {suberror}): it could not run an instruction of the \
         guest's kernel; if this happens with every kernel, this host's /dev/kvm is not fit for them: run `lab doctor`"
    )
}
