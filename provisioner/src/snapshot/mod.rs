//! Snapshots of a whole running lab: all its nodes at one instant.
//!
//! ```text
//! labs/NAME/snapshots/S/snapshot.json   the lab and its nodes (`Record`); what has none is no snapshot
//! labs/NAME/snapshots/S/NODE/           the machine: what its `lab-vmm` wrote, and its SSH host key
//! labs/NAME/layers/ID.qcow2             frozen overlays, below the disks of snapshots and nodes
//! ```
//!
//! A suspended lab is one that has the snapshot `suspended` and does not run: `suspend`.
//!
//! `save` and `restore` make and use them, `layers` freezes disks, `clock` tells guests that time has passed,
//! `pack` makes a file of one for another machine.

mod clock;
mod fork;
pub mod kept;
mod layers;
pub mod pack;
mod restore;
mod save;
mod suspend;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    actions, channel, control, files, json_file,
    lab::Lab,
    machine,
    paths::{LabPaths, SECRETS},
    state::{LabState, NodeRecord, StepRecords},
};

pub use clock::catch_up;
pub use fork::{fork, is_missing};
pub use layers::prune;
pub use restore::{is_unfinished, restore};
pub use save::save;
pub use suspend::{is_suspended, suspend};

/// Name of the snapshot that the first `up` makes.
pub const FIRST_UP: &str = "first-up";
/// Name of the snapshot that `lab suspend` makes.
pub const SUSPENDED: &str = "suspended";
/// Name of what was suspended and could not be restored.
const NOT_RESUMED: &str = "not-resumed";
/// Version of `snapshot.json`.
const FORMAT: u32 = 1;
/// File of a node that `lab-vmm` writes.
const STATE: &str = "state";
/// Files of a node's folder that its guest knows the content of.
const KEYS: [&str; 2] = ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"];

/// Why a snapshot can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one.
    #[error(
        "the lab `{lab}` has a snapshot `{name}`: take another name, or remove it with `lab snapshot rm {name}`"
    )]
    Exists {
        /// The lab.
        lab: String,
        /// The snapshot.
        name: String,
    },
    /// There is none.
    #[error("the lab `{lab}` has no snapshot `{name}`: {known}")]
    NotThere {
        /// The lab.
        lab: String,
        /// The snapshot.
        name: String,
        /// What there is.
        known: String,
    },
    /// A name that is lab's.
    #[error("`{0}` is a snapshot that lab makes by itself: take another name")]
    Reserved(String),
    /// Its machines can't be loaded.
    #[error(
        "{source}\n  the nodes' disks are those of the snapshot now: `lab up` boots them; `lab snapshot restore {name}` tries again"
    )]
    NotRestored {
        /// The snapshot.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// Nothing is suspended.
    #[error("the lab `{0}` is not suspended: `lab up` starts what does not run")]
    NotSuspended(String),
    /// Not a name.
    #[error("`{0}` is no name for a snapshot: use small letters, digits and -, at most 63")]
    Name(String),
    /// Nothing to save.
    #[error("no node of the lab `{0}` runs: `lab up` starts them, then there is something to save")]
    NothingRuns(String),
    /// Made by another version.
    #[error("the snapshot `{name}` has format {found}; this version of lab knows format {FORMAT}")]
    Format {
        /// The snapshot.
        name: String,
        /// Its format.
        found: u32,
    },
    /// Something that concerns one node.
    #[error("{node}: {source}")]
    Node {
        /// The node.
        node: String,
        /// What.
        source: Box<Error>,
    },
    /// A machine did not answer, or refused.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A node can't be entered.
    #[error(transparent)]
    Channel(#[from] channel::Error),
    /// An action of `up`.
    #[error(transparent)]
    Action(#[from] Box<actions::Error>),
    /// A process did not end.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] lab_vmm::qcow2::Error),
    /// The lab.
    #[error(transparent)]
    Lab(#[from] crate::lab::Error),
    /// A folder of lab's.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// The host refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.into(), source }
}

/// `snapshot.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// Version of lab that made it.
    pub lab_version: String,
    /// When: seconds since 1970.
    pub created_s: u64,
    /// The lab.
    pub state: LabState,
    /// Its nodes by name.
    pub nodes: BTreeMap<String, SavedNode>,
}

/// A node in a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedNode {
    /// Whether it ran: then its machine is in the snapshot.
    pub running: bool,
    /// What its disk is made from.
    record: NodeRecord,
    /// The steps that had run.
    steps: StepRecords,
    /// The layer of each disk.
    layers: Vec<String>,
}

/// A snapshot in a list.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub created_s: u64,
    /// Its running nodes.
    pub nodes: Vec<String>,
    /// Space that the memory of its nodes takes, in bytes.
    pub memory_bytes: u64,
    /// Space that its frozen disks take, in bytes; other snapshots and the nodes may share it.
    pub disk_bytes: u64,
}

fn folder(dirs: &LabPaths, name: &str) -> PathBuf {
    dirs.dir.join("snapshots").join(name)
}

/// Names become paths.
fn check_name(name: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = (1..=63).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-');
    if good { Ok(()) } else { Err(Error::Name(name.into())) }
}

/// Whether a snapshot has the running machine of a node.
pub fn has_machine(dirs: &LabPaths, name: &str, node: &str) -> bool {
    let folder = folder(dirs, name);
    folder.join("snapshot.json").exists() && folder.join(node).join(STATE).exists()
}

/// Names of a lab's snapshots, sorted.
pub fn names(dirs: &LabPaths) -> Vec<String> {
    let entries = fs::read_dir(dirs.dir.join("snapshots")).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter(|entry| entry.path().join("snapshot.json").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| check_name(name).is_ok())
        .collect();
    names.sort();
    names
}

/// Reads a snapshot's record.
fn read(lab: &Lab, name: &str) -> Result<Record, Error> {
    check_name(name)?;
    // The version alone first: what else is in the file depends on it.
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let path = folder(&lab.dirs, name).join("snapshot.json");
    let known = names(&lab.dirs);
    match json_file::read::<Version>(&path)? {
        None if name == SUSPENDED => Err(Error::NotSuspended(lab.topology.name.clone())),
        None => Err(Error::NotThere {
            lab: lab.topology.name.clone(),
            name: name.into(),
            known: match known.is_empty() {
                true => "`lab snapshot save NAME` makes one".into(),
                false => format!("it has {}", known.join(", ")),
            },
        }),
        Some(Version { format }) if format != FORMAT => {
            Err(Error::Format { name: name.into(), found: format })
        }
        Some(_) => json_file::read(&path)?.ok_or_else(|| Error::Name(name.into())),
    }
}

/// The lab as a snapshot has it.
pub fn state(lab: &Lab, name: &str) -> Result<LabState, Error> {
    Ok(read(lab, name)?.state)
}

/// All snapshots of a lab.
pub fn list(lab: &Lab) -> Result<Vec<Entry>, Error> {
    names(&lab.dirs)
        .into_iter()
        .map(|name| {
            let record = read(lab, &name)?;
            let nodes: Vec<_> =
                record.nodes.iter().filter(|(_, node)| node.running).map(|(name, _)| name.clone()).collect();
            let folder = folder(&lab.dirs, &name);
            let memory = nodes.iter().map(|node| space(&folder.join(node).join("memory"))).sum();
            let ids = record.nodes.values().flat_map(|node| &node.layers);
            let disk_bytes = layers::below(&lab.dirs, ids)?.iter().map(|layer| space(layer)).sum();
            Ok(Entry { name, created_s: record.created_s, nodes, memory_bytes: memory, disk_bytes })
        })
        .collect()
}

/// Removes a snapshot, and the layers that nothing else stands on.
pub fn remove(lab: &Lab, name: &str) -> Result<(), Error> {
    read(lab, name)?;
    forget(lab, name)?;
    layers::prune(lab)
}

/// Gives a snapshot another name, in the place of the one that has it.
fn rename(lab: &Lab, from: &str, to: &str) -> Result<(), Error> {
    let (from, to) = (folder(&lab.dirs, from), folder(&lab.dirs, to));
    clear(&to)?;
    fs::rename(&from, &to).map_err(io("rename", &from))
}

/// Removes a snapshot alone.
fn forget(lab: &Lab, name: &str) -> Result<(), Error> {
    let folder = folder(&lab.dirs, name);
    // The record first: what is left of an interrupted removal is no snapshot.
    let record = folder.join("snapshot.json");
    fs::remove_file(&record).map_err(io("remove", &record))?;
    fs::remove_dir_all(&folder).map_err(io("remove", &folder))
}

/// Removes a file or folder, if it is there.
fn clear(path: &Path) -> Result<(), Error> {
    files::remove(path).map_err(io("remove", path))
}

/// Gives all files below a folder a second name.
fn link(from: &Path, to: &Path) -> Result<(), Error> {
    files::link(from, to).map_err(io("link", from))
}

/// Gives all that snapshot `name` needs a second name below `to`, as it lies in the lab's folder.
fn link_whole(lab: &Lab, name: &str, to: &Path) -> Result<Record, Error> {
    let record = read(lab, name)?;
    for part in ["images", "ssh", SECRETS, &format!("snapshots/{name}")] {
        link(&lab.dirs.dir.join(part), &to.join(part))?;
    }
    for layer in layers::below(&lab.dirs, record.nodes.values().flat_map(|node| &node.layers))? {
        if let Some(from) = layer.parent()
            && let Some(id) = from.file_name()
        {
            link(from, &to.join("layers").join(id))?;
        }
    }
    Ok(record)
}

/// Space that a file takes, in bytes.
fn space(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Does the same for all nodes at the same time; the first error in their order, if there is one.
fn each<T: Send>(nodes: &[String], what: impl Fn(&str) -> Result<T, Error> + Sync) -> Result<Vec<T>, Error> {
    let what = &what;
    let results: Vec<Result<T, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    what(node).map_err(|source| Error::Node { node: node.clone(), source: Box::new(source) })
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    results.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for good in ["a", "fresh", "before-exam-2", "7"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "A", "-f", "a b", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
