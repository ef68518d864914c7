//! A layer: a baked step, run once in a node of its own, for all nodes that have the same image and the same baked steps
//! before it.

use lab_images::manifest::Manifest;

use super::{Action, Boot, Disk, Error, Image, Network, Ready, Script, disk_file, image, steps};
use crate::{
    files, lab,
    lab::Lab,
    labfile::topology::{Node, Topology},
    layer::{self, Store},
    machine,
    progress::Task,
};

/// Name of the node that a layer is made in.
pub(super) const NODE: &str = "build";
/// How much longer than its step a layer may take, in seconds, with KVM: for boot and power off.
const BESIDE_S: u32 = 300;

/// Makes the layer of the last of these steps.
pub struct Layer {
    /// The baked steps from the image on.
    pub steps: Vec<Script>,
    /// The nodes that are to stand on it.
    pub nodes: Vec<Node>,
}

/// Keys of the layers that these steps make of the store's present image of this name, and its manifest.
pub fn keys(lab: &Lab, name: &str, steps: &[Script]) -> Result<(Manifest, Vec<String>), Error> {
    let manifest = lab.store.get(name)?.manifest;
    let keys = layer::keys(&manifest.digest(), steps.iter().map(Script::digest));
    Ok((manifest, keys))
}

/// Keys of the layers that a node stands on, or would if it were made now, each with its step, from the image on.
pub fn of_node(lab: &Lab, node: &Node) -> Result<Vec<(String, String)>, Error> {
    let steps = steps::baked(lab, node)?;
    let (_, keys) = keys(lab, &node.image, &steps)?;
    Ok(keys.into_iter().zip(steps.into_iter().map(|step| step.name)).collect())
}

impl Layer {
    /// The nodes that need it: they have no disk yet.
    pub(super) fn users(&self, lab: &Lab) -> Result<Vec<&Node>, Error> {
        let mut users = Vec::new();
        for node in &self.nodes {
            if lab.record_of(&node.name)?.is_none() {
                users.push(node);
            }
        }
        Ok(users)
    }

    /// Makes it in a lab of its own, whose folder goes afterwards.
    fn make(&self, lab: &Lab, node: &Node, keys: &[String], image: &str, task: &Task) -> Result<(), Error> {
        let (Some(key), Some(step)) = (keys.last(), self.steps.last()) else { return Ok(()) };
        let store = Store::new(lab.paths.home());
        let build = build_lab(lab, node, key)?;
        let limit = lab.limit(step.limit_s + BESIDE_S);
        let _lock = store.lock(key, limit, &mut || task.detail("another lab makes it"))?;
        if store.present(keys, node.disk_bytes)? == keys.len() {
            return Ok(()); // by whoever had the lock
        }
        clear(&build, task)?;
        build.dirs.create().map_err(lab::Error::from)?;
        build.record()?;
        crate::channel::ensure_key(&build.dirs.identity())?;
        let (baked, last) = (self.steps.clone(), Script { node: node.clone(), ..step.clone() });
        let below = baked.get(..baked.len() - 1).unwrap_or_default().to_vec();
        let actions: [&dyn Action; 5] = [
            &Image { name: node.image.clone() },
            &Network,
            &Disk { node: node.clone(), baked: below },
            &Boot { node: node.clone(), snapshot: None },
            &Ready { node: node.clone() },
        ];
        for action in actions {
            task.detail(&action.describe());
            action.run(&build, task)?;
        }
        if build.record_of(NODE)?.is_none_or(|record| record.image != image) {
            return Err(layer::Error::ImageChanged(node.image.clone()).into());
        }
        // Those before it are in the layers below, unless somebody has just removed one.
        let mut parent = None;
        for (step, key) in baked.into_iter().zip(keys) {
            let step = Script { node: node.clone(), ..step };
            if step.name != last.name && step.is_done(&build)? {
                parent = Some(key.clone());
            } else {
                step.run(&build, task)?;
            }
        }
        task.detail("power off");
        machine::power_off(&build, NODE, false, task)?;
        let parent = match parent {
            Some(key) => {
                // Still the one that the build stands on.
                store.link(&key, &build.dirs.dir.join("layers"))?;
                let below = store.get(&key)?.ok_or_else(|| layer::Error::NotThere(key.clone()))?;
                Some((key, below.created_s))
            }
            None => None,
        };
        let layer = layer::Layer::new(&last.name, image, parent, node.disk_bytes);
        store.add(key, &layer, &build.dirs.node(NODE).join(disk_file(0)))?;
        clear(&build, task)
    }
}

impl Action for Layer {
    fn describe(&self) -> String {
        format!("layer {}", self.steps.last().map_or("", |step| step.name.as_str()))
    }

    fn stack(&self) -> Option<&str> {
        self.steps.last().and_then(Action::stack)
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        let users = self.users(lab)?;
        let Some(node) = users.first() else { return Ok(true) };
        let Ok((manifest, keys)) = keys(lab, &node.image, &self.steps) else { return Ok(false) };
        Ok(Store::new(lab.paths.home()).present(&keys, smallest(&users, &manifest))? == keys.len())
    }

    fn state(&self, lab: &Lab) -> Result<&'static str, Error> {
        Ok(match (self.users(lab)?.is_empty(), self.is_done(lab)?) {
            (true, _) => "not needed",
            (false, true) => "cached",
            (false, false) => "to do",
        })
    }

    fn outlives_lab(&self) -> bool {
        true
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        None // those of its step, which each node has in its plan
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let users = self.users(lab)?;
        let Some(first) = users.first() else { return Ok(()) };
        let (manifest, keys) = keys(lab, &first.image, &self.steps)?;
        if lab.offline {
            return Err(Error::Offline(format!("what `{}` has made of {}", self.describe(), first.image)));
        }
        self.make(lab, &build_node(first, &users, &manifest), &keys, &image::folder(&manifest), task)
    }
}

/// The node that a layer is made in, for nodes of which this is one.
pub(super) fn build_node(first: &Node, users: &[&Node], manifest: &Manifest) -> Node {
    Node {
        name: NODE.into(),
        role: NODE.into(),
        cpus: users.iter().map(|node| node.cpus).max().unwrap_or(1),
        memory_mib: users.iter().map(|node| node.memory_mib).max().unwrap_or(0),
        // All of them can stand on it.
        disk_bytes: smallest(users, manifest),
        extra_disks_bytes: Vec::new(),
        forwards: Vec::new(),
        ..first.clone()
    }
}

/// Size in bytes of the smallest disk that one of these nodes has: as large as what the image has in it, at least.
pub(super) fn smallest(users: &[&Node], manifest: &Manifest) -> u64 {
    users.iter().map(|node| node.disk_bytes).min().unwrap_or(0).max(manifest.root_bytes)
}

/// The lab that a layer is made in: its processes end with this command, whatever ends that.
pub(super) fn build_lab(lab: &Lab, node: &Node, key: &str) -> Result<Lab, Error> {
    let topology = Topology {
        // No lab has such a name, and none is listed under it.
        name: format!(".build-{}", key.get(..12).unwrap_or(key)),
        // Whichever lab makes it.
        labfile: lab.paths.home().join("layers"),
        network: lab.topology.network.clone(),
        nodes: vec![node.clone()],
        stacks: Vec::new(),
        steps: Vec::new(),
        checks: Vec::new(),
    };
    let mut build = Lab::new(&lab.paths, topology, lab.progress.clone())?;
    build.bound = true;
    Ok(build)
}

/// Removes the lab that a layer was made in, or what is left of one.
pub(super) fn clear(build: &Lab, task: &Task) -> Result<(), Error> {
    machine::power_off(build, NODE, true, task)?;
    machine::stop_network(build)?;
    for dir in [&build.dirs.sockets, &build.dirs.dir] {
        let io = |source| Error::Io { action: "remove", path: dir.clone(), source };
        files::remove(dir).map_err(io)?;
    }
    Ok(())
}
