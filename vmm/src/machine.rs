//! One machine, from its configuration to its end: puts the parts together, and runs the main loop beside the CPUs.

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, atomic::Ordering},
    thread,
    time::Instant,
};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::{
    event::{PollFd, PollFlags, poll},
    rand::{GetRandomFlags, getrandom},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    acpi, boot,
    bus::Bus,
    config::VmConfig,
    console::{self, Hub},
    control::{Action, Reply, Stats, Status},
    control_socket::ControlSocket,
    cpu::{self, Counters, Cpus, Surroundings, cpuid},
    devices::{self, Devices},
    ending::{End, Ending},
    guest_clock, host_kernel, layout, memory,
    notify::Notify,
    pci::wires::KvmWires,
    platform::{Line, Platform},
    signals::Signals,
    snapshot::{self, Chips, State, chips, ram::GuestRam},
    socket,
};

/// Why a machine cannot be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for what there is not, or the host has not what each machine needs.
    #[error("{0}")]
    Config(String),
    /// There is no KVM.
    #[error("cannot use /dev/kvm: {0}; `lab doctor` says what to do")]
    NoKvm(kvm_ioctls::Error),
    /// KVM refused.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The host refused something small.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel, initrds, command line.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// ACPI tables.
    #[error("cannot write the ACPI tables into guest memory: {0}")]
    Acpi(vm_memory::GuestMemoryError),
    /// CPUs.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// Console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// Control or notification socket.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// It ran, and cannot go on.
    #[error("{0}")]
    Failed(String),
}

fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { action, source }
}

fn io(action: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// A machine whose CPUs have not started.
pub struct Machine {
    config: VmConfig,
    started: Instant,
    ending: Arc<Ending>,
    signals: Signals,
    bus: Arc<Bus>,
    cpus: Vec<VcpuFd>,
    counters: Arc<Counters>,
    devices: Devices,
    hub: Hub,
    control: Option<ControlSocket>,
    notify: Option<Notify>,
    /// While it is paused: where the guest's clock stands, in nanoseconds.
    paused_at_ns: Option<u64>,
    /// Whether the guest has yet to hear that it is a copy of another one.
    renewed: bool,
    /// Kept, as the memory is, until the CPUs have stopped and the machine is gone.
    vm: Arc<VmFd>,
    ram: GuestRam,
}

impl Machine {
    /// Make the machine. `started` is when the process started.
    pub fn new(config: VmConfig, started: Instant) -> Result<Self, Error> {
        config.check().map_err(Error::Config)?;
        let signals = Signals::new().map_err(io("wait for signals"))?;
        let mut machine = match config.restore.clone() {
            None => Self::boot(config, started, signals)?,
            Some(folder) => Self::restore(config, started, signals, &folder)?,
        };
        if machine.config.paused {
            machine.paused_at_ns.get_or_insert(0);
        }
        Ok(machine)
    }

    /// A machine at its kernel's first instruction.
    fn boot(config: VmConfig, started: Instant, signals: Signals) -> Result<Self, Error> {
        boot::check_cmdline(&config.cmdline)?;
        let ram = GuestRam::new(config.memory_mib)?;
        let memory = &ram.memory;
        let (loaded, rest) = thread::scope(|scope| {
            // Reading tens of megabytes takes as long as everything else together: side by side.
            let loader = thread::Builder::new().name("loader".into()).spawn_scoped(scope, || {
                let kernel = boot::load_kernel(memory, &config.kernel)?;
                Ok((kernel, boot::load_initrds(memory, &config.initrd)?))
            });
            let rest = Parts::new(&config, memory);
            let loaded: Result<_, boot::Error> = match loader.map_err(io("start a thread"))?.join() {
                Ok(loaded) => loaded,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            Ok::<_, Error>((loaded, rest))
        })?;
        let (kernel, initrd) = loaded?;
        let parts = rest?;
        boot::describe(memory, &kernel, initrd.as_ref(), &config.cmdline)?;
        acpi::write(memory, &acpi::Machine { cpus: config.cpus, window64: parts.window64 })
            .map_err(Error::Acpi)?;
        renew(memory)?;
        if let Some(boot_cpu) = parts.cpus.first() {
            cpu::registers::set_entry(boot_cpu, memory, &kernel.entry)?;
        }
        Ok(Self::assemble(config, started, signals, ram, parts))
    }

    /// A machine where the snapshot in `folder` left it.
    fn restore(config: VmConfig, started: Instant, signals: Signals, folder: &Path) -> Result<Self, Error> {
        let unusable = |why| snapshot::Error::Unusable { path: folder.into(), why };
        let state = snapshot::load_state(folder, &config)?;
        let ram = snapshot::load_memory(folder, &state, config.prefetch)?;
        let mut parts = Parts::new(&config, &ram.memory)?;
        for (fresh, saved) in parts.cpus.iter().zip(&state.cpus) {
            cpu::state::check(fresh, &parts.supported_cpuid, saved).map_err(unusable)?;
        }
        let boot = parts.cpus.first().zip(state.cpus.first());
        for (index, (fresh, saved)) in parts.cpus.iter().zip(&state.cpus).enumerate() {
            cpu::state::restore(fresh, saved, boot.filter(|_| index > 0))?;
        }
        state.chips.restore(&parts.vm).map_err(kvm("restore the interrupt controllers"))?;
        parts.bus.pci.restore(&state.functions).map_err(unusable)?;
        parts.bus.platform.restore(&state.serial);
        if let Some(notify) = &mut parts.notify {
            notify.restore(&state.notified);
        }
        renew(&ram.memory)?;
        let mut machine = Self::assemble(config, started, signals, ram, parts);
        machine.paused_at_ns = Some(state.chips.clock_ns);
        machine.renewed = true;
        Ok(machine)
    }

    fn assemble(config: VmConfig, started: Instant, signals: Signals, ram: GuestRam, parts: Parts) -> Self {
        let Parts { vm, cpus, bus, ending, devices, hub, control, notify, supported_cpuid: _, window64: _ } =
            parts;
        Self {
            config,
            started,
            ending,
            signals,
            bus,
            cpus,
            counters: Arc::default(),
            devices,
            hub,
            control,
            notify,
            paused_at_ns: None,
            renewed: false,
            vm,
            ram,
        }
    }

    /// Run until the machine ends; how it ended.
    pub fn run(mut self) -> Result<End, Error> {
        let around = Surroundings {
            bus: self.bus.clone(),
            ending: self.ending.clone(),
            counters: self.counters.clone(),
            started: self.started,
        };
        let cpus = Cpus::start(std::mem::take(&mut self.cpus), &around, self.paused_at_ns.is_some())?;
        if !self.config.paused {
            self.resume(&cpus)?;
        }
        guest_clock::keep(self.config.vsock.as_ref()).map_err(io("start a thread"))?;
        let waited = self.wait(&cpus);
        let stopped = cpus.stop();
        // After the CPUs, so that nothing rings any more: requests under way are completed and files closed.
        self.bus.pci.stop();
        waited?;
        stopped?;
        match self.ending.end() {
            Some(End::Failed(why)) => Err(Error::Failed(why)),
            Some(end) => Ok(end),
            None => Err(Error::Failed("the main loop ended before the machine: a bug in lab-vmm".into())),
        }
    }

    /// The main loop: control socket, console, notifications and signals, until the machine ends.
    fn wait(&mut self, cpus: &Cpus) -> Result<(), Error> {
        while !self.ending.is_decided() {
            // SAFETY: the event lives as long as `self.ending`, which is not touched while this is waited for.
            let ending = unsafe { BorrowedFd::borrow_raw(self.ending.event().as_raw_fd()) };
            let mut sources = vec![ending];
            sources.push(std::os::fd::AsFd::as_fd(&self.signals));
            self.hub.sources(&mut sources);
            if let Some(control) = &self.control {
                control.sources(&mut sources);
            }
            if let Some(notify) = &self.notify {
                notify.sources(&mut sources);
            }
            let mut polled: Vec<_> =
                sources.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io("wait for events")(error.into())),
            }
            drop(polled);
            if self.signals.arrived() || self.hub.serve() {
                self.ending.decide(End::Killed);
            }
            if let Some(notify) = &mut self.notify {
                notify.serve();
            }
            if let Some(mut control) = self.control.take() {
                control.serve(|action| self.answer(action, cpus));
                self.control = Some(control);
            }
        }
        Ok(())
    }

    fn answer(&mut self, action: Action, cpus: &Cpus) -> Reply {
        match action {
            Action::Status => Reply::Status(self.status()),
            Action::Stats => Reply::Stats(Stats {
                first_run_us: self.counters.first_run_us.load(Ordering::Relaxed),
                exits: self.counters.exits.load(Ordering::Relaxed),
                disks: self.devices.disks(),
                nets: self.devices.nets(),
            }),
            Action::PowerButton => match self.bus.platform.press_power_button() {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Error(format!("cannot press the power button: {error}")),
            },
            Action::Pause => done("pause", self.pause(cpus)),
            Action::Resume => done("resume", self.resume(cpus)),
            Action::Save { folder } => done("save the machine", self.save(&folder, cpus)),
            Action::Kill => {
                self.ending.decide(End::Killed);
                Reply::Done
            }
        }
    }

    /// CPUs first: nothing rings a device that stands still.
    fn pause(&mut self, cpus: &Cpus) -> Result<(), Error> {
        if self.paused_at_ns.is_none() {
            if let Err(error) = cpus.pause() {
                cpus.resume();
                return Err(error.into());
            }
            self.paused_at_ns = Some(chips::clock_ns(&self.vm).map_err(kvm("read the guest's clock"))?);
            self.bus.pci.pause();
        }
        Ok(())
    }

    fn resume(&mut self, cpus: &Cpus) -> Result<(), Error> {
        if let Some(clock_ns) = self.paused_at_ns.take() {
            chips::set_clock(&self.vm, clock_ns).map_err(kvm("set the guest's clock"))?;
            let resumed = self.bus.pci.resume().map_err(Error::Failed);
            if std::mem::take(&mut self.renewed) {
                self.bus.platform.tell_generation().map_err(io("raise an interrupt"))?;
            }
            cpus.resume();
            resumed?;
        }
        Ok(())
    }

    /// Write a snapshot into `folder`, with the machine standing still.
    fn save(&mut self, folder: &Path, cpus: &Cpus) -> Result<(), Error> {
        let ran = self.paused_at_ns.is_none();
        self.pause(cpus)?;
        let saved = self.save_paused(folder, cpus);
        if ran {
            self.resume(cpus)?;
        }
        saved
    }

    fn save_paused(&self, folder: &Path, cpus: &Cpus) -> Result<(), Error> {
        let msrs = Kvm::new().map_err(Error::NoKvm)?.get_msr_index_list();
        let msrs = msrs.map_err(kvm("tell what registers it has"))?;
        let clock_ns = self.paused_at_ns.unwrap_or_default();
        let state = State {
            cpus: cpus.save(msrs.as_slice())?,
            memory_mib: self.config.memory_mib,
            chips: Chips::save(&self.vm, clock_ns).map_err(kvm("read the interrupt controllers"))?,
            functions: self.bus.pci.save().map_err(Error::Failed)?,
            serial: self.bus.platform.save(),
            notified: self.notify.as_ref().map_or_else(Vec::new, |notify| notify.lines().to_vec()),
            sums: snapshot::save_memory(folder, &self.ram)?,
        };
        Ok(snapshot::save_state(folder, &state)?)
    }

    fn status(&self) -> Status {
        Status {
            name: self.config.name.clone(),
            pid: std::process::id(),
            paused: self.paused_at_ns.is_some(),
            cpus: self.config.cpus,
            memory_mib: self.config.memory_mib,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            links: self.devices.links(),
            notified: self.notify.as_ref().map_or_else(Vec::new, |notify| notify.lines().to_vec()),
        }
    }
}

/// The answer to a request that has been tried.
fn done(what: &str, outcome: Result<(), Error>) -> Reply {
    match outcome {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Error(format!("cannot {what}: {error}")),
    }
}

/// Give the machine a new generation id.
fn renew(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let mut id = [0u8; 16];
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| io("get random numbers")(error.into()))?;
    memory.write_slice(&id, GuestAddress(layout::GENERATION_ID)).map_err(Error::Acpi)
}

/// What is made while the kernel is read.
struct Parts {
    vm: Arc<VmFd>,
    cpus: Vec<VcpuFd>,
    supported_cpuid: Vec<kvm_cpuid_entry2>,
    bus: Arc<Bus>,
    ending: Arc<Ending>,
    devices: Devices,
    hub: Hub,
    control: Option<ControlSocket>,
    notify: Option<Notify>,
    window64: Option<(u64, u64)>,
}

impl Parts {
    fn new(config: &VmConfig, memory: &GuestMemoryMmap) -> Result<Self, Error> {
        let control = config.control.as_ref().map(|path| ControlSocket::new(path)).transpose()?;
        let notify = Notify::new(config.vsock.as_ref())?;
        let (hub, input) = Hub::new(&config.console)?;
        let kvm_fd = Kvm::new().map_err(Error::NoKvm)?;
        if let Some(sentence) = host_kernel::missing(&kvm_fd) {
            return Err(Error::Config(sentence));
        }
        let vm = Arc::new(create_vm(&kvm_fd)?);
        memory::register(&vm, memory)?;
        let ending = Arc::new(Ending::new().map_err(io("make an event"))?);
        let template =
            cpuid::Template::new(&kvm_fd, config.nested).map_err(kvm("tell what CPUs it supports"))?;
        if config.nested && !template.is_nested() {
            let sentence = "this host's KVM offers its guests no virtual machines of their own: look at `nested` in \
                            /sys/module/kvm_intel/parameters or kvm_amd, or remove `nested = true`";
            return Err(Error::Config(sentence.into()));
        }
        let cpus = (0..config.cpus)
            .map(|index| create_cpu(&vm, &template, index, config.cpus))
            .collect::<Result<_, Error>>()?;
        let platform = Platform::new(
            Box::new(hub.output()),
            line(&vm, layout::COM1_IRQ)?,
            line(&vm, layout::GED_IRQ)?,
            line(&vm, layout::GENERATION_IRQ)?,
            ending.clone(),
        );
        let (devices, pci) = make_devices(config, memory, &vm, &hub, input)?;
        let window64 = (1u64 << template.physical_bits().min(52)
            >= layout::PCI_WINDOW64 + layout::PCI_WINDOW64_SIZE)
            .then_some((layout::PCI_WINDOW64, layout::PCI_WINDOW64_SIZE));
        let bus = Arc::new(Bus { platform, pci: Arc::new(pci) });
        let supported_cpuid = template.supported().to_vec();
        Ok(Self { vm, cpus, supported_cpuid, bus, ending, devices, hub, control, notify, window64 })
    }
}

fn make_devices(
    config: &VmConfig,
    memory: &GuestMemoryMmap,
    vm: &Arc<VmFd>,
    hub: &Hub,
    input: OwnedFd,
) -> Result<(Devices, crate::pci::PciBus), Error> {
    let wires = Arc::new(KvmWires::new(vm.clone()));
    Ok(Devices::new(config, memory, wires, input, Box::new(hub.output()))?)
}

/// A machine with its interrupt controllers, without a PIT.
fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, Error> {
    let vm = loop {
        match kvm_fd.create_vm() {
            // A signal came in between.
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm("create a machine"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm("place its task state segment"))?;
    vm.create_irq_chip().map_err(kvm("create interrupt controllers"))?;
    Ok(vm)
}

fn create_cpu(vm: &VmFd, template: &cpuid::Template, index: u8, count: u8) -> Result<VcpuFd, Error> {
    let cpu = vm.create_vcpu(index.into()).map_err(kvm("create a CPU"))?;
    let cpuid = template.cpu(index, count).map_err(kvm("describe a CPU"))?;
    cpu.set_cpuid2(&cpuid).map_err(kvm("describe a CPU"))?;
    cpu::registers::set_msrs(&cpu)?;
    Ok(cpu)
}

/// An input of the I/O APIC.
fn line(vm: &VmFd, irq: u32) -> Result<Line, Error> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(io("make an event"))?;
    vm.register_irqfd(&event, irq).map_err(kvm("join an interrupt"))?;
    Ok(Line(event))
}
