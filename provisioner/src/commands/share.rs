//! `lab share`: gives a node to somebody else who uses this machine, by an SSH key and a port.

use std::{fs::File, io::Read, net::Ipv4Addr, path::Path, process::ExitCode};

use lab_net::config::{Forward, Protocol};
use serde::Serialize;

use super::{Context, Error, forward, ssh};
use crate::{fork, lab::Lab};

/// Longest public key, in bytes.
const KEY_MAX: u64 = 16 << 10;
/// Limit for putting the key into the node, with KVM.
const LIMIT_S: u32 = 30;
/// Adds `$key` to the keys that are let in (sshd(8), authorized_keys).
const ADD: &str = r#"umask 077; mkdir -p ~/.ssh; touch ~/.ssh/authorized_keys
grep -qxF "$key" ~/.ssh/authorized_keys || echo "$key" >>~/.ssh/authorized_keys"#;

/// The way into a node for somebody else.
#[derive(Debug, Serialize)]
struct Way {
    /// The command that they give.
    command: String,
    port: u16,
    /// The node's key, as a line for their known_hosts.
    host_key: String,
}

/// Lets the holder of a key into a node, and tells the way.
pub fn run(context: &Context, node: Option<&str>, key: &Path) -> Result<ExitCode, Error> {
    let mut lab = context.existing()?;
    let node = ssh::name_or_first(&lab, node)?;
    let key = public_key(key)?;
    let way = way(&lab, &node)?;
    let port = way.host_port;
    let _lock = lab.lock()?;
    ssh::running(&lab, &node)?;
    let limit = lab.limit(LIMIT_S);
    let outcome = lab.channel(&node).script(ADD, &[("key".into(), key)], None, limit, &mut |_| ())?;
    if !outcome.success() {
        let how = outcome.describe(limit);
        return Err(Error::Other(format!("{node}: the key could not be put there: {how}")));
    }
    forward::extend(&mut lab, vec![way])?;
    forward::apply(&lab)?;
    let path = lab.dirs.node(&node).join("ssh_host_ed25519_key.pub");
    let host_key = std::fs::read_to_string(&path)
        .map_err(|source| Error::Io { action: format!("read {}", path.display()), source })?;
    let way = Way {
        command: format!("ssh -p {port} root@127.0.0.1"),
        port,
        host_key: format!("[127.0.0.1]:{port} {}", host_key.trim_end()),
    };
    context.print(&way, |way| format!("{}\n{}", way.command, way.host_key))?;
    Ok(ExitCode::SUCCESS)
}

/// The forward that leads to a node's SSH server.
pub fn way(lab: &Lab, node: &str) -> Result<Forward, Error> {
    let index = lab.topology.nodes.iter().position(|other| other.name == node).unwrap_or(usize::MAX);
    let host_port = fork::ssh_port(lab.fork.unwrap_or(0), index).ok_or_else(|| {
        Error::Other(format!(
            "{node} is beyond the lab's twentieth node: `lab forward add {node} PORT:22` instead"
        ))
    })?;
    Ok(Forward {
        protocol: Protocol::Tcp,
        bind: Ipv4Addr::LOCALHOST,
        host_port,
        guest_ip: lab.node(node)?.ip,
        guest_port: 22,
    })
}

/// Reads a public key: one line that begins with its kind.
fn public_key(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(KEY_MAX).read_to_string(&mut text))
        .map_err(|source| Error::Io { action: format!("read {}", path.display()), source })?;
    let text = text.trim();
    let path = path.display();
    if text.contains("PRIVATE KEY") {
        return Err(Error::Other(format!(
            "{path} is a private key, which stays with its owner: {path}.pub is the public one"
        )));
    }
    let kind = text.split(' ').next().unwrap_or_default();
    let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|start| kind.starts_with(start));
    if !known || text.contains(char::is_control) || !text.contains(' ') {
        return Err(Error::Other(format!(
            "{path} has no public SSH key: one line that begins with its kind, such as ssh-ed25519"
        )));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_public_key_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            public_key(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read("ssh-ed25519 AAAA student@pc\n").unwrap(), "ssh-ed25519 AAAA student@pc");
        assert!(read("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n").unwrap_err().contains("is a private key"));
        for wrong in ["", "hello", "ssh-ed25519", "ssh-rsa AAAA\nssh-rsa BBBB", "ssh-rsa AA\u{7}"] {
            assert!(read(wrong).unwrap_err().contains("has no public SSH key"), "{wrong}");
        }
        assert!(public_key(&dir.path().join("none")).unwrap_err().to_string().contains("cannot read"));
    }
}
