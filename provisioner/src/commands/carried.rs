//! Where a command runs: here, or carried into the emulated host.

use std::{fs::File, process::ExitCode};

use super::{Context, Error, share, ssh};
use crate::{
    actions,
    cli::{Cli, Command, ForwardAction, ImageAction, SnapshotAction},
    fork,
    host::{
        self, Choice,
        emulated::{
            self,
            carry::{self, Carried, Wants},
        },
    },
    labfile, lockfile, snapshot,
};

/// How often `up` is carried into an emulated host, if the host is lost meanwhile.
const UP_TRIES: u32 = 3;

/// What a command needs of the host that labs run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing: it runs here.
    Nothing,
    /// To look at labs; where no emulated host runs, no lab does, and looking can be done from here.
    Look,
    /// To start machines.
    Start,
}

fn need(command: &Command) -> Need {
    match command {
        Command::Init { .. }
        | Command::Validate
        | Command::Image {
            action:
                ImageAction::Ls
                | ImageAction::Build { .. }
                | ImageAction::Import { .. }
                | ImageAction::Verify { .. }
                | ImageAction::Rm { .. },
        }
        | Command::Host { .. }
        | Command::Doctor
        | Command::Schema
        | Command::Completions { .. }
        | Command::Kubeconfig { .. }
        // Nothing but files, which are the same here, and work for all processors.
        | Command::Snapshot { action: SnapshotAction::Export { .. } | SnapshotAction::Import { .. } } => {
            Need::Nothing
        }
        Command::Up { .. }
        | Command::Restart { .. }
        | Command::Resume
        | Command::Fork { .. }
        | Command::Bundle { .. }
        | Command::Snapshot { action: SnapshotAction::Restore { .. } } => Need::Start,
        _ => Need::Look,
    }
}

/// What became of a command line.
pub enum Place {
    /// It ran in the emulated host, and this is its exit status.
    Ended(ExitCode),
    /// It is to run here, while this file is open: the emulated host is not started before it is closed.
    Here(Option<File>),
}

/// Carries the command into the emulated host, if labs run there.
pub fn carry(context: &Context, cli: &Cli) -> Result<Place, Error> {
    let need = need(&cli.command);
    if need == Need::Nothing {
        return Ok(Place::Here(None));
    }
    let Choice::Emulated { reason } = host::choose(cli.global.host.as_deref())? else {
        return Ok(Place::Here(None));
    };
    let mut wants = Wants { start: need == Need::Start, forwards: Vec::new() };
    if let Some(name) = restored(&cli.command) {
        wants.forwards = snapshot::state(&context.existing()?, name)?.all_forwards();
    } else if let Command::Fork { snapshot: name, count } = &cli.command {
        let topology = snapshot::state(&context.existing()?, name)?.topology;
        for number in 1..=*count {
            let mut copy = topology.clone();
            fork::adapt(&mut copy, number);
            wants.forwards.extend(copy.nodes.into_iter().flat_map(|node| node.forwards));
        }
    } else if wants.start {
        // What can be found wrong here is told here, and images are built where building is quick.
        let lab = match &cli.command {
            Command::Up { locked, offline, .. } => context.wanted_for_up(*locked, offline.as_deref())?,
            _ => context.wanted()?,
        };
        if let Some(reason) = reason {
            context
                .progress
                .say(&format!("{}: in the emulated host, which is slow ({reason})", lab.topology.name));
        }
        if !matches!(cli.command, Command::Bundle { .. }) {
            wants.forwards = lab.forwards();
        }
        for used in &lab.topology.stacks {
            actions::bundle_files(&lab, used)?;
        }
        let locked = matches!(cli.command, Command::Up { locked: true, .. });
        if locked {
            lockfile::check(&lab)?;
        }
        prepare_images(context, &lab)?;
        if locked {
            lockfile::check(&lab)?;
        }
        let fresh = matches!(cli.command, Command::Up { fresh: true, .. } | Command::Bundle { .. });
        if fresh || lab.dirs.state().exists() || !snapshot::kept::is_there(&lab) {
            actions::bake_without_nodes(&lab)?;
        }
    }
    if let Command::Forward { action: Some(ForwardAction::Add { node, forward }) } = &cli.command {
        let ip = context.existing()?.node(node)?.ip;
        wants.forwards = labfile::parse_forward(forward, ip).map_err(Error::Other)?;
    }
    if let Command::Share { node, .. } = &cli.command {
        let lab = context.existing()?;
        wants.forwards = vec![share::way(&lab, &ssh::name_or_first(&lab, node.as_deref())?)?];
    }
    let mut command: Vec<_> = std::env::current_exe()
        .map(|program| std::iter::once(program.into_os_string()).chain(std::env::args_os().skip(1)).collect())
        .map_err(|source| Error::Io { action: "find this program".into(), source })?;
    if matches!(cli.command, Command::Destroy { .. }) {
        command.push("--yes".into()); // the user was asked here
    }
    // `up` goes on from wherever it was cut off, so it does: a machine that is only emulated does fall over.
    let mut tries = if matches!(cli.command, Command::Up { .. }) { UP_TRIES } else { 1 };
    let carried = loop {
        match carry::run(&context.paths, command.clone(), wants.clone(), &context.progress) {
            Err(emulated::Error::Lost(how)) if tries > 1 => {
                tries -= 1;
                let line = format!("the emulated host was lost{how}: going on in a new one");
                context.progress.say(&line);
            }
            other => break other,
        }
    };
    match carried.map_err(host::Error::from)? {
        Carried::Ended(status) => Ok(Place::Ended(ExitCode::from(status))),
        Carried::Here(file) => Ok(Place::Here(Some(file))),
    }
}

/// The snapshot that a command restores.
fn restored(command: &Command) -> Option<&str> {
    match command {
        Command::Snapshot { action: SnapshotAction::Restore { name } } => Some(name),
        Command::Resume => Some(snapshot::SUSPENDED),
        _ => None,
    }
}

/// Has the images of a lab's nodes that don't exist yet, unless nothing is to be built.
fn prepare_images(context: &Context, lab: &crate::lab::Lab) -> Result<(), Error> {
    let mut names: Vec<&str> = Vec::new();
    for node in &lab.topology.nodes {
        if lab.record_of(&node.name)?.is_none() && !names.contains(&node.image.as_str()) {
            names.push(&node.image);
        }
    }
    for name in names {
        if lab.store.get(name).is_err() {
            if lab.offline {
                return Err(actions::Error::Offline(format!("the image {name}")).into());
            }
            let task = context.progress.begin(&lab.topology.name, &format!("build image {name}"));
            lab.store.ensure(name, &mut |step| task.detail(step))?;
            task.done();
        }
    }
    Ok(())
}
