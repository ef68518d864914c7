//! The process that stands for the emulated machine. It holds the machine's lock, starts virtiofsd and QEMU as its
//! children, and ends with the first of them to end. If it is killed, the kernel kills both of them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::{
    State, clock::Clock, console::Console, corrections, files::Files, forwards, init, kernel, qmp::Qmp,
};
use crate::{json_file, lock, paths::Paths, say::say};

/// How long the machine may take until commands can come in.
pub const START_LIMIT: Duration = Duration::from_secs(180);
/// Name of virtiofsd's listening socket among its file descriptors.
const VIRTIOFS_TAG: &str = "lab";
/// What the kernel is told. The emulated processor has nothing to mitigate, and waits for RCU are dear on it; so are
/// repeated string instructions, by which a processor that has `rep_good` clears and copies pages. Its timers come with its
/// tick (`highres=off`), those of its guests among them: each interrupt between two would be an exit from a guest.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet loglevel=1 tsc=reliable panic=-1 mitigations=off nokaslr nowatchdog audit=0 \
    lsm=capability rcupdate.rcu_expedited=1 random.trust_cpu=on 8250.nr_uarts=1 cryptomgr.notests clearcpuid=rep_good \
    highres=off";

/// The emulated processor. Its vectors of 256 bits are slower than those of 128, and programs choose the widest that they
/// find: without AVX2, OpenSSL's SHA-256 is 6 times as fast, AES-128-GCM 25 times, ChaCha20-Poly1305 3 times.
const PROCESSOR: &str = "EPYC,-avx2";
/// The same for nodes that don't start without it.
const WITH_AVX2: &str = "EPYC";

/// What the supervisor has to start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The virtiofs server.
    pub virtiofsd: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// The `lab` binary, which is the machine's first process.
    pub lab: PathBuf,
    /// Processors.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether the user started it, who will also stop it.
    pub by_hand: bool,
    /// Whether its processors have AVX2.
    #[serde(default)]
    pub avx2: bool,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the lock.
    #[error("the emulated host is running already")]
    Running,
    /// Something of the real machine's failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// A child ended.
    #[error("{program} ended with {status}{said}")]
    Ended {
        /// Which.
        program: &'static str,
        /// How.
        status: ExitStatus,
        /// The end of its messages.
        said: String,
    },
    /// The machine's first process gave up.
    #[error("the machine's first process failed: {0}")]
    Init(String),
    /// It takes too long.
    #[error("it was not ready after {} s; the last that it said on its console: {last}", START_LIMIT.as_secs())]
    Late {
        /// The last line.
        last: String,
    },
    /// A file of ours is not as it should be.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// QEMU does not do what it should.
    #[error(transparent)]
    Qmp(#[from] super::qmp::Error),
    /// QEMU does not say where the SSH server can be reached.
    #[error("QEMU has no forward to the SSH server: {0:?}")]
    NoForward(String),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what: what.into(), source }
}

/// Runs as the supervisor: says `ready`, or why not, as one line on standard output, and ends when the machine does.
pub fn run(paths: &Paths) -> Result<(), Error> {
    let files = Files::new(paths);
    let result = supervise(&files);
    if let Err(error) = &result {
        // To the one who started it, who may be gone.
        let _ = writeln!(io::stdout(), "{error}");
    }
    result
}

fn supervise(files: &Files) -> Result<(), Error> {
    let held = lock::try_lock(&files.machine()).map_err(failed("cannot lock the emulated host"))?;
    let mut machine = held.ok_or(Error::Running)?;
    machine.set_len(0).map_err(failed("cannot write the emulated host's state"))?;
    let config: Config = json_file::read(&files.supervisor())?
        .ok_or_else(|| failed("cannot read its configuration")(io::ErrorKind::NotFound.into()))?;
    std::env::set_current_dir("/").map_err(failed("cannot enter /"))?;

    let clock = Clock::listen().map_err(failed("cannot listen on 127.0.0.1"))?;
    let mut virtiofsd = start_virtiofsd(files, &config).map_err(failed("cannot start virtiofsd"))?;
    // QEMU holds the lock too: the machine is gone only when QEMU is.
    rustix::io::fcntl_setfd(&machine, rustix::io::FdFlags::empty()).map_err(|e| failed("fcntl")(e.into()))?;
    let mut qemu = start_qemu(files, &config, &clock).map_err(failed("cannot start QEMU"))?;
    let console = qemu.stdout.take().ok_or_else(|| failed("no console")(io::ErrorKind::BrokenPipe.into()))?;
    let mut console =
        Console::new(console, &files.log("console")).map_err(failed("cannot write console.log"))?;

    let ended =
        run_until_end(files, &config, &mut machine, &clock, &mut console, [&mut virtiofsd, &mut qemu]);
    // Either of them is no machine without the other.
    for child in [&mut qemu, &mut virtiofsd] {
        let _ = child.kill();
        let _ = child.wait();
    }
    machine.set_len(0).map_err(failed("cannot write the emulated host's state"))?;
    ended
}

fn run_until_end(
    files: &Files,
    config: &Config,
    machine: &mut File,
    clock: &Clock,
    console: &mut Console,
    [virtiofsd, qemu]: [&mut Child; 2],
) -> Result<(), Error> {
    let pidfd = |child: &Child| {
        pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(|e| failed("pidfd_open")(e.into()))
    };
    let (virtiofsd_end, qemu_end) = (pidfd(virtiofsd)?, pidfd(qemu)?);
    let limit = Instant::now() + START_LIMIT;
    let mut ready = false;
    loop {
        let mut waits = [
            PollFd::new(&virtiofsd_end, PollFlags::IN),
            PollFd::new(&qemu_end, PollFlags::IN),
            PollFd::new(clock.listener(), PollFlags::IN),
            PollFd::from_borrowed_fd(console.pipe.as_fd(), PollFlags::IN),
        ];
        // A console that was closed is no longer waited for: it would be ready for ever.
        let count = if console.open { 4 } else { 3 };
        let left = limit.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(waits.get_mut(..count).unwrap_or_default(), (!ready).then_some(&timeout)) {
            Ok(0) if !ready => return Err(Error::Late { last: console.last.clone() }),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed("poll")(errno.into())),
        }
        clock.serve();
        for line in console.read() {
            if line == init::READY && !ready {
                // No guest has run in it yet.
                correct(config, qemu.id());
                write_state(files, config, machine)?;
                ready = true;
                tell_ready().map_err(failed("cannot let go of standard output"))?;
            } else if let Some(reason) = line.strip_prefix(init::FAILED) {
                return Err(Error::Init(reason.into()));
            }
        }
        for (program, child) in [("virtiofsd", &mut *virtiofsd), ("qemu", &mut *qemu)] {
            if let Some(status) = child.try_wait().map_err(failed("wait"))? {
                if ready && program == "qemu" && status.success() {
                    return Ok(());
                }
                return Err(Error::Ended { program, status, said: last_line(&files.log(program)) });
            }
        }
    }
}

/// Without this, labs run until one of QEMU's faults is met: no reason not to start. `lab doctor` tells, too.
fn correct(config: &Config, qemu: u32) {
    let found = corrections::find(&config.qemu);
    let known = found.len() == corrections::FAULTS;
    let corrected = match corrections::apply(qemu, &config.qemu, &found) {
        Ok(()) if !known => Err(io::Error::other("this build is not known")),
        corrected => corrected,
    };
    if let Err(error) = corrected {
        say(format_args!("lab: nodes may crash now and then: QEMU's faults cannot be corrected: {error}"));
    }
}

/// Says that commands can come in, and lets go of standard output, on which somebody waits for its end.
fn tell_ready() -> io::Result<()> {
    // Whoever started this may be gone; the machine stays for whoever comes next.
    let _ = writeln!(io::stdout(), "ready");
    let null = File::options().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}

fn write_state(files: &Files, config: &Config, machine: &mut File) -> Result<(), Error> {
    let mut qmp = Qmp::connect(&files.qmp_socket())?;
    let list = qmp.monitor("info usernet")?;
    let ssh = forwards::parse(&list).into_iter().find(|open| open.guest == (init::ADDRESS, 22));
    let ssh_port = ssh.ok_or(Error::NoForward(list))?.port;
    let state = State {
        v: super::VERSION,
        pid: std::process::id(),
        ssh_port,
        cpus: config.cpus,
        memory_mib: config.memory_mib,
        by_hand: config.by_hand,
    };
    let line = serde_json::to_vec(&state).map_err(|e| failed("state")(e.into()))?;
    machine.write_all(&line).map_err(failed("cannot write the emulated host's state"))
}

/// Lets the kernel kill a child when the thread that starts it dies, however it dies: here the only one.
pub fn die_with_us(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec, prctl(2) and getppid(2) are async-signal-safe and touch no memory of the parent.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before that.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        })
    }
}

fn start_virtiofsd(files: &Files, config: &Config) -> io::Result<Child> {
    let socket = files.virtiofs_socket();
    remove(&socket)?;
    // Listening before QEMU is started: nothing has to be waited for.
    let listener = UnixListener::bind(&socket)?;
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?;
    let mut command = Command::new(&config.virtiofsd);
    command
        .args(["--shared-dir", "/", "--sandbox", "none", "--cache", "always", "--log-level", "error"])
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(files.log("virtiofsd"))?);
    die_with_us(&mut command).spawn()
}

fn start_qemu(files: &Files, config: &Config, clock: &Clock) -> io::Result<Child> {
    remove(&files.qmp_socket())?;
    let kernel = files.kernel();
    let mut command = Command::new(&config.qemu);
    command
        .args(["-name", "lab-host", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"])
        .args(["-M", "q35,smm=off,sata=off,usb=off,vmport=off,memory-backend=memory"])
        // virtiofsd works in the machine's memory; the real machine gives it page by page, as it is used.
        .arg("-object")
        .arg(format!("memory-backend-memfd,id=memory,size={}M,share=on", config.memory_mib))
        .arg("-m")
        .arg(format!("{}M", config.memory_mib))
        .arg("-smp")
        .arg(config.cpus.to_string())
        .args(["-accel", "tcg,thread=multi", "-cpu", if config.avx2 { WITH_AVX2 } else { PROCESSOR }])
        .arg("-kernel")
        .arg(kernel::image(&kernel))
        .arg("-append")
        .arg(format!(
            "root={VIRTIOFS_TAG} rootfstype=virtiofs rw {KERNEL_ARGUMENTS} init=\"{}\" -- host-init \"{}\" {}",
            config.lab.display(),
            files.init().display(),
            clock.port()?
        ))
        .arg("-chardev")
        .arg(format!("socket,id=fs,path={}", comma(&files.virtiofs_socket())))
        .arg("-device")
        .arg(format!("vhost-user-fs-pci,chardev=fs,tag={VIRTIOFS_TAG},queue-size=1024"))
        .arg("-netdev")
        .arg(format!("user,id=net,hostfwd=tcp:127.0.0.1:0-{}:22", init::ADDRESS))
        .args(["-device", "virtio-net-pci,netdev=net,romfile="])
        .args(["-device", "virtio-rng-pci"])
        .args(["-serial", "stdio", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", comma(&files.qmp_socket())))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(files.log("qemu"))?);
    die_with_us(&mut command).spawn()
}

/// A path in one of QEMU's option lists, where commas are doubled.
fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn last_line(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty() && !line.contains("warning:"));
    line.map(|line| format!(": {line}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_said_last_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(last_line(&log), "");
        fs::write(&log, "qemu: Could not set up x\nqemu: warning: TCG\n\n").unwrap();
        assert_eq!(last_line(&log), ": qemu: Could not set up x");
    }

    #[test]
    fn children_die_with_their_parent() {
        // The kernel counts the thread that started the child as its parent (prctl(2), PR_SET_PDEATHSIG).
        let start = || {
            let mut command = Command::new("tail");
            command.args(["-f", "/dev/null"]);
            die_with_us(&mut command).spawn().unwrap()
        };
        let mut child = std::thread::spawn(start).join().unwrap();
        let status = crate::child::wait(&mut child, Duration::from_secs(20)).unwrap();
        assert_eq!(status.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status)), Some(9));
    }
}
