//! `lab cp`: files and folders into, out of and between nodes, by OpenSSH's scp.

use std::{
    collections::BTreeSet,
    process::{Command, ExitCode, Stdio},
};

use super::{Context, Error, ssh};
use crate::{json_file, lab::Lab};

/// Copies `from` to `to`, as `scp -r` does.
pub fn run(context: &Context, from: &[String], to: &str) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let nodes: BTreeSet<&str> = from.iter().map(String::as_str).chain([to]).filter_map(node_of).collect();
    if nodes.is_empty() {
        let sentence = "a source or the target must be in a node, as in `lab cp FILE NODE:PATH`";
        return Err(Error::Other(sentence.into()));
    }
    for node in &nodes {
        ssh::reachable(&lab, node)?;
    }
    let config = write_config(&lab, &nodes)?;
    let mut scp = Command::new("scp");
    // By SFTP also where an older scp would choose its own protocol, which has the node's shell read names; and from one
    // node to another through this machine.
    scp.args(["-r", "-s", "-3", "-F"]).arg(config).args(["-o", "BatchMode=yes"]);
    if context.progress.is_quiet() {
        scp.arg("-q");
    }
    let status =
        scp.arg("--").args(from).arg(to).stdin(Stdio::null()).status().map_err(|source| Error::Io {
            action: "run scp (Debian's package openssh-client)".into(),
            source,
        })?;
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    let what = format!("copy {} to {to}", from.join(" "));
    Err(Error::Other(format!("could not {what}: the reason is above")))
}

/// The node that one side of a copy is in; `None` for a path of this machine: it begins with a colon or has a slash
/// before the first one, as scp has it.
fn node_of(side: &str) -> Option<&str> {
    let (node, _) = side.split_once(':')?;
    (!node.is_empty() && !node.contains('/')).then_some(node)
}

/// Writes how scp gets into these nodes.
fn write_config(lab: &Lab, nodes: &BTreeSet<&str>) -> Result<std::path::PathBuf, Error> {
    let program = std::env::current_exe().unwrap_or_else(|_| "lab".into());
    let blocks: Vec<String> = nodes.iter().map(|node| lab.channel(node).config(&program, true)).collect();
    let path = lab.dirs.ssh_config();
    json_file::write_bytes(&path, blocks.concat().as_bytes())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert_eq!(node_of("a/b"), None);
        assert_eq!(node_of("./a:b"), None);
        assert_eq!(node_of(":a"), None);
        assert_eq!(node_of("w1:/etc/motd"), Some("w1"));
        assert_eq!(node_of("w1:"), Some("w1"));
    }
}
