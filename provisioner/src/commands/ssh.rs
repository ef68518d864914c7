//! `lab ssh`, `lab exec`, `lab ssh-config`: into nodes.

use std::{
    io::IsTerminal,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use super::{Context, Error, write_out};
use crate::{
    actions::{self, Action, Ready},
    channel,
    channel::Channel,
    lab::Lab,
    state,
};

/// Opens a terminal in a node, or runs a command there with one.
pub fn ssh(context: &Context, node: Option<&str>, command: &[String]) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let mut ssh = into(&lab, node)?;
    if std::io::stdin().is_terminal() {
        ssh.arg("-t");
    }
    ssh.arg(name_or_first(&lab, node)?);
    if !command.is_empty() {
        ssh.arg(words(command));
    }
    become_it(ssh)
}

/// Runs a command in a node: input, output and exit status pass.
pub fn exec(context: &Context, node: &str, command: &[String]) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let mut ssh = into(&lab, Some(node))?;
    ssh.args(["-T", "-o", "BatchMode=yes", node]).arg(words(command));
    become_it(ssh)
}

/// Prints a configuration for OpenSSH.
pub fn config(context: &Context) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let program = std::env::current_exe().unwrap_or_else(|_| "lab".into());
    let mut text = String::new();
    for node in &lab.topology.nodes {
        text.push_str(&lab.channel(&node.name).config(&program, false));
    }
    write_out(text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// Connects standard input and output with a node's SSH server.
pub fn proxy(context: &Context, lab: &str, node: &str) -> Result<ExitCode, Error> {
    let dirs = context.paths.lab(lab);
    let state = state::LabState::read(&dirs)?.ok_or_else(|| crate::lab::Error::NotThere(lab.into()))?;
    let lab = Lab::new(&context.paths, state.topology, context.progress.clone())?;
    let (manifest, _) = lab.image_of(node)?;
    Channel::new(&dirs, &lab.topology.name, node).proxy(manifest.ssh, lab.node(node)?.ip)?;
    Ok(ExitCode::SUCCESS)
}

/// An `ssh` command into a node that is running.
fn into(lab: &Lab, node: Option<&str>) -> Result<Command, Error> {
    let node = name_or_first(lab, node)?;
    reachable(lab, &node)?;
    Ok(lab.channel(&node).ssh())
}

/// Refuses a node that is not running, in a better sentence than ssh's.
pub fn running(lab: &Lab, node: &str) -> Result<(), Error> {
    lab.node(node)?;
    match state::node_state(&lab.dirs, node) {
        state::NodeState::Running => Ok(()),
        other => Err(Error::Other(format!("{node} is {other}: `lab up` starts it"))),
    }
}

/// Waits until a node runs commands, if it boots: for the first time, or once more by itself.
pub fn reachable(lab: &Lab, node: &str) -> Result<(), Error> {
    running(lab, node)?;
    if actions::is_ready(lab, node) {
        return Ok(());
    }
    let ready = Ready { node: lab.node(node)?.clone() };
    let task = lab.progress.begin(node, &ready.describe());
    let waited = ready.run(lab, &task);
    match waited {
        Ok(()) => task.done(),
        Err(_) => task.failed(),
    }
    Ok(waited?)
}

/// The node of this name, or the lab's first.
pub fn name_or_first(lab: &Lab, node: Option<&str>) -> Result<String, Error> {
    match (node, lab.topology.nodes.first()) {
        (Some(name), _) => Ok(lab.node(name)?.name.clone()),
        (None, Some(first)) => Ok(first.name.clone()),
        (None, None) => Err(Error::Other(format!("the lab `{}` has no nodes", lab.topology.name))),
    }
}

/// A command's words as one, for a shell.
pub fn words(command: &[String]) -> String {
    command.iter().map(|word| channel::quote(word)).collect::<Vec<_>>().join(" ")
}

/// Lets ssh take this process' place: terminal, signals and exit status are then its own.
fn become_it(mut command: Command) -> Result<ExitCode, Error> {
    let source = command.exec();
    let program = Path::new(command.get_program()).display().to_string();
    Err(Error::Io { action: format!("run {program} (Debian's package openssh-client)"), source })
}
