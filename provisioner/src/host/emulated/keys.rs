//! The key pairs of the emulated host, made once a `LAB_HOME`: one for commands, one for its SSH server.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use super::{Error, files::Files, tools::Tools};
use crate::json_file;

/// Name that the SSH server's key is known by, whatever port it is reached at.
pub const HOST_ALIAS: &str = "lab-host";

/// Makes what is missing; returns the public key of commands, a line of authorized_keys(5).
pub fn prepare(files: &Files, tools: &Tools) -> Result<String, Error> {
    let public = files.key().with_extension("pub");
    if !files.key().exists() || !public.exists() {
        remove(&files.key());
        remove(&public);
        let mut command = Command::new(&tools.ssh_keygen);
        command.args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"]).arg(files.key());
        run(command, "cannot make a key for the emulated host")?;
    }
    if !files.host_key().exists() || !files.known_hosts().exists() {
        remove(&files.host_key());
        let mut command = Command::new(&tools.dropbearkey);
        command.args(["-t", "ed25519", "-f"]).arg(files.host_key());
        let said = run(command, "cannot make the emulated host's key")?;
        let Some(key) = said.lines().find_map(|line| line.strip_prefix("ssh-ed25519 ")) else {
            return Err(Error::Failed { what: "cannot make the emulated host's key", said });
        };
        let key = key.split_whitespace().next().unwrap_or_default();
        let line = format!("{HOST_ALIAS} ssh-ed25519 {key}\n");
        json_file::write_bytes(&files.known_hosts(), line.as_bytes())?;
    }
    let key = fs::read_to_string(&public)
        .map_err(|source| Error::Io { what: format!("cannot read {}", public.display()), source })?;
    Ok(key.trim().into())
}

fn remove(path: &Path) {
    // What is still there is found by the program that writes it.
    let _ = fs::remove_file(path);
}

fn run(mut command: Command, what: &'static str) -> Result<String, Error> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Program { program: command.get_program().into(), source })?;
    if !output.status.success() {
        return Err(Error::Failed { what, said: String::from_utf8_lossy(&output.stderr).trim().into() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
