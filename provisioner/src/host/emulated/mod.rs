//! The emulated host: QEMU's emulation of a machine with AMD's virtualization, for where this machine's KVM cannot run
//! stock kernels. Its root file system is the real machine's (virtiofs), so that the same binaries run at the same
//! paths under another kernel.
//!
//! - `machine`: start, stop, and what can be told of it; `supervisor`: the process that stands for it
//! - `kernel`, `keys`, `tools`, `files`: what it is made of
//! - `init`, `netlink`, `orders`: its first process; `console`: what it says; `clock`: its time
//! - `carry`: commands that are carried into it, from outside; `carried`: the same from inside; `request`, `ssh` and
//!   `line` are what goes between the two
//! - `corrections`: two faults of QEMU's that would crash nodes
//! - `forwards`, `qmp`: ports of the real machine that lead into it

pub mod carried;
pub mod carry;
mod clock;
mod console;
pub mod corrections;
pub mod files;
pub mod forwards;
pub mod init;
pub mod kernel;
mod keys;
mod line;
pub mod machine;
pub mod netlink;
pub mod orders;
mod qmp;
mod request;
mod ssh;
pub mod supervisor;
pub mod tools;

use std::{io, net::Ipv4Addr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{json_file, paths};

/// Version of the state, the requests and the answers, which processes of different ages may exchange.
pub const VERSION: u32 = 1;

/// The machine, as its lock file tells once commands can come in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`VERSION`].
    pub v: u32,
    /// Process id of the supervisor; only to be trusted while the file is locked.
    pub pid: u32,
    /// Port of 127.0.0.1 that leads to its SSH server.
    pub ssh_port: u16,
    /// Processors.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether the user started it, who will also stop it.
    pub by_hand: bool,
}

/// Why the emulated host can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is missing or too old.
    #[error("the emulated host cannot start: {0}")]
    Tools(#[from] tools::Error),
    /// A folder.
    #[error(transparent)]
    Paths(#[from] paths::Error),
    /// A file of ours.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// Its kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// QEMU.
    #[error(transparent)]
    Qmp(#[from] qmp::Error),
    /// Too little memory.
    #[error(
        "the emulated host cannot start: it needs at least {needed} MiB of free memory beside {reserve} MiB for this machine, and {available} MiB are free: end something that uses much of it"
    )]
    Memory {
        /// Least memory that it starts with, in MiB.
        needed: u64,
        /// What this machine keeps, in MiB.
        reserve: u64,
        /// What is free, in MiB.
        available: u64,
    },
    /// It runs already, and is not as it is wanted.
    #[error("the emulated host runs without AVX2: `lab host stop`, then `lab host start --avx2`")]
    WithoutAvx2,
    /// A path that the kernel's command line can't hold.
    #[error(
        "the emulated host cannot start: the path {0:?} has a character that a kernel's command line cannot hold (a quote, `=` or a line's end)"
    )]
    Path(PathBuf),
    /// It did not come up.
    #[error("the emulated host did not start: {reason} (its messages are in {logs}/*.log)")]
    Start {
        /// What the supervisor said.
        reason: String,
        /// Folder of the logs.
        logs: PathBuf,
    },
    /// Another command took too long.
    #[error("another lab command {0} and does not end: wait for it, or end it")]
    Busy(&'static str),
    /// Labs are running in it.
    #[error("labs are running in the emulated host ({}): `lab halt` them first, or use `lab host stop --force`", .0.join(", "))]
    LabsRunning(Vec<String>),
    /// It is not there.
    #[error("the emulated host is not running: `lab host start` starts it")]
    NotRunning,
    /// It does not end.
    #[error("the emulated host does not end: kill process {0}")]
    DoesNotStop(u32),
    /// A port of this machine is taken.
    #[error(
        "{protocol} port {bind}:{port} of this machine cannot be used: {source}: choose another port for the forward, or end what uses it"
    )]
    Port {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// Address.
        bind: Ipv4Addr,
        /// Port.
        port: u16,
        /// What the host said.
        source: io::Error,
    },
    /// The connection broke.
    #[error(
        "the emulated host was lost while the command ran in it{0}: see `lab host status`, then run the command again"
    )]
    Lost(String),
    /// Ctrl-C before there was anything to interrupt.
    #[error("interrupted before the command had begun")]
    Interrupted,
    /// The current folder is not visible in there.
    #[error(
        "the folder {0} does not exist in the emulated host, which has its own /run, /dev, /proc and /sys: work in another folder"
    )]
    Folder(PathBuf),
    /// A program can't be started.
    #[error("cannot run {program}: {source}")]
    Program {
        /// The program.
        program: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A command of ours failed.
    #[error("{what}: {said}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// What it said.
        said: String,
    },
    /// Something else of this machine's.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
}
