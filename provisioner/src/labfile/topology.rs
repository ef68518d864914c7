//! What a labfile means: names expanded, defaults filled in, addresses given, everything checked. The plan and all
//! actions work on this, never on the labfile's text.

use std::{net::Ipv4Addr, path::PathBuf};

use lab_net::config::Forward;
use serde::{Deserialize, Serialize};

/// A lab as its labfile describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// Name of the lab: `[a-z0-9][a-z0-9-]{0,30}`.
    pub name: String,
    /// Absolute path of the labfile.
    pub labfile: PathBuf,
    /// The network.
    pub network: Network,
    /// Nodes, in the order of the file, counts expanded.
    pub nodes: Vec<Node>,
    /// Stacks, in the order of the file.
    pub stacks: Vec<Stack>,
    /// The user's own provisioning, in the order of the file.
    pub steps: Vec<Step>,
    /// The exercise's checks, in the order of the file.
    pub checks: Vec<Check>,
}

/// The lab's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Network address.
    pub subnet: Ipv4Addr,
    /// Prefix length in bits.
    pub prefix: u8,
    /// Address of the gateway: the subnet's first, unless the file says otherwise.
    pub gateway: Ipv4Addr,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its name and host name.
    pub name: String,
    /// `master`, `worker`, or a role of the user's.
    pub role: String,
    /// Image that it starts from.
    pub image: String,
    /// Address in the lab.
    pub ip: Ipv4Addr,
    /// MAC address in lower case, made from the lab's and the node's names unless the file gives it.
    pub mac: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Whether its CPUs can run virtual machines.
    #[serde(default)]
    pub nested: bool,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the root disk in bytes.
    pub disk_bytes: u64,
    /// Sizes of further, empty disks in bytes (vdb, vdc, …).
    pub extra_disks_bytes: Vec<u64>,
    /// Ports of the host that lead to this node, or through it to an address in the lab.
    pub forwards: Vec<Forward>,
}

/// Nodes that something applies to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Every node.
    All,
    /// Every node of a role.
    Role(String),
    /// One node.
    Node(String),
}

/// Use of a stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stack {
    /// Name of the stack: a folder of `stacks/` beside the labfile or of lab's own.
    pub name: String,
    /// That folder beside the labfile; `None` for lab's own, which is in the binary (see `crate::stack`).
    pub folder: Option<PathBuf>,
    /// Where its software comes from (`debian`, `upstream`, …): the stack's first, unless the file says otherwise.
    pub source: String,
    /// Options, given to its scripts as `LAB_OPT_NAME` (upper case, `-` as `_`).
    pub options: std::collections::BTreeMap<String, String>,
}

/// A step of the user's own provisioning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Where it runs.
    pub on: Target,
    /// Shell script (`/bin/sh -e`), run as root.
    pub run: String,
    /// Files and folders beside the labfile that it takes along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Whether it changes files only, in the same way on every node: then its result is kept in a layer.
    #[serde(default)]
    pub bake: bool,
}

/// A check of the exercise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What is checked.
    pub name: String,
    /// Where the test runs; on every one of these nodes it must succeed.
    pub on: Target,
    /// Shell script (`/bin/sh -e`), run as root; status 0 is success.
    pub run: String,
    /// What to tell someone whose lab fails it.
    pub hint: Option<String>,
}
