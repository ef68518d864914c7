//! A lab that a command works on: its topology, its folders, and what actions need of the host.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use lab_images::{manifest::Manifest, store::Store};
use lab_net::config::{Forward, Host, NetworkConfig};

use crate::{
    channel::Channel,
    json_file,
    labfile::topology::{Node, Target, Topology},
    lock,
    paths::{LabPaths, Paths},
    progress::Progress,
    state::{LabState, NodeRecord},
};

/// Why a lab can't be worked on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another folder's lab has this name.
    #[error(
        "a lab named `{name}` belongs to {other}: give this one another name, or destroy that one with `lab destroy -f {other}`"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The other labfile.
        other: PathBuf,
    },
    /// Another command is at work.
    #[error("another lab command is changing the lab `{0}`: wait for its end, then try again")]
    Busy(String),
    /// A node that isn't there.
    #[error("the lab `{lab}` has no node `{node}`: its nodes are {known}")]
    NoNode {
        /// The lab.
        lab: String,
        /// The name that was asked for.
        node: String,
        /// The names there are.
        known: String,
    },
    /// It was never brought up.
    #[error("the lab `{0}` is not there: `lab up` makes it")]
    NotThere(String),
    /// A folder.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// A lock could not be taken.
    #[error("cannot lock {path}: {source}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A node's pinned image is gone.
    #[error(
        "{node}: its image below {path} is missing: `lab destroy {node}` and `lab up` make the node anew"
    )]
    ImageGone {
        /// The node.
        node: String,
        /// Where it should be.
        path: PathBuf,
    },
}

/// A lab at work.
pub struct Lab {
    /// The user's folders.
    pub paths: Paths,
    /// The lab's.
    pub dirs: LabPaths,
    /// The lab as its labfile describes it.
    pub topology: Topology,
    /// Forwards beyond the labfile's.
    pub added_forwards: Vec<Forward>,
    /// Its number, if it is a fork.
    pub fork: Option<u32>,
    /// Whether an `up` has ever succeeded.
    pub came_up: bool,
    /// Whether its processes end with this one, whatever ends it.
    pub bound: bool,
    /// Whether images and layers have to be there: none is built.
    pub offline: bool,
    /// The image store.
    pub store: Store,
    /// How many times longer than usual things may take: more than 1 where KVM itself is emulated.
    pub patience: u32,
    /// Where progress is told.
    pub progress: Progress,
}

impl Lab {
    /// A lab from its topology; nothing is made yet. The name must not be another labfile's.
    pub fn new(paths: &Paths, topology: Topology, progress: Progress) -> Result<Self, Error> {
        let dirs = paths.lab(&topology.name);
        let state = LabState::read(&dirs)?;
        if let Some(state) = &state
            && state.topology.labfile != topology.labfile
        {
            let other = state.topology.labfile.clone();
            return Err(Error::NameTaken { name: topology.name, other });
        }
        Ok(Self {
            fork: state.as_ref().and_then(|state| state.fork),
            came_up: state.as_ref().is_some_and(|state| state.came_up),
            added_forwards: state.map(|state| state.forwards).unwrap_or_default(),
            bound: false,
            offline: false,
            store: Store::open(&paths.images()),
            patience: if crate::host::is_slow() { 8 } else { 1 },
            paths: paths.clone(),
            dirs,
            topology,
            progress,
        })
    }

    /// Takes the lab's lock, which is held as long as the file is open.
    pub fn lock(&self) -> Result<File, Error> {
        self.dirs.create()?;
        let path = self.dirs.lock();
        match lock::try_lock(&path) {
            Ok(Some(file)) => Ok(file),
            Ok(None) => Err(Error::Busy(self.topology.name.clone())),
            Err(source) => Err(Error::Lock { path, source }),
        }
    }

    /// What is recorded of the lab.
    pub fn state(&self) -> LabState {
        LabState {
            topology: self.topology.clone(),
            forwards: self.added_forwards.clone(),
            fork: self.fork,
            came_up: self.came_up,
        }
    }

    /// Records the topology as the lab's state.
    pub fn record(&self) -> Result<(), Error> {
        Ok(self.state().write(&self.dirs)?)
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node, Error> {
        crate::state::find_node(&self.topology, name).ok_or_else(|| Error::NoNode {
            lab: self.topology.name.clone(),
            node: name.into(),
            known: self.topology.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The nodes of these names; all if there are none.
    pub fn nodes(&self, names: &[String]) -> Result<Vec<&Node>, Error> {
        if names.is_empty() {
            return Ok(self.topology.nodes.iter().collect());
        }
        names.iter().map(|name| self.node(name)).collect()
    }

    /// The nodes that a target means.
    pub fn targets(&self, on: &Target) -> Vec<&Node> {
        self.topology.nodes.iter().filter(|node| applies(on, node)).collect()
    }

    /// The way into a node.
    pub fn channel(&self, node: &str) -> Channel {
        Channel::new(&self.dirs, &self.topology.name, node)
    }

    /// The limit for something that takes at most `seconds` on a machine with KVM.
    pub fn limit(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds) * u64::from(self.patience))
    }

    /// The folder where the lab keeps an image that its nodes stand on: hard links, so that the image can be rebuilt or
    /// removed from the store without a change to what is below a node's disk.
    pub fn pinned(&self, folder: &str) -> PathBuf {
        self.dirs.dir.join("images").join(folder)
    }

    /// What a node's disk is made from; `None` if it has none yet.
    pub fn record_of(&self, node: &str) -> Result<Option<NodeRecord>, Error> {
        Ok(json_file::read(&self.dirs.node(node).join("node.json"))?)
    }

    /// Manifest and folder of the image that a node stands on.
    pub fn image_of(&self, node: &str) -> Result<(Manifest, PathBuf), Error> {
        let record = self.record_of(node)?.ok_or_else(|| Error::NotThere(self.topology.name.clone()))?;
        let path = self.pinned(&record.image);
        let manifest = json_file::read(&path.join("manifest.json"))?;
        manifest
            .map(|manifest| (manifest, path.clone()))
            .ok_or_else(|| Error::ImageGone { node: node.into(), path })
    }

    /// All forwards: the labfile's and the added ones.
    pub fn forwards(&self) -> Vec<Forward> {
        self.state().all_forwards()
    }

    /// Configuration of the lab's network.
    pub fn network_config(&self) -> NetworkConfig {
        let network = &self.topology.network;
        NetworkConfig {
            lab: self.topology.name.clone(),
            subnet: network.subnet,
            prefix: network.prefix,
            gateway: network.gateway,
            socket: self.dirs.net_socket(),
            control: self.dirs.net_control(),
            lock: crate::state::net_lock(&self.dirs),
            hosts: self
                .topology
                .nodes
                .iter()
                .map(|node| Host { name: node.name.clone(), mac: node.mac.clone(), ip: node.ip })
                .collect(),
            cache: Some(self.paths.home().join("cache/packages")),
            forwards: self.forwards(),
        }
    }
}

/// Whether a target means this node.
pub fn applies(on: &Target, node: &Node) -> bool {
    match on {
        Target::All => true,
        Target::Role(role) => *role == node.role,
        Target::Node(name) => *name == node.name,
    }
}

/// Path of a sibling of the running program: `lab-vmm`, `lab-net`.
pub fn sibling(name: &str) -> PathBuf {
    let here = std::env::current_exe().ok();
    here.as_deref().and_then(Path::parent).map(|dir| dir.join(name)).unwrap_or_else(|| name.into())
}
