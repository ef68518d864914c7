//! A node that runs commands.

use std::{fs, time::Duration};

use lab_vmm::control as vmm;

use super::{Action, Error};
use crate::{
    channel, control, json_file,
    lab::Lab,
    labfile::topology::Node,
    progress::Task,
    snapshot,
    state::{self, NodeState},
};

/// How long a node may take from power on to its first command, with KVM.
const LIMIT_S: u32 = 120;
/// Time between two tries, with KVM.
const PAUSE: Duration = Duration::from_millis(100);

/// How exact the times of files and machines are.
const GRANULARITY: Duration = Duration::from_secs(1);

/// Waits until a node runs commands.
pub struct Ready {
    /// The node.
    pub node: Node,
}

/// The file that says that a node has run commands since it was started. It lies with the sockets: no boot of the host
/// survives it.
pub fn marker(lab: &Lab, node: &str) -> std::path::PathBuf {
    lab.dirs.node_socket(node, "ready")
}

/// Whether a node has run commands since its last boot.
pub fn is_ready(lab: &Lab, node: &str) -> bool {
    control::vmm_status(&lab.dirs.node_socket(node, "ctl"))
        .is_ok_and(|status| is_ready_by(lab, node, &status))
}

/// The same, by how its machine is. A guest that reboots by itself leaves the file as it is: it is then older than the
/// boot, or the guest has said that it goes down.
pub fn is_ready_by(lab: &Lab, node: &str, status: &vmm::Status) -> bool {
    let marked = fs::metadata(marker(lab, node)).and_then(|data| data.modified());
    let up = Duration::from_millis(status.uptime_ms) + GRANULARITY;
    marked.is_ok_and(|at| at.elapsed().unwrap_or_default() <= up) && !channel::goes_down(status)
}

/// The file that says that a node stood still, or will, and has yet to be told what time it is.
pub fn behind(lab: &Lab, node: &str) -> std::path::PathBuf {
    lab.dirs.node_socket(node, "behind")
}

impl Action for Ready {
    fn describe(&self) -> String {
        "wait until it runs commands".into()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        let running = state::node_state(&lab.dirs, &self.node.name) == NodeState::Running;
        let name = &self.node.name;
        Ok(running && is_ready(lab, name) && !behind(lab, name).exists())
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        None
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        if behind(lab, &self.node.name).exists() {
            let seen = |seen: &str| task.detail(seen);
            return Ok(snapshot::catch_up(lab, &self.node.name, &seen).map_err(Box::new)?);
        }
        let (manifest, _) = lab.image_of(&self.node.name)?;
        let channel = lab.channel(&self.node.name);
        // A slow host has better things to do than to ask.
        let pause = PAUSE * lab.patience;
        let mut seen = |seen: &str| task.detail(seen);
        channel.wait_ready(manifest.ssh, self.node.ip, lab.limit(LIMIT_S), pause, &mut seen)?;
        Ok(json_file::write_bytes(&marker(lab, &self.node.name), b"")?)
    }
}
