//! Whether the host has what a lab's nodes need together, before anything starts.

use std::path::Path;

use crate::{
    lab::Lab,
    memory,
    state::{self, NodeState},
};

/// Memory in MiB that stays with the host and with lab's own processes.
const RESERVE_MIB: u64 = 256;

/// What is short.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Memory.
    #[error(
        "the lab's nodes need {needed_mib} MiB of memory together, {free_mib} MiB are free {place}: lower `memory` in {labfile}, or `lab halt` another lab"
    )]
    Memory {
        /// What the nodes need that don't run yet.
        needed_mib: u64,
        /// What can be had.
        free_mib: u64,
        /// Where: "on this host", or in a control group of lab's.
        place: String,
        /// The labfile.
        labfile: String,
    },
    /// Disk.
    #[error(
        "the lab's disks can grow by {needed_mib} MiB together, {free_mib} MiB are free below {home}: lower `disk` in {labfile}, or set LAB_HOME to a larger file system"
    )]
    Disk {
        /// What the nodes need that have no disk yet.
        needed_mib: u64,
        /// What can be had.
        free_mib: u64,
        /// The file system's folder.
        home: String,
        /// The labfile.
        labfile: String,
    },
}

/// Of the memory of a fork's nodes, the part that must be free: the rest it shares, until it is written to.
const FORK_SHARE: u64 = 8;

/// Refuses a lab that does not fit. Of a fork, only little need fit: it starts with nothing of its own, and whoever makes
/// many of them means to have more than there is.
pub fn check(lab: &Lab) -> Result<(), Error> {
    let labfile = lab.topology.labfile.display().to_string();
    let (mut memory_mib, mut disk_bytes) = (0u64, 0u64);
    for node in &lab.topology.nodes {
        let state = state::node_state(&lab.dirs, &node.name);
        if state != NodeState::Running {
            memory_mib = memory_mib.saturating_add(node.memory_mib);
        }
        if state == NodeState::Absent {
            let disks = node.extra_disks_bytes.iter().fold(node.disk_bytes, |sum, &b| sum.saturating_add(b));
            disk_bytes = disk_bytes.saturating_add(disks);
        }
    }
    if lab.fork.is_some() {
        (memory_mib, disk_bytes) = (memory_mib / FORK_SHARE, 0);
    }
    if let Some(available) = memory::available()
        && memory_mib > 0
        && memory_mib.saturating_add(RESERVE_MIB) > available.mib
    {
        let free_mib = available.mib.saturating_sub(RESERVE_MIB);
        let place = match available.limited_by {
            Some(file) => format!("in this control group ({})", file.display()),
            None => "on this host".into(),
        };
        return Err(Error::Memory { needed_mib: memory_mib, free_mib, place, labfile });
    }
    if let Some(free) = free_bytes(lab.paths.home())
        && disk_bytes > free
    {
        return Err(Error::Disk {
            needed_mib: disk_bytes >> 20,
            free_mib: free >> 20,
            home: lab.paths.home().display().to_string(),
            labfile,
        });
    }
    Ok(())
}

/// Bytes that this user can still write to the file system of the nearest existing folder of `path`.
fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|dir| dir.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_yet_counts_where_it_will_be() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a/b")).unwrap() > 0);
    }
}
