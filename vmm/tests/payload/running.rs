//! A lab-vmm process under test.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use lab_vmm::{
    config::{ConsoleConfig, VmConfig},
    control::{Action, Reply, Request, VERSION},
};

/// How long anything here may take: these kernels need milliseconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether there is a /dev/kvm to run on. If not, says so on standard error, past the test harness' capture.
pub fn kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &there {
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        let _ = writeln!(std::io::stderr(), "NOT TESTED: {name}: no usable /dev/kvm ({error})");
    }
    there.is_ok()
}

/// A folder with a kernel in it, and the machine that boots it.
pub struct Bench {
    /// Files of the machine.
    pub folder: tempfile::TempDir,
    /// The machine: 1 CPU, 32 MiB, with log, control socket and lock.
    pub config: VmConfig,
}

impl Bench {
    pub fn new(kernel: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("kernel"), kernel).unwrap();
        let config = VmConfig {
            name: "tiny".into(),
            kernel: at("kernel"),
            initrd: Vec::new(),
            cmdline: String::new(),
            cpus: 1,
            nested: false,
            memory_mib: 32,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console: ConsoleConfig { log: Some(at("log")), ..Default::default() },
            control: Some(at("control")),
            lock: Some(at("lock")),
            restore: None,
            prefetch: false,
            paused: false,
        };
        Self { folder, config }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the guest has said.
    pub fn log(&self) -> String {
        std::fs::read(self.path("log"))
            .map_or_else(|_| String::new(), |log| log.iter().map(|b| *b as char).collect())
    }

    pub fn start(&self) -> Running {
        std::fs::write(self.path("config"), serde_json::to_vec(&self.config).unwrap()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_lab-vmm"))
            .arg("--config")
            .arg(self.path("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running { child: Some(child) }
    }

    /// Wait until the guest has said `text`.
    pub fn wait_for(&self, text: &str) {
        wait(|| self.log().contains(text), || format!("the guest said {:?}", self.log()));
    }

    /// Ask the machine something.
    pub fn ask(&self, action: Action) -> Reply {
        ask(&self.path("control"), action)
    }
}

/// Wait until `done`; what was last seen is told if it never is.
pub fn wait(done: impl Fn() -> bool, seen: impl Fn() -> String) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "waited {LIMIT:?}; {}", seen());
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn ask(socket: &Path, action: Action) -> Reply {
    let start = Instant::now();
    let mut stream = UnixStream::connect(socket);
    // A socket has its name a moment before anybody listens on it.
    while stream.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        && start.elapsed() < LIMIT
    {
        std::thread::park_timeout(Duration::from_millis(5));
        stream = UnixStream::connect(socket);
    }
    let mut stream = stream.unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut line = serde_json::to_vec(&Request { v: VERSION, action }).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    serde_json::from_str(&reply).unwrap()
}

/// A process, killed if the test fails.
pub struct Running {
    child: Option<Child>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Wait for its end; status and output.
    pub fn end(mut self) -> Output {
        let mut child = self.child.take().unwrap();
        let start = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > LIMIT => {
                    child.kill().unwrap();
                    panic!("lab-vmm still runs after {LIMIT:?}: {:?}", child.wait_with_output());
                }
                None => std::thread::park_timeout(Duration::from_millis(5)),
            }
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
