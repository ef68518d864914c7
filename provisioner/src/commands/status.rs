//! `lab status`: the lab and its nodes.

use std::{net::Ipv4Addr, path::PathBuf, process::ExitCode};

use lab_net::config::{Forward, Protocol};
use serde::Serialize;

use super::{Context, Error, stack_version, stacks_line, table};
use crate::{
    actions, control,
    lab::Lab,
    labfile::topology::{Node, Stack},
    state::{self, NodeState},
};

/// A node as `status` tells it.
#[derive(Debug, Serialize)]
struct NodeStatus {
    name: String,
    role: String,
    state: NodeState,
    /// Whether it has run commands since it was started.
    ready: bool,
    ip: Ipv4Addr,
    image: String,
    cpus: u8,
    memory_mib: u64,
    uptime_s: Option<u64>,
}

/// A lab as `status` tells it.
#[derive(Debug, Serialize)]
struct LabStatus {
    name: String,
    labfile: PathBuf,
    network: NetworkStatus,
    nodes: Vec<NodeStatus>,
    stacks: Vec<StackStatus>,
    forwards: Vec<Forward>,
}

/// A stack as `status` tells it.
#[derive(Debug, Serialize)]
struct StackStatus {
    name: String,
    source: String,
    /// The version that its options ask for.
    version: Option<String>,
}

#[derive(Debug, Serialize)]
struct NetworkStatus {
    running: bool,
    subnet: String,
    gateway: Ipv4Addr,
}

/// Shows the lab.
pub fn run(context: &Context) -> Result<ExitCode, Error> {
    let lab = match context.existing() {
        Err(Error::Lab(crate::lab::Error::NotThere(_))) => context.wanted()?,
        other => other?,
    };
    print(context, &lab)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints how a lab is.
pub fn print(context: &Context, lab: &Lab) -> Result<(), Error> {
    let node = |node: &Node| {
        let state = state::node_state(&lab.dirs, &node.name);
        let running = state == NodeState::Running;
        let status = running.then(|| control::vmm_status(&lab.dirs.node_socket(&node.name, "ctl")).ok());
        let status = status.flatten();
        NodeStatus {
            name: node.name.clone(),
            role: node.role.clone(),
            state,
            ready: status.as_ref().is_some_and(|status| actions::is_ready_by(lab, &node.name, status)),
            ip: node.ip,
            image: node.image.clone(),
            // What runs, which may be older than what the labfile says.
            cpus: status.as_ref().map_or(node.cpus, |status| status.cpus),
            memory_mib: status.as_ref().map_or(node.memory_mib, |status| status.memory_mib),
            uptime_s: status.map(|status| status.uptime_ms / 1000),
        }
    };
    let stack = |used: &Stack| StackStatus {
        name: used.name.clone(),
        source: used.source.clone(),
        version: stack_version(used),
    };
    let network = &lab.topology.network;
    let status = LabStatus {
        name: lab.topology.name.clone(),
        labfile: lab.topology.labfile.clone(),
        network: NetworkStatus {
            running: state::net_is_running(&lab.dirs),
            subnet: format!("{}/{}", network.subnet, network.prefix),
            gateway: network.gateway,
        },
        nodes: lab.topology.nodes.iter().map(node).collect(),
        stacks: lab.topology.stacks.iter().map(stack).collect(),
        forwards: lab.forwards(),
    };
    context.print(&status, |status| text(status, &lab.topology.stacks))
}

fn text(status: &LabStatus, stacks: &[Stack]) -> String {
    let net = if status.network.running { "running" } else { "stopped" };
    let mut out = format!(
        "lab {} · network {} ({net}) · {}\n{}\n",
        status.name,
        status.network.subnet,
        status.labfile.display(),
        stacks_line(stacks, |_| None),
    );
    let rows: Vec<Vec<String>> = status
        .nodes
        .iter()
        .map(|node| {
            let state = match (node.state, node.ready) {
                (NodeState::Running, false) => "booting".into(),
                (state, _) => state.to_string(),
            };
            vec![
                node.name.clone(),
                node.role.clone(),
                state,
                node.ip.to_string(),
                node.cpus.to_string(),
                format!("{} MiB", node.memory_mib),
                node.image.clone(),
                node.uptime_s.map(uptime).unwrap_or_default(),
            ]
        })
        .collect();
    out += &table(&["NODE", "ROLE", "STATE", "IP", "CPUS", "MEMORY", "IMAGE", "UP"], &rows);
    if !status.forwards.is_empty() {
        out += "\n";
        out += &table(&["ON THIS MACHINE", "IN THE LAB"], &forward_rows(&status.forwards));
    }
    out
}

/// Rows of a table of forwards.
pub fn forward_rows(forwards: &[Forward]) -> Vec<Vec<String>> {
    let row = |forward: &Forward| {
        let protocol = match forward.protocol {
            Protocol::Tcp => "",
            Protocol::Udp => "/udp",
        };
        vec![
            format!("{}:{}{protocol}", forward.bind, forward.host_port),
            format!("{}:{}", forward.guest_ip, forward.guest_port),
        ]
    };
    forwards.iter().map(row).collect()
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}
