//! `lab up`: brings the lab to what its labfile says.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{Context, Error, halt, status};
use crate::{
    actions, capacity, channel,
    lab::Lab,
    lockfile, machine, plan,
    snapshot::{
        Error as SnapshotError, FIRST_UP,
        kept::{self, Found},
    },
    stack, state,
};

/// Brings the lab up.
pub fn run(context: &Context, fresh: bool, locked: bool, offline: Option<&Path>) -> Result<ExitCode, Error> {
    let mut lab = context.wanted_for_up(locked, offline)?;
    // A fork is a copy of something, or it is none.
    if let Some(number) = lab.fork
        && !lab.dirs.state().exists()
    {
        let name = &lab.topology.name;
        return Err(Error::Other(format!(
            "there is no fork {number}, `{name}`: `lab fork SNAPSHOT` makes forks"
        )));
    }
    let _lock = lab.lock()?;
    let known = secrets(&lab)?;
    if locked {
        check_locked(&lab)?;
    }
    if !fresh {
        start_from_kept(&mut lab)?;
    }
    let up = bring_up(&mut lab).and_then(|()| keep(&mut lab));
    // What a step gave is there, whatever became of those after it.
    let new: Vec<Secret> = secrets(&lab)?.into_iter().filter(|secret| !known.contains(secret)).collect();
    if up.is_err() && !context.json {
        new.iter().for_each(|secret| context.progress.say(&secret.tell()));
    }
    up?;
    if !locked
        && lab.fork.is_none()
        && let Err(error) = lockfile::write(&lab)
    {
        lab.progress.warn(&format!("what the lab was brought up from is not recorded: {error}"));
    }
    if !context.json {
        context.progress.say("");
    }
    status::print(context, &lab)?;
    if !context.json {
        new.iter().for_each(|secret| context.progress.say(&secret.tell()));
        context.progress.say(&next_steps(&lab));
    }
    Ok(ExitCode::SUCCESS)
}

/// Something that a stack's step gave and people want to know.
#[derive(PartialEq)]
struct Secret {
    what: String,
    file: PathBuf,
    text: String,
}

impl Secret {
    /// Itself on a terminal, else where it is: what is not a terminal may be kept.
    fn tell(&self) -> String {
        let Self { what, file, text } = self;
        match std::io::stderr().is_terminal() {
            true => format!("{what}: {text} (told this once; it is kept in {})", file.display()),
            false => format!("{what} is in {}", file.display()),
        }
    }
}

/// What there is to know of the lab's stacks.
fn secrets(lab: &Lab) -> Result<Vec<Secret>, Error> {
    let mut found = Vec::new();
    for used in &lab.topology.stacks {
        for secret in stack::load(used)?.secrets {
            let file = actions::given_file(lab, &used.name, &secret.file);
            if let Ok(text) = std::fs::read_to_string(&file) {
                found.push(Secret { what: secret.description, file, text: text.trim().into() });
            }
        }
    }
    Ok(found)
}

/// Refuses a lab that is not what was recorded; images that are missing are built for that.
fn check_locked(lab: &Lab) -> Result<(), Error> {
    lockfile::check(lab)?;
    let mut names: Vec<&str> = lab.topology.nodes.iter().map(|node| node.image.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let action = Box::new(actions::Image { name: name.into() });
        plan::run_one(&plan::Planned { node: None, action, after: Vec::new() }, lab)?;
    }
    Ok(lockfile::check(lab)?)
}

/// Starts a lab that is not there yet from what its first `up` came to.
fn start_from_kept(lab: &mut Lab) -> Result<(), Error> {
    if lab.dirs.state().exists() {
        return Ok(());
    }
    // What does not fit is no fault of the snapshot's.
    capacity::check(lab)?;
    match kept::bring_back(lab)? {
        Found::Nothing => return Ok(()),
        Found::Differs(what) => {
            let name = &lab.topology.name;
            lab.progress.say(&format!("{name}: not from the snapshot of its first up, since {what}"));
            return Ok(());
        }
        Found::There => {}
    }
    let wanted = lab.topology.clone();
    // Also for who goes on with a restoring that was cut off: there is nothing to be kept again.
    lab.came_up = true;
    let restored = super::snapshot::restore(lab, FIRST_UP);
    lab.topology = wanted;
    let Err(error) = restored else { return Ok(lab.record()?) };
    lab.came_up = false;
    kept::take_back(lab)?;
    let why = match error {
        Error::Snapshot(SnapshotError::NotRestored { source, .. }) => source.to_string(),
        // A port that somebody else has: the snapshot is there for the next time.
        Error::Snapshot(SnapshotError::Action(_)) => return Err(error),
        other => other.to_string(),
    };
    // It stays until another takes its place: what is in the way may be this host's alone.
    lab.progress.warn(&format!("the snapshot of its first up is of no use here: {why}"));
    Ok(())
}

/// Keeps what the first `up` came to. That it can't is no failure of the lab.
fn keep(lab: &mut Lab) -> Result<(), Error> {
    if lab.came_up {
        return Ok(());
    }
    let task = lab.progress.begin(&lab.topology.name, "keep a snapshot for the next up");
    match kept::keep(lab, &task) {
        Ok(true) => task.done(),
        Ok(false) => lab.progress.say("there is no room to keep a snapshot for the next up"),
        Err(error) => {
            task.failed();
            lab.progress.warn(&format!("the next up will do all of this again: {error}"));
        }
    }
    lab.came_up = true;
    Ok(lab.record()?)
}

/// Does what is missing.
pub fn bring_up(lab: &mut Lab) -> Result<(), Error> {
    if machine::end_lost(lab)? {
        lab.progress.warn(
            "the folder of the lab's sockets was gone, with the session that it was brought up in: what ran was ended \
             as if its plug had been pulled, and starts again",
        );
    }
    super::snapshot::go_on(lab)?;
    let lab = &*lab;
    capacity::check(lab)?;
    let plan = actions::plan(lab)?;
    lab.record()?;
    // Before the nodes start side by side, each of which is given it.
    channel::ensure_key(&lab.dirs.identity())?;
    // While those that stay run, at once: a new node may have the address of one that goes.
    let was_running = state::net_is_running(&lab.dirs);
    if was_running {
        let_go(lab)?;
    }
    report(lab, plan.run(lab))?;
    if was_running { Ok(()) } else { let_go(lab) }
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
    let mut ways = ways_beside(lab, &error);
    for (subject, error) in failures {
        text.push_str(&format!("\n{subject}: {error}"));
        ways = ways.or_else(|| ways_beside(lab, &error));
    }
    text.push_str(&ways.unwrap_or_default());
    if outcome.skipped > 0 {
        text.push_str(&format!("\n{} actions that come after it were not tried", outcome.skipped));
    }
    Err(Error::Other(text))
}

/// What to do where the software of a stack could not be got from where it was to come from: the other sources.
fn ways_beside(lab: &Lab, error: &actions::Error) -> Option<String> {
    let actions::Error::Step { step, .. } = error else { return None };
    let (stack, step) = step.split_once('/')?;
    let used = lab.topology.stacks.iter().find(|used| used.name == stack)?;
    let definition = stack::load(used).ok()?;
    let step = definition.steps.iter().find(|known| known.name == step)?;
    // A step of one source alone gets things from there.
    (step.kind == stack::Kind::Bake && step.source.is_some()).then(|| definition.ways_beside(&used.source))
}

/// Lets the nodes go that the labfile no longer has: those that stay take leave of them, and they are powered off. Their
/// disks stay: who took them out of a file has not said that what they hold is to be lost.
fn let_go(lab: &Lab) -> Result<(), Error> {
    let mut gone = state::nodes_on_disk(&lab.dirs);
    gone.retain(|name| lab.node(name).is_err());
    if gone.is_empty() {
        return Ok(());
    }
    actions::take_leave(lab, &gone)?;
    halt::off(lab, &gone, false)?;
    for name in gone {
        lab.progress.warn(&format!(
            "{name} is no longer in the labfile, and off: `lab destroy {name}` removes it with its disks"
        ));
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{labfile, paths::Paths, progress::Progress, source};

    #[test]
    fn what_cannot_be_fetched_is_told_with_the_other_way() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lab.toml");
        let ways = |stacks: &str, step: &str| {
            std::fs::write(&file, format!("name = \"demo\"\n[node.master]\n{stacks}")).unwrap();
            let paths = Paths::at(&dir.path().join("home"), &dir.path().join("run"));
            let mut topology = labfile::load(&file).unwrap();
            source::choose(&mut topology, &paths, false, &BTreeMap::new()).unwrap();
            let lab = Lab::new(&paths, topology, Progress::new(true)).unwrap();
            let (reason, tail) = ("it ended with status 1".into(), "cannot fetch".into());
            let error =
                actions::Error::Step { step: step.into(), reason, tail, log: file.clone(), lost: false };
            ways_beside(&lab, &error)
        };
        let kubernetes = "[stack.kubernetes]\n";
        let said = ways(kubernetes, "kubernetes/packages-upstream").unwrap();
        for part in
            ["or source = \"bundle\"", "`scripts/bundle-kubernetes FOLDER`", "30 minutes", "out of support"]
        {
            assert!(said.contains(part), "{said}");
        }
        assert_eq!(ways(kubernetes, "kubernetes/images-upstream"), Some(said));
        assert_eq!(ways(kubernetes, "kubernetes/init"), None, "it gets nothing");
        assert_eq!(ways(kubernetes, "step/packages-upstream"), None);
        // Neither source of Docker's stands in for the other.
        assert_eq!(ways("[stack.docker]\n", "docker/install-debian").unwrap_or_default(), "");
    }
}
