//! `lab snapshot restore`: the lab becomes what it was, all nodes at the same instant. What it is now is lost.
//!
//! A file says from the beginning to the end that this is under way: what interrupts it is made good by the next `up`,
//! which does it all again.

use std::{fs, path::PathBuf};

use lab_vmm::control as vmm;

use super::{Error, KEYS, NOT_RESUMED, Record, SUSPENDED, clock, each, folder, io, layers, read};
use crate::{
    actions::{self, Action},
    control, json_file,
    lab::Lab,
    machine,
    paths::LabPaths,
    progress::Task,
    state,
};

/// The file that names the snapshot that is being restored.
pub(super) fn under_way(dirs: &LabPaths) -> PathBuf {
    dirs.dir.join("restoring.json")
}

/// The snapshot whose restoring was interrupted.
pub fn is_unfinished(dirs: &LabPaths) -> Result<Option<String>, Error> {
    Ok(json_file::read(&under_way(dirs))?)
}

/// Restores snapshot `name`. The lab's topology becomes that of the snapshot.
pub fn restore(lab: &mut Lab, name: &str, task: &Task) -> Result<(), Error> {
    let record = read(lab, name)?;
    json_file::write(&under_way(&lab.dirs), &name)?;
    let loaded = load(lab, name, &record, task);
    // Of the network that is not so: a port of this machine may be free the next time.
    if let Err(error @ Error::Node { .. }) = loaded {
        // It won't do better the next time: `up` boots the nodes from their disks, which are those of the snapshot.
        for node in record.nodes.keys() {
            drop(machine::power_off(lab, node, true, task));
        }
        finish(lab)?;
        if name == SUSPENDED {
            super::rename(lab, SUSPENDED, NOT_RESUMED)?;
        }
        return Err(Error::NotRestored {
            name: if name == SUSPENDED { NOT_RESUMED } else { name }.into(),
            source: Box::new(error),
        });
    }
    let running = loaded?;
    each(&running, |node| clock::will_miss(lab, node))?;
    finish(lab)?;
    if super::is_suspended(lab) {
        // It has gone on, or was given up. Not before the end of what may have to be done again from it.
        super::forget(lab, SUSPENDED)?;
    }
    task.detail("resume");
    each(&running, |node| Ok(control::ask_vmm(&lab.dirs.node_socket(node, "ctl"), vmm::Action::Resume)?))?;
    each(&running, |node| clock::catch_up(lab, node, &|seen| task.detail(seen)))?;
    Ok(())
}

/// The disks are what the snapshot says, and no guest has gone on yet: from here on `up` lets those go on that stand still,
/// and boots those that don't run.
fn finish(lab: &Lab) -> Result<(), Error> {
    let file = under_way(&lab.dirs);
    fs::remove_file(&file).map_err(io("remove", &file))?;
    layers::prune(lab)
}

/// Makes everything as it was in the snapshot, its machines standing still; gives their names.
fn load(lab: &mut Lab, name: &str, record: &Record, task: &Task) -> Result<Vec<String>, Error> {
    task.detail("pull the plugs");
    // With the network, so that no frame of what is given up reaches a restored node.
    for node in state::nodes_on_disk(&lab.dirs) {
        machine::power_off(lab, &node, true, task)?;
    }
    machine::stop_network(lab)?;
    lab.topology = record.state.topology.clone();
    lab.added_forwards = record.state.forwards.clone();
    lab.record()?;
    task.detail("lay the disks");
    for (node, saved) in &record.nodes {
        let dir = lab.dirs.node(node);
        crate::paths::private_dir(&dir)?;
        for key in KEYS {
            let from = folder(&lab.dirs, name).join(node).join(key);
            fs::copy(&from, dir.join(key)).map_err(io("copy", &from))?;
        }
        for (index, id) in saved.layers.iter().enumerate() {
            layers::lay(&lab.dirs, id, &dir.join(actions::disk_file(index)))?;
        }
        json_file::write(&dir.join("steps.json"), &saved.steps)?;
        json_file::write(&dir.join("node.json"), &saved.record)?;
    }
    let action =
        |action: &dyn Action, lab: &Lab| action.run(lab, task).map_err(|error| Error::from(Box::new(error)));
    action(&actions::Network, lab)?;
    let lab = &*lab;
    let running: Vec<_> =
        record.nodes.iter().filter(|(_, node)| node.running).map(|(name, _)| name.clone()).collect();
    task.detail("load the machines");
    each(&running, |node| {
        let snapshot = Some(folder(&lab.dirs, name).join(node));
        action(&actions::Boot { node: lab.node(node)?.clone(), snapshot }, lab)
    })?;
    Ok(running)
}
