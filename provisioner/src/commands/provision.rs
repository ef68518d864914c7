//! `lab provision`: runs steps again.

use std::process::ExitCode;

use super::{Context, Error, ssh, up};
use crate::{actions, json_file, state::StepRecords};

/// Forgets that the steps have run on these nodes, then brings the lab up.
pub fn run(context: &Context, nodes: &[String], step: Option<&str>) -> Result<ExitCode, Error> {
    let mut lab = context.wanted()?;
    let _lock = lab.lock()?;
    let chosen = lab.nodes(nodes)?;
    let items = actions::plan(&lab)?.items;
    let of_nodes = items.iter().filter(|item| item.node.is_some());
    let known: Vec<String> = of_nodes.map(|item| item.action.describe()).collect();
    let is_step = |name: &str, wanted: &str| {
        name == wanted || name.split_once('/').is_some_and(|(_, step)| step == wanted)
    };
    if let Some(step) = step
        && !known.iter().any(|name| name.contains('/') && is_step(name, step))
    {
        let mut steps: Vec<&str> =
            known.iter().filter(|name| name.contains('/')).map(String::as_str).collect();
        steps.sort_unstable();
        steps.dedup(); // one a node
        return Err(Error::Other(format!("there is no step `{step}`: the steps are {}", steps.join(", "))));
    }
    for node in &chosen {
        ssh::reachable(&lab, &node.name)?;
    }
    for node in chosen {
        let file = lab.dirs.node(&node.name).join("steps.json");
        let mut records: StepRecords = json_file::read(&file)?.unwrap_or_default();
        records.retain(|name, _| step.is_some_and(|step| !is_step(name, step)));
        json_file::write(&file, &records)?;
    }
    up::bring_up(&mut lab)?;
    Ok(ExitCode::SUCCESS)
}
