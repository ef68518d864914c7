//! A guest that stood still, or was restored, has missed time: its wall clock is stepped, forward only, as the first thing
//! that it is asked to do.

use std::{
    io::{BufRead, BufReader, Write},
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use super::{Error, clear};
use crate::{actions, channel, child, json_file, lab::Lab};

/// How long a machine may take to be written, with KVM.
pub const SAVE_LIMIT_S: u32 = 120;
/// How long a guest may take to answer after it went on, with KVM.
const LIMIT_S: u32 = 20;

/// Reads the time once the connection is there. Whole seconds are compared, so that the clock never goes back; busybox
/// takes no fractions.
const SCRIPT: &str = "echo go; read t; s=${t%.*}; \
     if [ \"$s\" -gt \"$(date +%s)\" ]; then date -s \"@$t\" || date -s \"@$s\"; fi >/dev/null 2>&1";

/// Notes that a node will have missed time, before it does: whatever ends this command, the next `up` tells it.
pub fn will_miss(lab: &Lab, node: &str) -> Result<(), Error> {
    Ok(json_file::write_bytes(&actions::behind_marker(lab, node), b"")?)
}

/// Sets the clock of a node that went on, and marks it as ready.
pub fn catch_up(lab: &Lab, node: &str) -> Result<(), Error> {
    let limit = lab.limit(LIMIT_S);
    let end = Instant::now() + limit;
    let channel = lab.channel(node);
    loop {
        match step(&channel, end) {
            Ok(()) => {
                json_file::write_bytes(&actions::ready_marker(lab, node), b"")?;
                return clear(&actions::behind_marker(lab, node));
            }
            Err(reason) if Instant::now() > end => {
                let reason =
                    format!("its clock was not set within {} s; last seen: {reason}", limit.as_secs());
                return Err(channel::Error::Unreachable { node: node.into(), reason }.into());
            }
            // The connection of another life: the guest has just forgotten it.
            Err(_) => std::thread::park_timeout(Duration::from_millis(100)),
        }
    }
}

fn step(channel: &channel::Channel, end: Instant) -> Result<(), String> {
    let mut command = channel.ssh_to(SCRIPT);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut ssh = command.spawn().map_err(|error| format!("ssh: {error}"))?;
    let told = tell(&mut ssh);
    let left = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
    let ended = child::wait(&mut ssh, left);
    match (told, ended) {
        (Ok(()), Ok(Some(status))) if status.success() => Ok(()),
        (_, Ok(Some(status))) => Err(format!("ssh: {status}")),
        (_, other) => {
            drop(ssh.kill());
            drop(ssh.wait());
            Err(other.map_or_else(|error| error.to_string(), |_| "ssh does not end".into()))
        }
    }
}

fn tell(ssh: &mut std::process::Child) -> std::io::Result<()> {
    let (Some(output), Some(mut input)) = (ssh.stdout.take(), ssh.stdin.take()) else { return Ok(()) };
    BufReader::new(output).read_line(&mut String::new())?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    writeln!(input, "{}.{:03}", now.as_secs(), now.subsec_millis())
}
