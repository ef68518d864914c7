//! A fork of a snapshot: a lab's folder that shares all files with the first one's by hard links, restored.

use super::{Error, folder, kept::link, layers, read, restore};
use crate::{fork, json_file, lab::Lab, progress::Task};

/// Makes `copy`, fork `number` of `lab`, which has nothing yet, from snapshot `name`, and lets it run.
pub fn fork(lab: &Lab, name: &str, number: u32, copy: &mut Lab, task: &Task) -> Result<(), Error> {
    let mut record = read(lab, name)?;
    let (from, to) = (&lab.dirs.dir, &copy.dirs.dir);
    task.detail("link");
    for part in ["images", "ssh"] {
        link(&from.join(part), &to.join(part))?;
    }
    for layer in layers::below(&lab.dirs, record.nodes.values().flat_map(|node| &node.layers))? {
        if let Some(from) = layer.parent()
            && let Some(id) = from.file_name()
        {
            link(from, &to.join("layers").join(id))?;
        }
    }
    let target = folder(&copy.dirs, name);
    for node in record.nodes.keys() {
        link(&folder(&lab.dirs, name).join(node), &target.join(node))?;
    }
    fork::adapt(&mut record.state.topology, number);
    record.state.forwards = Vec::new();
    record.state.fork = Some(number);
    json_file::write(&target.join("snapshot.json"), &record)?;
    restore(copy, name, task)?;
    copy.came_up = true;
    Ok(copy.record()?)
}
