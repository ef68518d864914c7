//! A fork of a snapshot: a lab's folder that shares all files with the first one's by hard links, restored.

use super::{Error, folder, link_whole, restore};
use crate::{fork, json_file, lab::Lab, progress::Task};

/// Makes `copy`, fork `number` of `lab`, which has nothing yet, from snapshot `name`, and lets it run.
pub fn fork(lab: &Lab, name: &str, number: u32, copy: &mut Lab, task: &Task) -> Result<(), Error> {
    task.detail("link");
    let mut record = link_whole(lab, name, &copy.dirs.dir)?;
    fork::adapt(&mut record.state.topology, number);
    record.state.forwards = Vec::new();
    record.state.fork = Some(number);
    // In the place of the second name that the lab's own record has just been given, which stays as it is.
    json_file::write(&folder(&copy.dirs, name).join("snapshot.json"), &record)?;
    restore(copy, name, task)?;
    copy.came_up = true;
    Ok(copy.record()?)
}
