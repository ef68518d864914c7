//! The command as a process of its own.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use lab_net::{
    config::NetworkConfig,
    control::{Action, Reply},
};
use rustix::process::{Pid, Signal};

use crate::common::{self, LIMIT};

/// A running lab-net.
pub struct Process {
    pub child: Child,
    pub config: NetworkConfig,
}

pub fn spawn(dir: &Path, config: &NetworkConfig) -> Child {
    let path = dir.join("network.json");
    std::fs::write(&path, serde_json::to_vec(config).unwrap()).unwrap();
    Command::new(env!("CARGO_BIN_EXE_lab-net"))
        .arg("--config")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Start the command and wait until it is ready.
pub fn start(dir: &Path) -> Process {
    let config = common::config(dir);
    let mut child = spawn(dir, &config);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    Process { child, config }
}

impl Process {
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Wait for its end: whether it succeeded, and what it said.
    pub fn ended(&mut self) -> (bool, String) {
        ended(&mut self.child)
    }

    pub fn resident_kib(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn ended(child: &mut Child) -> (bool, String) {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            let mut words = String::new();
            child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
            return (status.success(), words);
        }
        assert!(start.elapsed() < LIMIT, "lab-net does not end");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

pub fn folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o700)).tempdir().unwrap()
}

pub fn ask(config: &NetworkConfig, action: Action) -> Reply {
    common::ask(&mut BufReader::new(UnixStream::connect(&config.control).unwrap()), action)
}
