//! A fork of a snapshot: a lab's folder that shares all files with the first one's by hard links, restored.

use super::{Error, folder, is_unfinished, link_whole, restore};
use crate::{
    actions::{self, Action},
    fork, json_file,
    lab::Lab,
    labfile::topology::Node,
    progress::Task,
    state::{self, NodeState},
};

/// Makes `copy`, fork `number` of `lab`, from snapshot `name`, and lets it run, or does what is missing of that.
pub fn fork(lab: &Lab, name: &str, number: u32, copy: &mut Lab, task: &Task) -> Result<(), Error> {
    copy.came_up = true;
    if is_laid_out(copy)? {
        return go_on(copy, task);
    }
    task.detail("link");
    let mut record = link_whole(lab, name, &copy.dirs.dir)?;
    fork::adapt(&mut record.state.topology, number);
    record.state.forwards = Vec::new();
    record.state.fork = Some(number);
    // In the place of the second name that the lab's own record has just been given, which stays as it is.
    json_file::write(&folder(&copy.dirs, name).join("snapshot.json"), &record)?;
    restore(copy, name, task)
}

/// Whether there is something to do for [`fork`]: it was never made, or what made it was interrupted.
pub fn is_missing(copy: &Lab) -> Result<bool, Error> {
    Ok(!is_laid_out(copy)? || behind(copy).next().is_some())
}

/// Whether its disks are there, and its machines were loaded.
fn is_laid_out(copy: &Lab) -> Result<bool, Error> {
    Ok(copy.dirs.state().exists() && is_unfinished(&copy.dirs)?.is_none())
}

/// Machines that run, or stand still, without having been told what time it is.
fn behind(copy: &Lab) -> impl Iterator<Item = &Node> {
    copy.topology.nodes.iter().filter(|node| {
        actions::behind_marker(copy, &node.name).exists()
            && state::node_state(&copy.dirs, &node.name) == NodeState::Running
    })
}

/// What was left to do when all was laid out and loaded: as `up` does it, but those that are off stay off.
fn go_on(copy: &Lab, task: &Task) -> Result<(), Error> {
    for node in behind(copy) {
        let boot = actions::Boot { node: node.clone(), snapshot: None };
        let ready = actions::Ready { node: node.clone() };
        for action in [&boot as &dyn Action, &ready] {
            if !action.is_done(copy).map_err(Box::new)? {
                action.run(copy, task).map_err(Box::new)?;
            }
        }
    }
    Ok(copy.record()?)
}
