//! The first process of the emulated machine: mounts, modules, network, and the SSH server that commands come in by.
//!
//! The root file system is the real machine's, shared by virtiofs, so this is the same `lab` binary at the same path.
//! System folders are read-only in here; the rest is writable as it is for the user outside.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use kvm_ioctls::Kvm;
use rustix::{
    mount::{MountFlags, mount, mount_bind, mount_remount},
    process::{Pid, Signal, WaitOptions},
    system::RebootCommand,
};
use serde::{Deserialize, Serialize};

use super::{clock, netlink::Netlink, orders};
use crate::memory::meminfo;
use crate::say::say;

/// What init says on the console when commands can come in.
pub const READY: &str = "lab-host: ready";
/// What precedes the reason on the console when the machine can't come up.
pub const FAILED: &str = "lab-host: failed: ";
/// Name that commands log in by.
pub const USER: &str = "lab-host";
/// Address of the machine on QEMU's user network (10.0.2.0/24, gateway .2, name server .3).
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// The real machine, whose 127.0.0.1 is reached by it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Folder of what is the machine's own.
pub const RUN: &str = "/run/lab-host";
/// Folders of the system, which nothing in here has to change.
const READ_ONLY: [&str; 8] = ["/usr", "/etc", "/boot", "/bin", "/sbin", "/lib", "/lib32", "/lib64"];
/// How far the speed of a guest's processor may be from this one's, in millionths, until KVM takes it for another one.
const TSC_TOLERANCE: &str = "/sys/module/kvm/parameters/tsc_tolerance_ppm";
/// How long processes get to end before they are killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Memory that files of the real machine may take in any case, in MiB.
const CACHE_MIB: u64 = 1024;
/// How often that is looked at.
const CACHE_PERIOD: Duration = Duration::from_secs(10);
/// How long the SSH server may take to listen.
const SERVER_LIMIT: Duration = Duration::from_secs(20);
/// Set when the machine has been told to stop, so that nothing is started again.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// What init has to know; a file whose path is its argument.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitConfig {
    /// Kernel modules that commands need, in the order of their loading.
    pub first: Vec<PathBuf>,
    /// Kernel modules that are loaded while commands can come in already.
    pub later: Vec<PathBuf>,
    /// User that commands run as.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
    /// The SSH server's private key, in dropbear's format.
    pub host_key: PathBuf,
    /// The one public key that is let in, a line of authorized_keys(5).
    pub authorized_key: String,
    /// The SSH server.
    pub dropbear: PathBuf,
    /// Where its messages go.
    pub log: PathBuf,
    /// Folders that stay writable wherever they lie.
    pub writable: Vec<PathBuf>,
}

/// Why the machine can't come up.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: String,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |error| Error { what: what.into(), source: error.into() }
}

/// Runs as process 1, until the machine stops. `clock` is the real machine's port that tells the time.
pub fn run(config: &Path, clock: Option<u16>) -> ! {
    if rustix::process::getpid() != Pid::INIT {
        say("lab: this command is the first process of the emulated host, and nothing else");
        std::process::exit(2);
    }
    if let Err(error) = console().and_then(|()| serve(config, clock)) {
        println!("{FAILED}{error}");
    }
    power_off()
}

/// Gives this process the console, which the kernel could not open before /dev was there.
fn console() -> Result<(), Error> {
    mount_at("devtmpfs", "/dev", "mode=0755")?;
    let console =
        File::options().read(true).write(true).open("/dev/console").map_err(failed("open /dev/console"))?;
    rustix::stdio::dup2_stdin(&console).map_err(failed("standard input"))?;
    rustix::stdio::dup2_stdout(&console).map_err(failed("standard output"))?;
    rustix::stdio::dup2_stderr(&console).map_err(failed("standard error"))
}

fn serve(config: &Path, clock: Option<u16>) -> Result<(), Error> {
    let bytes = fs::read(config).map_err(failed(format!("read {}", config.display())))?;
    let config: InitConfig = serde_json::from_slice(&bytes).map_err(failed("its configuration"))?;
    mounts(&config)?;
    for module in &config.first {
        load(module).map_err(failed(format!("load {}", module.display())))?;
    }
    // KVM takes the processor's speed from the kernel's first measurement, which the kernel makes a better one after a second.
    // Where the two are further apart than KVM tolerates, it means guests to have another speed than the processor, which it
    // can't give them here: their time stands still for it, and no timer of theirs comes when it should (kvm_set_tsc_khz()).
    fs::write(TSC_TOLERANCE, "100000").map_err(failed(TSC_TOLERANCE))?;
    open_device("/dev/kvm").map_err(failed("QEMU emulates no SVM here: /dev/kvm"))?;
    // With its first machine, and after its last, KVM has the kernel change code that runs, of which QEMU has been seen to
    // run an old translation. As long as this machine is there, no other is the first or the last.
    let first = Kvm::new().and_then(|kvm| kvm.create_vm());
    let _first = first.map_err(|errno| failed("make a virtual machine")(io::Error::from(errno)))?;
    settings()?;
    network()?;
    if let Some(Err(error)) = clock.map(clock::set) {
        println!("lab-host: the clock: {error}");
    }
    accounts(&config)?;
    let limit = rustix::process::Rlimit { current: Some(1024), maximum: Some(1 << 19) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).map_err(failed("setrlimit"))?;

    orders::listen(config.uid, config.gid, stop).map_err(failed("the socket for orders"))?;
    if let Some(port) = clock {
        thread::Builder::new()
            .name("clock".into())
            .spawn(move || clock::keep(port))
            .map_err(failed("start a thread"))?;
    }
    let later_modules = config.later.clone();
    let mut server = start_server(&config)?;
    wait_for_server()?;
    println!("{READY}");
    thread::Builder::new().name("cache".into()).spawn(|| bound_cache()).map_err(failed("start a thread"))?;
    thread::Builder::new()
        .name("later".into())
        .spawn(move || later(&later_modules))
        .map_err(failed("start a thread"))?;
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == Pid::from_child(&server) && !STOPPING.load(Ordering::SeqCst) => {
                println!("lab-host: the SSH server ended, starting another");
                server = start_server(&config)?;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CHILD) if STOPPING.load(Ordering::SeqCst) => thread::park(),
            Err(errno) => return Err(Error { what: "wait for processes".into(), source: errno.into() }),
        }
    }
}

fn mount_at(kind: &str, target: &str, options: &str) -> Result<(), Error> {
    let options = std::ffi::CString::new(options).map_err(failed("mount options"))?;
    mount(kind, target, kind, MountFlags::NOSUID, options.as_c_str())
        .map_err(failed(format!("mount {kind} on {target}")))
}

fn private(path: impl AsRef<Path>, mode: u32) -> Result<(), Error> {
    let path = path.as_ref();
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed(path.display().to_string()))
}

fn mounts(config: &InitConfig) -> Result<(), Error> {
    mount_at("proc", "/proc", "")?;
    mount_at("sysfs", "/sys", "")?;
    // What udev would add, and bash's `<(…)` wants.
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let link = format!("/dev/{link}");
        symlink(format!("/proc/self/fd{target}"), &link).map_err(failed(link))?;
    }
    private("/dev/pts", 0o755)?;
    private("/dev/shm", 0o755)?;
    mount_at("devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666")?;
    mount_at("tmpfs", "/dev/shm", "mode=1777")?;
    mount_at("cgroup2", "/sys/fs/cgroup", "")?;
    for folder in &config.writable {
        if folder.starts_with("/run") || folder.starts_with("/dev") {
            return Err(Error {
                what: format!(
                    "{} is on a file system of the real machine's own: choose another LAB_HOME",
                    folder.display()
                ),
                source: io::ErrorKind::Unsupported.into(),
            });
        }
        mount_bind(folder, folder).map_err(failed(format!("mount {}", folder.display())))?;
    }
    for folder in READ_ONLY {
        if fs::symlink_metadata(folder).is_ok_and(|data| data.is_dir()) {
            bind_read_only(folder, folder)?;
        }
    }
    // The name server's address is written where /etc/resolv.conf leads, which may be below /run. Search domains stay.
    let search = lab_net::dns::search::parse(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    let search = if search.is_empty() { String::new() } else { format!("search {}\n", search.join(" ")) };
    let resolver = fs::canonicalize("/etc/resolv.conf")
        .or_else(|_| fs::read_link("/etc/resolv.conf").map(|link| Path::new("/etc").join(link)));
    mount_at("tmpfs", "/run", "mode=0755")?;
    private(RUN, 0o755)?;
    private("/run/lock", 0o1777)?;
    fs::write(format!("{RUN}/resolv.conf"), format!("nameserver {NAME_SERVER}\n{search}"))
        .map_err(failed("resolv.conf"))?;
    match resolver {
        Ok(path) if path.starts_with("/run") => {
            private(path.parent().unwrap_or(Path::new("/run")), 0o755)?;
            fs::copy(format!("{RUN}/resolv.conf"), &path).map_err(failed(path.display().to_string()))?;
        }
        Ok(path) => bind_read_only(&format!("{RUN}/resolv.conf"), &path.to_string_lossy())?,
        Err(_) => println!("lab-host: no /etc/resolv.conf here: names are not resolved"),
    }
    Ok(())
}

fn bind_read_only(source: &str, target: &str) -> Result<(), Error> {
    mount_bind(source, target).map_err(failed(format!("mount {target}")))?;
    mount_remount(target, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID, c"")
        .map_err(failed(format!("make {target} read-only")))
}

fn load(module: &Path) -> io::Result<()> {
    match rustix::system::finit_module(File::open(module)?, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Loads what nobody waits for.
fn later(modules: &[PathBuf]) {
    for module in modules {
        if let Err(error) = load(module) {
            println!("lab-host: no module {}: {error}", module.display());
        }
    }
    for device in ["/dev/net/tun", "/dev/vhost-vsock"] {
        if let Err(error) = open_device(device) {
            println!("lab-host: {device}: {error}");
        }
    }
}

/// Keeps the memory for files of the real machine small: that machine has most of them in its own already, and what
/// has been used once in here stays taken from it until this one ends.
fn bound_cache() -> ! {
    loop {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let mib = |field| meminfo(&text, field).unwrap_or(0);
        let cached = mib("Cached").saturating_sub(mib("Shmem"));
        if cached > (mib("MemTotal") / 8).max(CACHE_MIB) {
            // What is in use or not written yet stays.
            if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "1") {
                println!("lab-host: drop_caches: {error}");
            }
        }
        thread::sleep(CACHE_PERIOD);
    }
}

/// Lets every user use a device, as on a desktop.
fn open_device(path: &str) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

/// Waits until the SSH server takes connections, so that nobody outside has to try again.
fn wait_for_server() -> Result<(), Error> {
    let end = Instant::now() + SERVER_LIMIT;
    loop {
        match TcpStream::connect((ADDRESS, 22)) {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(failed("the SSH server takes no connections")(error)),
        }
    }
}

fn settings() -> Result<(), Error> {
    for (name, value) in [
        // lab-net's ICMP echo without root.
        ("net/ipv4/ping_group_range", "0 2147483647"),
        // Forwards may listen on an address that only the real machine has.
        ("net/ipv4/ip_nonlocal_bind", "1"),
        // Port 80 as outside for the user who may not: the real machine's port is what is guarded.
        ("net/ipv4/ip_unprivileged_port_start", "0"),
        ("kernel/printk", "3 4 1 3"),
    ] {
        fs::write(format!("/proc/sys/{name}"), value).map_err(failed(name))?;
    }
    // A way to the real machine and back is dear: one for each 128 KiB, and reading takes twice as long.
    if let Ok(root) = fs::metadata("/") {
        let device = std::os::unix::fs::MetadataExt::dev(&root);
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        drop(fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "4096"));
    }
    rustix::system::sethostname(USER.as_bytes()).map_err(failed("host name"))
}

fn network() -> Result<(), Error> {
    let netlink = Netlink::open().map_err(failed("netlink"))?;
    let lo = netlink.index("lo").map_err(failed("lo"))?;
    netlink.set_up(lo).map_err(failed("lo"))?;
    let card = netlink.index("eth0").map_err(failed("eth0"))?;
    netlink.set_up(card).map_err(failed("eth0"))?;
    netlink.add_address(card, ADDRESS, 24).map_err(failed("the address of eth0"))?;
    netlink.set_default_route(card, GATEWAY).map_err(failed("the default route"))?;
    // Forwards of the real machine come in for 127.0.0.1, where lab-net listens.
    fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").map_err(failed("route_localnet"))
}

/// Adds the name that commands log in by, for the user's own id, with a home that holds the one key that is let in.
fn accounts(config: &InitConfig) -> Result<(), Error> {
    let home = format!("{RUN}/home");
    private(format!("{home}/.ssh"), 0o700)?;
    let keys = format!("{home}/.ssh/authorized_keys");
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&keys)
        .and_then(|mut file| writeln!(file, "{}", config.authorized_key.trim()))
        .map_err(failed(&keys))?;
    for path in [&home, &format!("{home}/.ssh"), &keys] {
        chown(path, Some(config.uid), Some(config.gid)).map_err(failed(path))?;
    }
    // Whoever this user is, the way there is open to him.
    private("/run/user", 0o755)?;
    let runtime = format!("/run/user/{}", config.uid);
    private(&runtime, 0o700)?;
    chown(&runtime, Some(config.uid), Some(config.gid)).map_err(failed(&runtime))?;

    let mut users = fs::read_to_string("/etc/passwd").map_err(failed("/etc/passwd"))?;
    if !users.ends_with('\n') {
        users.push('\n');
    }
    users.push_str(&format!("{USER}:x:{}:{}::{home}:/bin/sh\n", config.uid, config.gid));
    let path = format!("{RUN}/passwd");
    fs::write(&path, users).map_err(failed(&path))?;
    bind_read_only(&path, "/etc/passwd")
}

fn start_server(config: &InitConfig) -> Result<Child, Error> {
    let log = File::create(&config.log).map_err(failed(config.log.display().to_string()))?;
    Command::new(&config.dropbear)
        .args(["-F", "-E", "-m", "-s", "-j", "-k", "-W", "1048576", "-p", &format!("{ADDRESS}:22"), "-P"])
        .arg(format!("{RUN}/dropbear.pid"))
        .arg("-r")
        .arg(&config.host_key)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(failed(config.dropbear.display().to_string()))
}

/// Ends all processes, then the machine.
fn stop() -> ! {
    STOPPING.store(true, Ordering::SeqCst);
    for signal in [Signal::TERM, Signal::KILL] {
        // The "process group" of init is kill(2)'s -1: every process but this one.
        let _ = rustix::process::kill_process_group(Pid::INIT, signal);
        let end = Instant::now() + STOP_LIMIT;
        while others() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
    }
    power_off()
}

/// Whether there are processes beside this one and the kernel's own threads.
fn others() -> bool {
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let number =
            name.to_str().is_some_and(|name| name != "1" && name.bytes().all(|byte| byte.is_ascii_digit()));
        // Kernel threads and zombies have no command line.
        number && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    })
}

fn power_off() -> ! {
    rustix::fs::sync();
    let error = rustix::system::reboot(RebootCommand::PowerOff);
    println!("{FAILED}the machine does not stop: {error:?}");
    loop {
        thread::park();
    }
}
