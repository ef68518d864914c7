//! Snapshots of a running machine: a folder with two files.
//!
//! - `state`: all that is small (CPUs, interrupt controllers, clock, devices, and a checksum for each piece of memory), as
//!   JSON behind a header that tells version, length and checksum (`state_file`);
//! - `memory`: the guest's memory, a sparse file in which untouched pages take no room (`ram`).
//!
//! The disks are not in it: who asks for a snapshot freezes their overlays while the machine is paused.

pub mod chips;
pub mod ram;
mod state_file;

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{config::VmConfig, cpu::state::CpuState, pci::FunctionState, platform::SerialState};
pub use chips::Chips;
use ram::{GuestRam, Sums};

/// File with everything but memory.
const STATE: &str = "state";
/// File with the guest's memory.
const MEMORY: &str = "memory";

/// Why there is no snapshot, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of it cannot be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is not one, or not a whole one.
    #[error("the snapshot {path} cannot be used: {why}")]
    Unusable {
        /// Its folder, or the file of it that is bad.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// All that is small of a machine at one moment.
#[derive(Serialize, Deserialize)]
pub struct State {
    /// Virtual CPUs.
    pub cpus: Vec<CpuState>,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Interrupt controllers and clock.
    pub chips: Chips,
    /// What is on the PCI bus, by slot.
    pub functions: Vec<FunctionState>,
    /// The serial port.
    pub serial: SerialState,
    /// What the guest's systemd had said.
    pub notified: Vec<String>,
    /// Checksums of the memory.
    pub sums: Sums,
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.into(), source }
}

fn unusable(path: &Path, why: impl Into<String>) -> Error {
    Error::Unusable { path: path.into(), why: why.into() }
}

/// Write the guest's memory into `folder`, which is there and holds no snapshot.
pub fn save_memory(folder: &Path, ram: &GuestRam) -> Result<Sums, Error> {
    let path = folder.join(MEMORY);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.map_err(io_error("create", &path))?;
    ram.save(&file).map_err(io_error("write", &path))
}

/// Write everything else into `folder`.
pub fn save_state(folder: &Path, state: &State) -> Result<(), Error> {
    state_file::write(&folder.join(STATE), state)
}

/// Read what is in `folder`, except its memory; for the machine that `config` describes.
pub fn load_state(folder: &Path, config: &VmConfig) -> Result<State, Error> {
    let state = state_file::read(&folder.join(STATE))?;
    let (cpus, mib) = (state.cpus.len(), state.memory_mib);
    if cpus != usize::from(config.cpus) || mib != config.memory_mib {
        let (wanted, wanted_mib) = (config.cpus, config.memory_mib);
        let why =
            format!("it is of a machine with {cpus} CPUs and {mib} MiB, not with {wanted} and {wanted_mib}");
        return Err(unusable(folder, why));
    }
    Ok(state)
}

/// Map the memory that is in `folder`: privately, so that the file stays as it is; pages come when they are used.
pub fn load_memory(folder: &Path, state: &State, prefetch: bool) -> Result<GuestRam, Error> {
    let path = folder.join(MEMORY);
    let file = OpenOptions::new().read(true).open(&path).map_err(io_error("open", &path))?;
    GuestRam::load(&file, state.memory_mib, &state.sums, prefetch).map_err(|error| match error {
        ram::LoadError::Io(source) => Error::Io { action: "read", path, source },
        other => unusable(&path, other.to_string()),
    })
}
