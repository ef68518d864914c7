//! Layers that are made without a node, on the image's files, where nodes are slow. Each of them stands on the image alone:
//! it has the steps before it in itself.

use std::{fs::File, path::PathBuf, time::Duration};

use lab_images::manifest::Manifest;
use lab_vmm::qcow2;

use super::{
    Action, Error, Image, Layer, Script, disk_file, hand_over, image,
    layer::{NODE, build_lab, build_node, clear, keys, smallest},
    steps, users,
};
use crate::{
    bake, lab,
    lab::Lab,
    labfile::topology::Node,
    layer::{Layer as Record, Store},
    paths,
    progress::Task,
};

/// How many times longer than with KVM a step may take here: it has this machine's processors.
const PATIENCE: u32 = 2;

/// Makes the layers that the lab lacks and that need no node. What can't be made like this is told, and left to the plan.
///
/// # Errors
/// A lab's folder or the store can't be worked on.
pub fn bake(lab: &Lab) -> Result<(), Error> {
    if lab.offline {
        return Ok(());
    }
    let mut chains: Vec<Chain> = Vec::new();
    for node in &lab.topology.nodes {
        let layers: Vec<Script> =
            steps::baked(lab, node)?.into_iter().take_while(|step| step.chroot).collect();
        let digests: Vec<String> = layers.iter().map(Script::digest).collect();
        let known =
            chains.iter().any(|chain| chain.image == node.image && chain.digests.starts_with(&digests));
        if !layers.is_empty() && !known && lab.record_of(&node.name)?.is_none() {
            chains.push(Chain { image: node.image.clone(), steps: layers, digests });
        }
    }
    // The longest first: it has the layers of those that are its beginning.
    chains.sort_by_key(|chain| std::cmp::Reverse(chain.steps.len()));
    for chain in chains {
        chain.make(lab)?;
    }
    Ok(())
}

/// Steps one upon the other, from an image on.
struct Chain {
    image: String,
    steps: Vec<Script>,
    digests: Vec<String>,
}

/// A layer that is missing.
struct Missing {
    /// How many steps it has in it.
    count: usize,
    key: String,
    node: Node,
    /// The disk as the bake leaves it.
    disk: PathBuf,
}

impl Chain {
    fn make(&self, lab: &Lab) -> Result<(), Error> {
        let found = lab.store.get(&self.image)?;
        let Some(archive) = found.files() else { return Ok(()) };
        let store = Store::new(lab.paths.home());
        let (manifest, keys) = keys(lab, &self.image, &self.steps)?;
        let Some(last) = keys.last() else { return Ok(()) };
        if self.missing(lab, &store, &manifest, &keys)?.is_empty() {
            return Ok(());
        }
        let limit = self.steps.iter().map(|step| u64::from(step.limit_s * PATIENCE)).sum();
        let limit = Duration::from_secs(limit);
        let _lock = store.lock(last, limit, &mut || ())?;
        let missing = self.missing(lab, &store, &manifest, &keys)?; // less, where somebody else had the lock
        let Some(top) = missing.last() else { return Ok(()) };
        let build = build_lab(lab, &top.node, last)?;
        let mut task = lab.progress.begin(&lab.topology.name, &self.name(0));
        let baked = clear(&build, &task).map_err(Failed::from).and_then(|()| {
            build.dirs.create().map_err(lab::Error::from).map_err(Error::from)?;
            Image { name: self.image.clone() }.run(&build, &task)?;
            self.bake(lab, &build, &archive, missing, &manifest, limit, &mut task)
        });
        clear(&build, &task)?;
        match baked {
            Ok(()) => task.done(),
            Err(Failed::Bake(error)) => {
                task.failed();
                let name = &lab.topology.name;
                lab.progress.say(&format!("{name}: baked in a node, since without one {error}"));
            }
            Err(Failed::Other(error)) => {
                task.failed();
                return Err(*error);
            }
        }
        Ok(())
    }

    fn name(&self, index: usize) -> String {
        self.steps.get(index).map(|step| format!("layer {}", step.name)).unwrap_or_default()
    }

    /// The layers that are not there, in their order.
    fn missing(
        &self,
        lab: &Lab,
        store: &Store,
        manifest: &Manifest,
        keys: &[String],
    ) -> Result<Vec<Missing>, Error> {
        let mut missing = Vec::new();
        let mut prefix = vec![self.image.clone()];
        for (index, (digest, key)) in self.digests.iter().zip(keys).enumerate() {
            prefix.push(digest.clone());
            let steps = self.steps.iter().take(index + 1).cloned().collect();
            let layer = Layer { steps, nodes: users(lab, &prefix)? };
            let nodes = layer.users(lab)?;
            let Some(first) = nodes.first() else { continue };
            let below = keys.get(..=index).unwrap_or_default();
            if store.present(below, smallest(&nodes, manifest))? <= index {
                let node = build_node(first, &nodes, manifest);
                let disk = lab.paths.home().join("layers").join(format!(".{key}.raw"));
                missing.push(Missing { count: index + 1, key: key.clone(), node, disk });
            }
        }
        Ok(missing)
    }

    #[allow(clippy::too_many_arguments, reason = "one use")]
    fn bake(
        &self,
        lab: &Lab,
        build: &Lab,
        archive: &std::path::Path,
        missing: Vec<Missing>,
        manifest: &Manifest,
        limit: Duration,
        task: &mut Task,
    ) -> Result<(), Failed> {
        let mut todo = Vec::new();
        for (index, step) in self.steps.iter().enumerate() {
            let disk = missing.iter().find(|layer| layer.count == index + 1).map(|layer| {
                let file = File::create(&layer.disk).map_err(|source| Error::Io {
                    action: "make",
                    path: layer.disk.clone(),
                    source,
                })?;
                Ok::<_, Error>(bake::Disk { file, bytes: layer.node.disk_bytes })
            });
            todo.push(bake::Step {
                name: step.name.clone(),
                script: step.text.clone(),
                environment: step.environment.clone(),
                files: hand_over::archive(step)?,
                disk: disk.transpose()?,
            });
        }
        let packages = lab.paths.home().join("cache/packages");
        let log = lab.paths.home().join("bake.log");
        let mut at = 0;
        let mut made = Vec::new();
        let program = std::env::current_exe().map_err(|source| Error::Io {
            action: "find",
            path: "this program".into(),
            source,
        })?;
        let ran = bake::run(&program, archive, &todo, &packages, &log, limit, &mut |event| match event {
            bake::Event::Begins(number) if number > at => {
                at = number;
                let next = lab.progress.begin(&lab.topology.name, &self.name(number));
                std::mem::replace(task, next).done();
            }
            bake::Event::Begins(_) => {}
            bake::Event::Made(number) => made.push(number + 1),
            bake::Event::Line(line) => task.detail(line),
        });
        let taken = missing.iter().try_for_each(|layer| {
            if made.contains(&layer.count) { self.take(lab, build, layer, manifest) } else { Ok(()) }
        });
        for layer in &missing {
            drop(std::fs::remove_file(&layer.disk));
        }
        taken?;
        ran.map_err(Failed::Bake)
    }

    /// Makes a layer of a disk.
    fn take(&self, lab: &Lab, build: &Lab, layer: &Missing, manifest: &Manifest) -> Result<(), Error> {
        let folder = image::folder(manifest);
        let dir = build.dirs.node(NODE);
        paths::private_dir(&dir).map_err(lab::Error::from)?;
        let disk = dir.join(disk_file(0));
        let root = build.pinned(&folder).join(&manifest.root_file);
        qcow2::difference(&layer.disk, &root, &disk)?;
        let step = self.steps.get(layer.count - 1).map(|step| step.name.as_str()).unwrap_or_default();
        let record = Record::new(step, &folder, None, layer.node.disk_bytes);
        Ok(Store::new(lab.paths.home()).add(&layer.key, &record, &disk)?)
    }
}

/// Why a bake did not come to its end.
enum Failed {
    /// It is left to a node.
    Bake(bake::Error),
    /// Nothing can be done.
    Other(Box<Error>),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Other(Box::new(error))
    }
}
