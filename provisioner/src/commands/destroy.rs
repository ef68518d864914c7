//! `lab destroy`: removes nodes, or the whole lab.

use std::{
    fs,
    io::{BufRead, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use super::{Context, Error, fork, halt};
use crate::{actions, files, kubeconfig, lab::Lab, snapshot};

/// Asks whether these nodes, the lab, or all its forks are to be removed, where there is somebody to ask and something to
/// remove.
pub fn confirmed(context: &Context, nodes: &[String], all_forks: bool) -> Result<bool, Error> {
    if all_forks {
        let names: Vec<_> = fork::all(context)?.into_iter().map(|lab| lab.topology.name).collect();
        let somebody = !names.is_empty() && std::io::stdin().is_terminal();
        return if somebody { ask(&format!("the forks {}", names.join(", "))) } else { Ok(true) };
    }
    match context.existing() {
        Ok(lab) if std::io::stdin().is_terminal() => ask(&what(&lab, nodes)),
        _ => Ok(true),
    }
}

/// Removes nodes with their disks; without names, the lab.
pub fn run(context: &Context, nodes: &[String], forget: bool) -> Result<ExitCode, Error> {
    let lab = match context.existing() {
        Err(Error::Lab(crate::lab::Error::NotThere(name))) => {
            if forget {
                snapshot::kept::forget(&context.wanted()?)?;
            }
            context.progress.say(&format!("the lab `{name}` is not there"));
            return Ok(ExitCode::SUCCESS);
        }
        other => other?,
    };
    let _lock = lab.lock()?;
    if nodes.is_empty() {
        whole(&lab)?;
        if forget {
            snapshot::kept::forget(&lab)?;
        }
    } else {
        // Before one of them has taken its leave.
        halt::check(&lab, nodes)?;
        // A lab whose stacks are no longer to be had can be taken apart, too.
        if let Err(error) = actions::take_leave(&lab, nodes) {
            lab.progress.warn(&format!("{} does not take its leave: {error}", nodes.join(", ")));
        }
        halt::off(&lab, nodes, true)?;
        for name in nodes {
            remove(&lab.dirs.node(name))?;
        }
        snapshot::prune(&lab)?;
    }
    context.progress.say(&format!("removed {}", what(&lab, nodes)));
    Ok(ExitCode::SUCCESS)
}

fn whole(lab: &Lab) -> Result<(), Error> {
    halt::off(lab, &[], true)?;
    remove(&lab.dirs.sockets)?;
    remove(&lab.dirs.dir)?;
    // It is the user's file: what is wrong with it is no reason to keep a lab.
    if let Err(error) = kubeconfig::remove(&lab.topology.name) {
        lab.progress.warn(&error.to_string());
    }
    Ok(())
}

/// Removes all forks of the lab.
pub fn all_forks(context: &Context) -> Result<ExitCode, Error> {
    for lab in fork::all(context)? {
        let _lock = lab.lock()?;
        whole(&lab)?;
        context.progress.say(&format!("removed {}", what(&lab, &[])));
    }
    Ok(ExitCode::SUCCESS)
}

fn what(lab: &Lab, nodes: &[String]) -> String {
    if nodes.is_empty() { format!("the lab `{}`", lab.topology.name) } else { nodes.join(", ") }
}

fn ask(what: &str) -> Result<bool, Error> {
    let io = |source| Error::Io { action: "ask".into(), source };
    write!(std::io::stderr(), "remove {what} with all disks? [y/N] ").map_err(io)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(io)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Removes a folder at once for everybody who looks: it is renamed first, to a name that is no lab's or node's. What an
/// interruption leaves of it goes with the next removal.
fn remove(path: &Path) -> Result<(), Error> {
    let io = |path: &Path| {
        let action = format!("remove {}", path.display());
        move |source| Error::Io { action, source }
    };
    let mut name = std::ffi::OsString::from(".removed-");
    name.push(path.file_name().unwrap_or_default());
    let gone = path.with_file_name(name);
    let clear = || files::remove(&gone).map_err(io(&gone));
    clear()?;
    match fs::rename(path, &gone) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(io(path)(source)),
        _ => clear(),
    }
}
