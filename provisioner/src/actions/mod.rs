//! Actions: what a plan is made of. Each does one thing, and nothing where that thing is so already.

mod boot;
mod chroot;
mod cloud_init;
mod disk;
mod hand_over;
mod image;
mod layer;
mod network;
mod ready;
mod script;
mod steps;

use std::path::PathBuf;

pub use boot::Boot;
pub use chroot::bake as bake_without_nodes;
pub use disk::{Disk, file_name as disk_file, fresh as fresh_disk, random_id};
pub use hand_over::kept as given_file;
pub use image::{Image, folder as image_folder};
pub use layer::{Layer, of_node as layer_keys};
pub use network::Network;
pub use ready::{Ready, is_ready, is_ready_by};
pub use script::Script;
pub use steps::{VERSION_OPTION, bundle_files, environment, find_bundle, take_leave};

use crate::{channel, control, json_file, lab::Lab, labfile::topology::Node, plan::Plan, progress::Task};

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image can't be had.
    #[error(transparent)]
    Image(#[from] lab_images::store::Error),
    /// The files for a node's `/run` can't be packed.
    #[error(transparent)]
    Seed(#[from] lab_images::initramfs::Error),
    /// A disk can't be made.
    #[error(transparent)]
    Disk(#[from] lab_vmm::qcow2::Error),
    /// A node can't be entered.
    #[error(transparent)]
    Channel(#[from] channel::Error),
    /// A process of lab's did not answer.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// The lab's folders.
    #[error(transparent)]
    Lab(#[from] crate::lab::Error),
    /// A stack's definition.
    #[error(transparent)]
    Stack(#[from] crate::stack::Error),
    /// Layers.
    #[error(transparent)]
    Layer(#[from] crate::layer::Error),
    /// A process did not end.
    #[error(transparent)]
    Machine(#[from] crate::machine::Error),
    /// A node that stood still.
    #[error(transparent)]
    Snapshot(#[from] Box<crate::snapshot::Error>),
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
    /// A process of lab's ended at once.
    #[error("{program} did not start: {reason}")]
    NotStarted {
        /// `lab-vmm` or `lab-net`.
        program: &'static str,
        /// Its last words.
        reason: String,
    },
    /// The running network can't become what the labfile says.
    #[error("{0}: `lab halt`, then `lab up` applies it")]
    NeedsHalt(String),
    /// A bundle.
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
    /// What a step wants is in no bundle.
    #[error("{missing}{ways}")]
    NoBundle {
        /// What is missing.
        missing: crate::bundle::Error,
        /// What to do about it, on further lines.
        ways: String,
    },
    /// Files beside the labfile can't be taken along.
    #[error(transparent)]
    Enclosed(#[from] crate::enclosed::Error),
    /// A file did not get into or out of a node.
    #[error("step `{step}`: its file {what} did not pass between this machine and the node: {reason}")]
    HandOver {
        /// The step.
        step: String,
        /// The file.
        what: String,
        /// Why.
        reason: String,
        /// Whether its node may have gone down meanwhile.
        lost: bool,
    },
    /// Something is not there, and is not to be made.
    #[error(
        "{0} is not in the bundle, and nothing is built or fetched with --offline: make the bundle again with `lab bundle build` for this labfile as it is, or leave --offline out"
    )]
    Offline(String),
    /// A script failed in a node.
    #[error(
        "step `{step}` failed: {reason}\n{tail}\n  its output is in {log}; after a change, `lab up` goes on from this step"
    )]
    Step {
        /// The step.
        step: String,
        /// How it ended.
        reason: String,
        /// Its last lines.
        tail: String,
        /// All of its output.
        log: PathBuf,
        /// Whether its node may have gone down under it: the connection to it was lost.
        lost: bool,
    },
}

/// One thing that a lab needs.
pub trait Action: Send + Sync {
    /// What it does, in a few words: "boot", "step docker: install".
    fn describe(&self) -> String;
    /// Whether nothing is left to do. Cheap, and without effect.
    fn is_done(&self, lab: &Lab) -> Result<bool, Error>;
    /// How it is, in a word or two, for `lab plan`.
    fn state(&self, lab: &Lab) -> Result<&'static str, Error> {
        Ok(if self.is_done(lab)? { "done" } else { "to do" })
    }
    /// Whether its result is there for other labs, too: an image, a layer.
    fn outlives_lab(&self) -> bool {
        false
    }
    /// The stack that it is a step of.
    fn stack(&self) -> Option<&str> {
        None
    }
    /// All that its result depends on, beside what comes before it; `None` if nothing of it lasts.
    fn inputs(&self, lab: &Lab) -> Option<String>;
    /// Does it. Interrupted at any point, it can be run again.
    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error>;
}

/// Everything that a lab needs to be up.
pub fn plan(lab: &Lab) -> Result<Plan, Error> {
    let mut plan = Plan::default();
    let network = plan.add(None, Box::new(Network), vec![]);
    let mut images: Vec<(&str, usize)> = Vec::new();
    let mut ready = Vec::new();
    // By image and steps: those who have the same stand on the same layer.
    let mut layers: Vec<(Vec<String>, usize)> = Vec::new();
    for node in &lab.topology.nodes {
        let image = match images.iter().find(|(name, _)| *name == node.image) {
            Some(&(_, index)) => index,
            None => {
                let index = plan.add(None, Box::new(Image { name: node.image.clone() }), vec![]);
                images.push((&node.image, index));
                index
            }
        };
        let baked = steps::baked(lab, node)?;
        let (mut below, mut prefix) = (image, vec![node.image.clone()]);
        for (index, step) in baked.iter().enumerate() {
            prefix.push(step.digest());
            below = match layers.iter().find(|(known, _)| *known == prefix) {
                Some(&(_, layer)) => layer,
                None => {
                    let steps = baked.iter().take(index + 1).cloned().collect();
                    let layer =
                        plan.add(None, Box::new(Layer { steps, nodes: users(lab, &prefix)? }), vec![below]);
                    layers.push((prefix.clone(), layer));
                    layer
                }
            };
        }
        let name = Some(node.name.as_str());
        let disk = plan.add(name, Box::new(Disk { node: node.clone(), baked }), vec![below]);
        let boot = plan.add(name, Box::new(Boot { node: node.clone(), snapshot: None }), vec![network, disk]);
        ready.push(plan.add(name, Box::new(Ready { node: node.clone() }), vec![boot]));
    }
    steps::plan_scripts(lab, &mut plan, &ready)?;
    Ok(plan)
}

/// The nodes that stand on the layer of this image and these steps.
fn users(lab: &Lab, prefix: &[String]) -> Result<Vec<Node>, Error> {
    let mut users = Vec::new();
    for node in &lab.topology.nodes {
        let steps = steps::baked(lab, node)?;
        let mut own = vec![node.image.clone()];
        own.extend(steps.iter().map(Script::digest));
        if own.starts_with(prefix) {
            users.push(node.clone());
        }
    }
    Ok(users)
}

/// The file that says that a node has yet to be told what time it is.
pub fn behind_marker(lab: &Lab, node: &str) -> PathBuf {
    ready::behind(lab, node)
}

/// The file that says that a node has run commands since it was started.
pub fn ready_marker(lab: &Lab, node: &str) -> PathBuf {
    ready::marker(lab, node)
}
