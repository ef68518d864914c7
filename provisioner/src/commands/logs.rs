//! `lab logs`: what nodes printed on their consoles, and what lab's processes have to say.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use super::{Context, Error};

/// Prints a log. `node` is a node's name, or `net`.
pub fn run(context: &Context, node: &str, vmm: bool, follow: bool) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let log = match node {
        "net" if lab.node("net").is_err() => lab.dirs.net().join("net.log"),
        _ => lab.dirs.node(&lab.node(node)?.name).join(if vmm { "vmm.log" } else { "console.log" }),
    };
    if !log.exists() {
        return Err(Error::Other(format!("{node} has no log yet: `lab up` starts it")));
    }
    let mut command = Command::new("tail");
    command.args(["-n", "+1"]);
    if follow {
        command.arg("-F");
    }
    let source = command.arg(&log).exec();
    Err(Error::Io { action: format!("read {}", log.display()), source })
}
