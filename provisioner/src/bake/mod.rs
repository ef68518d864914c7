//! Baking without a node: steps run on an image's files, in namespaces of this machine, where a node would be slow (the
//! emulated host). Only steps of lab's own stacks that say so (`chroot = true`) are run like this, never a labfile's own.
//!
//! - `outside`: starts the process, maps its users, serves its one connection to the world: the cache of packages
//! - `inside`: that process, in user, mount, network, IPC and UTS namespaces: the files lie in its memory (a tmpfs), so that
//!   nothing is left of it, however it ends
//! - `step`: one step, in process and mount namespaces of its own, with the image's files as its root
//! - `filter`: the capabilities and system calls that it is left with
//!
//! What is trusted: the packages that a step installs, as far as a build of an image trusts them, whose scripts run as the
//! same kind of root. They see the image's files, `/proc` of their own processes and a few devices, and reach nothing but the
//! cache.

mod filter;
mod inside;
mod outside;
mod step;

use std::{ffi::OsStr, os::fd::RawFd, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use outside::{Disk, Event, Step, run};

/// The command that is the process in the namespaces; its plan comes on its standard input.
const INSIDE: &str = "bake-inside";
/// The command that is one step, the same way.
const STEP: &str = "bake-step";
/// Line that says that a step begins, before its number.
const BEGINS: &str = "lab-bake: begins ";
/// Line that says that a step's disk is there, before its number.
const MADE: &str = "lab-bake: made ";

/// Why steps can't be baked without a node, or were not.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine has not what is needed.
    #[error("{0}")]
    Unavailable(String),
    /// The host refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A step failed, or what makes a disk of it.
    #[error("{step}: {reason}{}", .tail.last().map(|line| format!(": {line}")).unwrap_or_default())]
    Failed {
        /// The step.
        step: String,
        /// How it ended.
        reason: String,
        /// Its last lines.
        tail: Vec<String>,
    },
}

fn failed<E: Into<std::io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Io { action, source: source.into() }
}

/// What the process in the namespaces is told.
#[derive(Debug, Serialize, Deserialize)]
struct InsidePlan {
    /// The image's files: a tar archive packed by zstd.
    archive: RawFd,
    /// Where it says who it is, and gives the socket that steps reach the cache at.
    control: RawFd,
    /// Most memory that the files may take, in MiB.
    memory_mib: u64,
    /// The steps, one upon the other.
    steps: Vec<InsideStep>,
}

/// One step, as the process in the namespaces is told it.
#[derive(Debug, Serialize, Deserialize)]
struct InsideStep {
    /// Shell script for `/bin/sh -e`.
    script: String,
    /// Its environment.
    environment: Vec<(String, String)>,
    /// A tar archive with the files that it finds in its folder `$LAB_STEP`.
    files: Option<RawFd>,
    /// The file that becomes an ext4 image of all files after the step, and its size in bytes.
    disk: Option<(RawFd, u64)>,
}

/// What the process of one step is told.
#[derive(Debug, Serialize, Deserialize)]
struct StepPlan {
    /// Process id of who waits for it.
    parent: u32,
    /// The folder that becomes its root.
    root: PathBuf,
    /// As in [`InsideStep`].
    script: String,
    /// As in [`InsideStep`].
    environment: Vec<(String, String)>,
    /// As in [`InsideStep`].
    files: Option<RawFd>,
}

/// Runs this process as a part of a bake, if that is what it was started for; its exit status.
pub fn internal(verb: &OsStr) -> Option<Result<u8, String>> {
    let told = |error: Error| error.to_string();
    match verb.to_str() {
        Some(INSIDE) => Some(inside::run().map_err(told)),
        Some(STEP) => Some(step::run().map_err(told)),
        _ => None,
    }
}

/// Reads the plan on standard input.
fn plan<T: serde::de::DeserializeOwned>() -> Result<T, Error> {
    serde_json::from_reader(std::io::stdin().lock())
        .map_err(|error| failed("read what is to be done")(std::io::Error::from(error)))
}
