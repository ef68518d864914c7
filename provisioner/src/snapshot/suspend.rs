//! `lab suspend`: the running lab is saved, and its processes end. `lab resume`, or `lab up`, restores it, once.

use super::{Error, SUSPENDED, folder, forget, save};
use crate::{lab::Lab, machine, progress::Task, state};

/// Whether the lab was suspended and has not gone on since.
pub fn is_suspended(lab: &Lab) -> bool {
    folder(&lab.dirs, SUSPENDED).join("snapshot.json").exists()
}

/// Puts the running lab away.
pub fn suspend(lab: &Lab, task: &Task) -> Result<(), Error> {
    if is_suspended(lab) && state::is_running(&lab.dirs) {
        // Of one that was interrupted before it had ended everything; what runs now is what counts.
        forget(lab, SUSPENDED)?;
    }
    save::take(lab, SUSPENDED, false, task)?;
    task.detail("end");
    for node in state::nodes_on_disk(&lab.dirs) {
        machine::power_off(lab, &node, true, task)?;
    }
    Ok(machine::stop_network(lab)?)
}
