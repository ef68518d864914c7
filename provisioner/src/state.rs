//! What is recorded of a lab on disk, and what its locks say of its processes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lab_net::config::Forward;
use serde::{Deserialize, Serialize};

use crate::{
    json_file,
    labfile::topology::{Node, Topology},
    lock,
    paths::{LabPaths, Paths},
    snapshot,
};

/// `lab.json`: the lab as it was last brought up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabState {
    /// The lab as its labfile described it then.
    pub topology: Topology,
    /// Forwards that were added by `lab forward add`.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Its number, if it is a fork.
    #[serde(default)]
    pub fork: Option<u32>,
    /// Whether an `up` has ever succeeded: from then on it is the user's.
    #[serde(default)]
    pub came_up: bool,
}

impl LabState {
    /// Reads the state of a lab; `None` if it was never brought up.
    pub fn read(paths: &LabPaths) -> Result<Option<Self>, json_file::Error> {
        json_file::read(&paths.state())
    }

    /// Records the state.
    pub fn write(&self, paths: &LabPaths) -> Result<(), json_file::Error> {
        json_file::write(&paths.state(), self)
    }

    /// All forwards: the labfile's and the added ones.
    pub fn all_forwards(&self) -> Vec<Forward> {
        let mut all: Vec<_> = self.topology.nodes.iter().flat_map(|node| node.forwards.clone()).collect();
        all.extend(self.forwards.iter().filter(|added| !all.contains(added)).cloned().collect::<Vec<_>>());
        all
    }
}

/// `node.json`: what a node's disk is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Folder below the lab's `images/` that holds the kernel, initrd and root file system of this node.
    pub image: String,
    /// Unique id of the machine: 32 hexadecimal digits (machine-id(5)).
    pub machine_id: String,
}

/// `steps.json`: digests of the steps that have run on a node's disk, by their name.
pub type StepRecords = BTreeMap<String, String>;

/// Where a node is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// No disk yet.
    Absent,
    /// A disk, no machine.
    Stopped,
    /// A machine that `lab suspend` has put away.
    Suspended,
    /// A machine.
    Running,
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Absent => "absent",
            Self::Stopped => "stopped",
            Self::Suspended => "suspended",
            Self::Running => "running",
        })
    }
}

/// Where node `name` is in its life.
pub fn node_state(paths: &LabPaths, name: &str) -> NodeState {
    let dir = paths.node(name);
    if lock::is_held(&vmm_lock(&dir)) {
        NodeState::Running
    } else if snapshot::has_machine(paths, snapshot::SUSPENDED, name) {
        NodeState::Suspended
    } else if dir.join("node.json").exists() {
        NodeState::Stopped
    } else {
        NodeState::Absent
    }
}

/// The file that a node's `lab-vmm` locks.
pub fn vmm_lock(node_dir: &Path) -> PathBuf {
    node_dir.join("vmm.lock")
}

/// The file that `lab-net` locks.
pub fn net_lock(paths: &LabPaths) -> PathBuf {
    paths.net().join("net.lock")
}

/// Whether the lab's network runs.
pub fn net_is_running(paths: &LabPaths) -> bool {
    lock::is_held(&net_lock(paths))
}

/// Names of all labs, sorted.
pub fn labs(paths: &Paths) -> Vec<String> {
    names_in(&paths.labs())
}

/// Names of the nodes that have a folder, sorted: those of the labfile, and those it no longer has.
pub fn nodes_on_disk(paths: &LabPaths) -> Vec<String> {
    names_in(&paths.dir.join("nodes"))
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

/// Whether any process of the lab runs.
pub fn is_running(paths: &LabPaths) -> bool {
    net_is_running(paths)
        || nodes_on_disk(paths).iter().any(|name| node_state(paths, name) == NodeState::Running)
}

/// Finds a node by name.
pub fn find_node<'a>(topology: &'a Topology, name: &str) -> Option<&'a Node> {
    topology.nodes.iter().find(|node| node.name == name)
}
