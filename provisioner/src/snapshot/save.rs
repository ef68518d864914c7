//! `lab snapshot save`: all nodes stand still at one instant, their machines are written, their disks frozen, and they go
//! on, or not, if the lab is to be suspended. The snapshot has its name when all of it is on the disk.

use std::{fs, path::Path};

use lab_vmm::control as vmm;

use super::{
    Error, FIRST_UP, FORMAT, KEYS, Record, SUSPENDED, SavedNode, check_name, clear, clock, each, folder, io,
    layers,
};
use crate::{
    actions, control, json_file,
    lab::Lab,
    progress::Task,
    state::{self, NodeState},
};

/// Saves the lab as snapshot `name`, and lets it go on.
pub fn save(lab: &Lab, name: &str, task: &Task) -> Result<(), Error> {
    if [SUSPENDED, FIRST_UP].contains(&name) {
        return Err(Error::Reserved(name.into()));
    }
    take(lab, name, true, task)
}

/// Saves the lab as snapshot `name`. If it is not to go on, it stands still afterwards, unless something failed.
pub(super) fn take(lab: &Lab, name: &str, go_on: bool, task: &Task) -> Result<(), Error> {
    check_name(name)?;
    let target = folder(&lab.dirs, name);
    if target.join("snapshot.json").exists() {
        return Err(Error::Exists { lab: lab.topology.name.clone(), name: name.into() });
    }
    let nodes: Vec<_> = state::nodes_on_disk(&lab.dirs)
        .into_iter()
        .filter(|node| state::node_state(&lab.dirs, node) != NodeState::Absent)
        .collect();
    let runs = |node: &String| state::node_state(&lab.dirs, node) == NodeState::Running;
    let running: Vec<_> = nodes.iter().filter(|node| runs(node)).cloned().collect();
    if running.is_empty() {
        return Err(Error::NothingRuns(lab.topology.name.clone()));
    }
    // Left by one that was interrupted.
    let partial = folder(&lab.dirs, &format!(".{name}.part"));
    for left in [&partial, &target] {
        clear(left)?;
    }
    let ask = |node: &str, action| {
        control::ask_vmm(&lab.dirs.node_socket(node, "ctl"), action).map_err(Error::from)
    };
    task.detail("pause");
    each(&running, |node| clock::will_miss(lab, node))?;
    let written = each(&running, |node| ask(node, vmm::Action::Pause))
        .and_then(|_| write(lab, &nodes, &running, &partial, task));
    // If it failed, nobody is left standing.
    let resumed = if go_on || written.is_err() {
        task.detail("resume");
        each(&running, |node| ask(node, vmm::Action::Resume)).map(drop)
    } else {
        Ok(())
    };
    let record = match written {
        Ok(record) => record,
        Err(error) => {
            // Room for what has to go on. What can't be removed goes with the next try.
            drop(clear(&partial));
            drop(layers::prune(lab));
            drop(each(&running, |node| clock::catch_up(lab, node, &|seen| task.detail(seen))));
            return Err(error);
        }
    };
    resumed?;
    if go_on {
        each(&running, |node| clock::catch_up(lab, node, &|seen| task.detail(seen)))?;
    }
    task.detail("sync");
    each(&running, |node| sync(&partial.join(node)))?;
    for id in record.nodes.values().flat_map(|node| &node.layers) {
        layers::sync(&lab.dirs, id)?;
    }
    json_file::write(&partial.join("snapshot.json"), &record)?;
    fs::rename(&partial, &target).map_err(io("make", &target))?;
    layers::prune(lab)
}

/// Writes what a snapshot holds into `folder`, while the running nodes stand still.
fn write(
    lab: &Lab,
    nodes: &[String],
    running: &[String],
    folder: &Path,
    task: &Task,
) -> Result<Record, Error> {
    task.detail("save");
    each(nodes, |node| {
        let target = folder.join(node);
        crate::paths::private_dir(&target)?;
        for key in KEYS {
            let from = lab.dirs.node(node).join(key);
            fs::copy(&from, target.join(key)).map_err(io("copy", &from))?;
        }
        if running.iter().any(|other| other == node) {
            let save = vmm::Action::Save { folder: target };
            control::ask_vmm_slow(&lab.dirs.node_socket(node, "ctl"), save, lab.limit(clock::SAVE_LIMIT_S))?;
        }
        Ok(())
    })?;
    task.detail("freeze the disks");
    let mut record = Record {
        format: FORMAT,
        lab_version: env!("CARGO_PKG_VERSION").into(),
        created_s: super::now_s(),
        state: lab.state(),
        nodes: Default::default(),
    };
    for node in nodes {
        let dir = lab.dirs.node(node);
        let Some(made_from) = lab.record_of(node)? else { continue };
        let disks = (0..).map(|index| dir.join(actions::disk_file(index))).take_while(|disk| disk.exists());
        let layers = disks.map(|disk| layers::freeze(&lab.dirs, &disk)).collect::<Result<_, _>>()?;
        let saved = SavedNode {
            running: running.contains(node),
            record: made_from,
            steps: layers::steps(&lab.dirs, node)?,
            layers,
        };
        record.nodes.insert(node.clone(), saved);
    }
    Ok(record)
}

/// Puts all files of a folder on the disk.
fn sync(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(io("read", folder))? {
        let path = entry.map_err(io("read", folder))?.path();
        fs::File::open(&path).and_then(|file| file.sync_all()).map_err(io("sync", &path))?;
    }
    Ok(())
}
