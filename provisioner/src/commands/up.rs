//! `lab up`: brings the lab to what its labfile says.

use std::process::ExitCode;

use super::{Context, Error, status};
use crate::{actions, capacity, channel, lab::Lab, plan};

/// Brings the lab up.
pub fn run(context: &Context) -> Result<ExitCode, Error> {
    let mut lab = context.wanted()?;
    let _lock = lab.lock()?;
    finish_restoring(&mut lab)?;
    bring_up(&lab)?;
    if !context.json {
        context.progress.say("");
    }
    status::print(context, &lab)?;
    if !context.json {
        context.progress.say(&next_steps(&lab));
    }
    Ok(ExitCode::SUCCESS)
}

/// Goes on with a restoring that was interrupted; what the labfile says comes after it.
fn finish_restoring(lab: &mut Lab) -> Result<(), Error> {
    if let Some(name) = crate::snapshot::is_unfinished(lab)? {
        let wanted = lab.topology.clone();
        super::snapshot::restore(lab, &name)?;
        lab.topology = wanted;
    }
    Ok(())
}

/// Does what is missing.
pub fn bring_up(lab: &Lab) -> Result<(), Error> {
    capacity::check(lab)?;
    let plan = actions::plan(lab)?;
    lab.record()?;
    // Before the nodes start side by side, each of which is given it.
    channel::ensure_key(&lab.dirs.identity())?;
    warn_of_left_overs(lab);
    let outcome = plan.run(lab);
    report(lab, outcome)
}

/// Tells what failed; the first failure is the command's error.
pub fn report(lab: &Lab, outcome: plan::Outcome) -> Result<(), Error> {
    let mut failures = outcome.failures.into_iter();
    let Some((subject, error)) = failures.next() else {
        if outcome.changed == 0 {
            lab.progress.say(&format!("{}: everything is up already", lab.topology.name));
        }
        return Ok(());
    };
    let mut text = format!("{subject}: {error}");
    for (subject, error) in failures {
        text.push_str(&format!("\n{subject}: {error}"));
    }
    if outcome.skipped > 0 {
        text.push_str(&format!("\n{} actions that come after it were not tried", outcome.skipped));
    }
    Err(Error::Other(text))
}

fn warn_of_left_overs(lab: &Lab) {
    for name in crate::state::nodes_on_disk(&lab.dirs) {
        if lab.node(&name).is_err() {
            lab.progress
                .warn(&format!("{name} is no longer in the labfile: `lab destroy {name}` removes it"));
        }
    }
}

fn next_steps(lab: &Lab) -> String {
    let node = lab.topology.nodes.first().map(|node| node.name.as_str()).unwrap_or("NODE");
    let mut text = format!("next: `lab ssh {node}` opens a terminal");
    if !lab.topology.checks.is_empty() {
        text.push_str(", `lab check` runs the checks");
    }
    text.push_str(", `lab halt` powers off");
    text
}
