//! `lab halt` and `lab restart`: power off, and on again.

use std::process::ExitCode;

use super::{Context, Error, up};
use crate::{lab::Lab, machine, state};

/// Powers nodes off; without names, everything.
pub fn halt(context: &Context, nodes: &[String], force: bool) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let _lock = lab.lock()?;
    off(&lab, nodes, force)?;
    Ok(ExitCode::SUCCESS)
}

/// Powers nodes off and brings the lab up.
pub fn restart(context: &Context, nodes: &[String], force: bool) -> Result<ExitCode, Error> {
    let mut lab = context.wanted()?;
    lab.nodes(nodes)?;
    let _lock = lab.lock()?;
    off(&lab, nodes, force)?;
    up::bring_up(&mut lab)?;
    Ok(ExitCode::SUCCESS)
}

/// Refuses names that are no nodes: they become paths.
pub fn check(lab: &Lab, nodes: &[String]) -> Result<(), Error> {
    let there = state::nodes_on_disk(&lab.dirs);
    nodes.iter().filter(|name| !there.contains(name)).try_for_each(|name| lab.node(name).map(drop))?;
    Ok(())
}

/// Powers nodes off, all at the same time; without names also those that the labfile no longer has, and the network.
pub fn off(lab: &Lab, nodes: &[String], force: bool) -> Result<(), Error> {
    check(lab, nodes)?;
    let names = if nodes.is_empty() { state::nodes_on_disk(&lab.dirs) } else { nodes.to_vec() };
    let results: Vec<Result<(), machine::Error>> = std::thread::scope(|scope| {
        let power_off = |name: &String| {
            if state::node_state(&lab.dirs, name) != state::NodeState::Running {
                return Ok(());
            }
            let task = lab.progress.begin(name, "power off");
            let result = machine::power_off(lab, name, force, &task);
            if result.is_ok() {
                task.done()
            } else {
                task.failed()
            }
            result
        };
        let threads: Vec<_> = names.iter().map(|name| scope.spawn(move || power_off(name))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    if nodes.is_empty() {
        machine::stop_network(lab)?;
    }
    Ok(())
}
