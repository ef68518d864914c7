//! `lab forward`: ports of the host that lead into the lab.

use std::process::ExitCode;

use super::{Context, Error, status, table};
use crate::{
    actions::{self, Action},
    cli::ForwardAction,
    labfile,
};

/// Lists, adds or removes forwards.
pub fn run(context: &Context, action: Option<ForwardAction>) -> Result<ExitCode, Error> {
    let mut lab = context.existing()?;
    match action.unwrap_or(ForwardAction::Ls) {
        ForwardAction::Ls => {
            context.print(&lab.forwards(), |forwards| {
                table(&["ON THIS MACHINE", "IN THE LAB"], &status::forward_rows(forwards))
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        ForwardAction::Add { node, forward } => {
            let ip = lab.node(&node)?.ip;
            let new = labfile::parse_forward(&forward, ip).map_err(Error::Other)?;
            for forward in &new {
                let taken = lab
                    .forwards()
                    .into_iter()
                    .find(|open| (open.host_port, open.protocol) == (forward.host_port, forward.protocol));
                if let Some(taken) = taken.filter(|taken| taken != forward) {
                    let guest = format!("{}:{}", taken.guest_ip, taken.guest_port);
                    let port = forward.host_port;
                    return Err(Error::Other(format!("port {port} leads to {guest} already")));
                }
            }
            let open = lab.forwards();
            lab.added_forwards.extend(new.into_iter().filter(|forward| !open.contains(forward)));
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
    let _lock = lab.lock()?;
    let network = actions::Network;
    if crate::state::net_is_running(&lab.dirs) && !network.is_done(&lab)? {
        let task = lab.progress.begin(&lab.topology.name, "forwards");
        network.run(&lab, &task)?;
        task.done();
    }
    lab.record()?;
    Ok(ExitCode::SUCCESS)
}
