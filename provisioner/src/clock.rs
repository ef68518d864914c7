//! A guest's wall clock: stepped to the host's, forward only, before a node counts as ready. A guest that stood still has
//! missed time, and one that boots on a slow host has lost ticks before it had its clock. While a node runs, its `lab-vmm`
//! tells it the time (`lab_vmm::guest_clock`).

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    os::fd::AsFd,
    process::{Child, Stdio},
    time::Duration,
};

use lab_vmm::guest_clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{channel::Channel, child};

/// How much is told of an `ssh` that failed, in bytes.
const TEXT_MAX: u64 = 200;

/// Reads the time once the connection is there. Whole seconds are compared, so that the clock never goes back; busybox
/// takes no fractions.
const SCRIPT: &str = "echo go; read t; s=${t%.*}; \
     if [ \"$s\" -gt \"$(date +%s)\" ]; then date -s \"@$t\" || date -s \"@$s\"; fi >/dev/null 2>&1";

/// By what the image has for it ([`lab_images::manifest::Manifest::clock_port`]).
pub fn step(channel: &Channel, port: u32, limit: Duration) -> Result<(), String> {
    guest_clock::tell(&channel.vsock_socket(), port, limit).map_err(|error| format!("vsock: {error}"))
}

/// By a command over SSH, which any image runs; that it ends well shows that the node runs commands.
pub fn step_by_ssh(channel: &Channel, limit: Duration) -> Result<(), String> {
    // A file: a connection that is kept for the next command keeps its standard error, too.
    let mut said = tempfile::tempfile().map_err(|error| format!("a temporary file: {error}"))?;
    let stderr = said.try_clone().map_err(|error| format!("a temporary file: {error}"))?;
    let mut command = channel.ssh_to(SCRIPT);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
    let mut ssh = command.spawn().map_err(|error| format!("ssh: {error}"))?;
    let told = tell_command(&mut ssh, limit);
    // What did not ask for the time has no more to do.
    let ended = child::wait(&mut ssh, if told.is_ok() { limit } else { Duration::from_secs(1) });
    match ended {
        Ok(Some(status)) if status.success() && told.is_ok() => Ok(()),
        Ok(Some(status)) => Err(format!("ssh: {status} {}", tail(&mut said))),
        other => {
            drop(ssh.kill());
            drop(ssh.wait());
            let why = match other {
                Err(error) => error.to_string(),
                Ok(_) => format!("no answer within {} s", limit.as_secs()),
            };
            Err(format!("ssh: {why} {}", tail(&mut said)))
        }
    }
}

fn tell_command(ssh: &mut Child, limit: Duration) -> io::Result<()> {
    let (Some(output), Some(mut input)) = (ssh.stdout.take(), ssh.stdin.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    if poll(&mut [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    guest_clock::expect_line(&mut BufReader::new(output))?;
    guest_clock::say_time(&mut input)
}

/// What `ssh` said, on one line.
fn tail(said: &mut File) -> String {
    let mut text = Vec::new();
    if said.rewind().is_ok() {
        drop(said.take(TEXT_MAX).read_to_end(&mut text));
    }
    String::from_utf8_lossy(&text).split_whitespace().collect::<Vec<_>>().join(" ")
}
