//! `lab kubeconfig`: the way into the lab's Kubernetes cluster, for kubectl on this machine.

use std::process::ExitCode;

use lab_net::config::Protocol;

use super::{Context, Error};
use crate::{actions, kubeconfig, lab::Lab};

/// The stack that gives it, and its name there.
const STACK: &str = "kubernetes";
const GIVEN: &str = "kubeconfig";
/// Port of the API server.
const API_PORT: u16 = 6443;

/// Merges the cluster into the user's kubeconfig, or prints it.
pub fn run(context: &Context, print: bool) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let name = &lab.topology.name;
    let path = actions::given_file(&lab, STACK, GIVEN);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Other(format!(
                "the lab `{name}` has no Kubernetes cluster, or its `up` has not come that far: [stack.kubernetes] in the labfile and `lab up` make one"
            )));
        }
        other => other.map_err(|source| Error::Io { action: format!("read {}", path.display()), source })?,
    };
    let config = kubeconfig::of_lab(&text, name, &server(&lab)?)?;
    if print {
        super::write_out(kubeconfig::text(&config)?.trim_end())?;
    } else {
        let file = kubeconfig::merge(config, name)?;
        let context_name = kubeconfig::context(name);
        context
            .progress
            .say(&format!("{}: the context is {context_name}: kubectl get nodes", file.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the API server answers on this machine.
fn server(lab: &Lab) -> Result<String, Error> {
    let (name, nodes) = (&lab.topology.name, &lab.topology.nodes);
    let master = nodes.iter().find(|node| node.role == "master").or(nodes.first());
    let leads = |forward: &lab_net::config::Forward| {
        Some(forward.guest_ip) == master.map(|node| node.ip)
            && forward.guest_port == API_PORT
            && forward.protocol == Protocol::Tcp
    };
    let forward = lab.forwards().into_iter().find(leads).ok_or_else(|| {
        let master = master.map_or("master", |node| node.name.as_str());
        Error::Other(format!(
            "no port of this machine leads to the cluster of `{name}`: `lab forward add {master} {API_PORT}:{API_PORT}` adds one"
        ))
    })?;
    let bind = if forward.bind.is_unspecified() { std::net::Ipv4Addr::LOCALHOST } else { forward.bind };
    Ok(format!("https://{bind}:{}", forward.host_port))
}
