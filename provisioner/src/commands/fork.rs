//! `lab fork`, and what is done with all forks at once.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{Context, Error, exit, ssh};
use crate::{
    capacity, child, fork,
    lab::Lab,
    labfile::topology::Topology,
    progress::Progress,
    snapshot,
    state::{self, LabState},
};

/// How long a command may take in each fork, with KVM.
const EXEC_LIMIT_S: u32 = 3600;

/// Makes forks 1 to `count` of a snapshot, except those that are there.
pub fn run(context: &Context, name: &str, count: u32) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let topology = snapshot::state(&lab, name)?.topology;
    let mut missing = Vec::new();
    for number in 1..=count {
        if snapshot::is_missing(&copy_of(context, &topology, number)?)? {
            missing.push(number);
        }
    }
    if missing.is_empty() {
        context.progress.say(&format!("{}: all {count} forks are there already", topology.name));
    }
    // As many at once as there are processors: each is a few seconds of work.
    let next = AtomicU32::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(missing.len());
    let work = || {
        while let Some(number) = missing.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            make(context, &lab, name, *number)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect::<Result<(), Error>>()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The fork of this number, as far as it is there.
fn copy_of(context: &Context, topology: &Topology, number: u32) -> Result<Lab, Error> {
    let mut topology = topology.clone();
    fork::adapt(&mut topology, number);
    let mut copy = Lab::new(&context.paths, topology, context.progress.clone())?;
    copy.fork = Some(number);
    Ok(copy)
}

fn make(context: &Context, lab: &Lab, name: &str, number: u32) -> Result<(), Error> {
    let mut copy = copy_of(context, &snapshot::state(lab, name)?.topology, number)?;
    let _lock = copy.lock()?;
    capacity::check(&copy)?;
    let task = context.progress.begin(&copy.topology.name, &format!("fork snapshot {name}"));
    let made = snapshot::fork(lab, name, number, &mut copy, &task);
    if made.is_ok() {
        task.done();
    } else {
        task.failed();
    }
    Ok(made?)
}

/// All forks of the lab, by number.
pub fn all(context: &Context) -> Result<Vec<Lab>, Error> {
    let labfile = context.labfile()?;
    let mut forks: Vec<LabState> = state::labs(&context.paths)
        .into_iter()
        .filter_map(|name| LabState::read(&context.paths.lab(&name)).ok().flatten())
        .filter(|state| state.fork.is_some() && state.topology.labfile == labfile)
        .collect();
    forks.sort_by_key(|state| state.fork);
    let lab = |state: LabState| Ok(Lab::new(&context.paths, state.topology, context.progress.clone())?);
    forks.into_iter().map(lab).collect()
}

/// Runs a command in a node of every fork, all at the same time; lines are told with the fork's name in front.
pub fn exec(context: &Context, node: &str, command: &[String]) -> Result<ExitCode, Error> {
    let forks = all(context)?;
    if forks.is_empty() {
        return Err(Error::Other("the lab has no forks: `lab fork SNAPSHOT` makes them".into()));
    }
    let words = ssh::words(command);
    let plain = Progress::new(false);
    let results: Vec<bool> = std::thread::scope(|scope| {
        let run = |lab: &Lab| {
            let name = &lab.topology.name;
            let say = |line: &str| drop(super::write_out(&format!("{name}: {line}")));
            if let Err(error) = ssh::running(lab, node) {
                plain.say(&format!("{name}: {error}"));
                return false;
            }
            let limit = lab.limit(EXEC_LIMIT_S);
            let ssh = lab.channel(node).ssh_to(&words);
            match child::run(ssh, std::io::empty(), None, limit, &mut |line| say(line)) {
                Ok(outcome) if outcome.success() => true,
                Ok(outcome) => {
                    plain.say(&format!("{name}: {}", outcome.describe(limit)));
                    false
                }
                Err(error) => {
                    plain.say(&format!("{name}: cannot run ssh: {error}"));
                    false
                }
            }
        };
        let threads: Vec<_> = forks.iter().map(|lab| scope.spawn(move || run(lab))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(false)).collect()
    });
    Ok(exit(results.into_iter().all(|good| good)))
}
