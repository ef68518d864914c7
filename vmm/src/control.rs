//! The control protocol of `lab-vmm`: one JSON object a line in each direction, answered in order.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Version of the protocol; a request with another one is refused.
pub const VERSION: u32 = 1;

/// A request line, such as `{"v":1,"do":"status"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub v: u32,
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// How the machine is: answered with [`Reply::Status`].
    Status,
    /// Counters: answered with [`Reply::Stats`].
    Stats,
    /// Press the power button; the guest decides what follows.
    PowerButton,
    /// Have the guest stand still, all its CPUs and devices, until [`Action::Resume`].
    Pause,
    /// Let it go on; done already if it is not paused.
    Resume,
    /// Write a snapshot of the machine into a folder that is there and empty; a machine that runs stands still meanwhile.
    /// Its disks are not in it. What is written may not be on the disk yet when the reply comes.
    Save {
        /// The folder.
        folder: PathBuf,
    },
    /// End the machine at once, as pulling the plug does; disks are closed properly.
    Kill,
}

/// A reply line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done; nothing to tell.
    Done,
    /// Answer to [`Action::Status`].
    Status(Status),
    /// Answer to [`Action::Stats`].
    Stats(Stats),
    /// Refused or failed, and why.
    Error(String),
}

/// How a machine is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The machine's name.
    pub name: String,
    /// Process id of the `lab-vmm`.
    pub pid: u32,
    /// Whether it is paused.
    pub paused: bool,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Milliseconds since the process started (since the last reset, if the guest was reset).
    pub uptime_ms: u64,
    /// Whether each network card is joined to `lab-net`.
    pub links: Vec<bool>,
    /// `KEY=VALUE` lines that the guest's systemd has sent (READY=1, X_SYSTEMD_UNIT_ACTIVE=ssh-access.target, …), the
    /// newest last, at most 256, without repeats.
    pub notified: Vec<String>,
}

/// Counters of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Microseconds from process start to the first KVM_RUN.
    pub first_run_us: u64,
    /// Exits to user space.
    pub exits: u64,
    /// Requests, bytes read, bytes written of each disk.
    pub disks: Vec<[u64; 3]>,
    /// Frames and bytes sent, frames and bytes received by each card.
    pub nets: Vec<[u64; 4]>,
}
