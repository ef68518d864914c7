//! `lab forward`: ports of the host that lead into the lab.

use std::process::ExitCode;

use lab_net::config::Forward;

use super::{Context, Error, status, table};
use crate::{
    actions::{self, Action},
    cli::ForwardAction,
    lab::Lab,
    labfile,
};

/// Lists, adds or removes forwards.
pub fn run(context: &Context, action: Option<ForwardAction>) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let change = match action.unwrap_or(ForwardAction::Ls) {
        ForwardAction::Ls => {
            context.print(&lab.forwards(), |forwards| {
                table(&["ON THIS MACHINE", "IN THE LAB"], &status::forward_rows(forwards))
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        change => change,
    };
    let _lock = lab.lock()?;
    // As the last one who changed them has left them.
    let mut lab = context.existing()?;
    match change {
        ForwardAction::Ls => {}
        ForwardAction::Add { node, forward } => {
            let ip = lab.node(&node)?.ip;
            let new = labfile::parse_forward(&forward, ip).map_err(Error::Other)?;
            extend(&mut lab, new)?;
        }
        ForwardAction::Rm { host_port } => {
            let before = lab.added_forwards.len();
            lab.added_forwards.retain(|forward| forward.host_port != host_port);
            if lab.added_forwards.len() == before {
                let sentence = format!(
                    "no forward of port {host_port} was added by `lab forward add`; those of the labfile are removed there"
                );
                return Err(Error::Other(sentence));
            }
        }
    }
    apply(&lab)?;
    Ok(ExitCode::SUCCESS)
}

/// Adds forwards to those of the lab that don't have them already.
pub fn extend(lab: &mut Lab, new: Vec<Forward>) -> Result<(), Error> {
    let open = lab.forwards();
    for forward in &new {
        let same_port =
            |open: &&Forward| (open.host_port, open.protocol) == (forward.host_port, forward.protocol);
        if let Some(taken) = open.iter().find(same_port).filter(|taken| *taken != forward) {
            let guest = format!("{}:{}", taken.guest_ip, taken.guest_port);
            return Err(Error::Other(format!("port {} leads to {guest} already", forward.host_port)));
        }
    }
    lab.added_forwards.extend(new.into_iter().filter(|forward| !open.contains(forward)));
    Ok(())
}

/// Tells the running network of the lab's forwards, and records them.
pub fn apply(lab: &Lab) -> Result<(), Error> {
    let network = actions::Network;
    if crate::state::net_is_running(&lab.dirs) && !network.is_done(lab)? {
        let task = lab.progress.begin(&lab.topology.name, "forwards");
        network.run(lab, &task)?;
        task.done();
    }
    Ok(lab.record()?)
}
