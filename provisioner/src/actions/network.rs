//! The lab's network: a `lab-net` that is configured as the labfile says.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use lab_net::{config::NetworkConfig, control::Action as Ask};

use super::{Action, Error};
use crate::{child, control, json_file, lab, lab::Lab, progress::Task, state};

/// Starts `lab-net`, or brings a running one to the labfile's nodes and forwards.
pub struct Network;

impl Action for Network {
    fn describe(&self) -> String {
        "network".into()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        Ok(state::net_is_running(&lab.dirs) && running_config(lab)? == Some(lab.network_config()))
    }

    fn inputs(&self, lab: &Lab) -> Option<String> {
        serde_json::to_string(&lab.topology.network).ok()
    }

    fn run(&self, lab: &Lab, _task: &Task) -> Result<(), Error> {
        let config = lab.network_config();
        match running_config(lab)? {
            Some(running) if state::net_is_running(&lab.dirs) => change(lab, &running, &config)?,
            _ => start(lab, &config)?,
        }
        Ok(())
    }
}

fn running_config(lab: &Lab) -> Result<Option<NetworkConfig>, Error> {
    Ok(json_file::read(&lab.dirs.net().join("config.json"))?)
}

fn start(lab: &Lab, config: &NetworkConfig) -> Result<(), Error> {
    let file = lab.dirs.net().join("config.json");
    json_file::write(&file, config)?;
    let log = lab.dirs.net().join("net.log");
    let io = |source| Error::Io { action: "write", path: log.clone(), source };
    let stderr = File::create(&log).map_err(io)?;
    let program = lab::sibling("lab-net");
    let mut command = Command::new(&program);
    command.arg("--config").arg(&file).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    let mut process = child::detach(&mut command, lab.bound).spawn().map_err(|source| Error::Io {
        action: "start",
        path: program,
        source,
    })?;
    // The one line is there when all sockets are; without it the process has ended.
    let mut line = String::new();
    if let Some(stdout) = process.stdout.take() {
        drop(BufReader::new(stdout).read_line(&mut line));
    }
    if line.trim() == "ready" {
        return Ok(());
    }
    let reason = std::fs::read_to_string(&log).unwrap_or_default().trim().to_string();
    Err(Error::NotStarted { program: "lab-net", reason })
}

/// Changes a running network step by step; each step is recorded by the network itself, all of them at the end here.
fn change(lab: &Lab, from: &NetworkConfig, to: &NetworkConfig) -> Result<(), Error> {
    let fixed = |c: &NetworkConfig| (c.subnet, c.prefix, c.gateway);
    if fixed(from) != fixed(to) {
        let sentence = format!("the network of `{}` was changed in the labfile while it runs", to.lab);
        return Err(Error::NeedsHalt(sentence));
    }
    let socket = lab.dirs.net_control();
    if from.hosts != to.hosts {
        control::ask_net(&socket, Ask::SetHosts { hosts: to.hosts.clone() })?;
    }
    let open = control::net_status(&socket)?.forwards;
    for forward in open.iter().filter(|open| !to.forwards.contains(open)) {
        control::ask_net(&socket, Ask::RemoveForward { forward: forward.clone() })?;
    }
    for forward in to.forwards.iter().filter(|wanted| !open.contains(wanted)) {
        control::ask_net(&socket, Ask::AddForward { forward: forward.clone() })?;
    }
    Ok(json_file::write(&lab.dirs.net().join("config.json"), to)?)
}
