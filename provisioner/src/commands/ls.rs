//! `lab ls`: all labs, and what they take.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{Context, Error, mib, table};
use crate::{
    labfile::topology::Node,
    size::{self, Size},
    state::{self, LabState, NodeState},
};

#[derive(Debug, Serialize)]
struct LabLine {
    name: String,
    running: usize,
    nodes: usize,
    labfile: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
}

/// Lists all labs; if `sizes`, with what they take.
pub fn run(context: &Context, sizes: bool) -> Result<ExitCode, Error> {
    let mut lines = Vec::new();
    for name in state::labs(&context.paths) {
        let dirs = context.paths.lab(&name);
        let Some(lab) = LabState::read(&dirs)? else { continue };
        let nodes = &lab.topology.nodes;
        let is_running = |node: &&Node| state::node_state(&dirs, &node.name) == NodeState::Running;
        lines.push(LabLine {
            running: nodes.iter().filter(is_running).count(),
            nodes: nodes.len(),
            labfile: lab.topology.labfile,
            size: sizes.then(|| size::of_lab(&dirs)),
            name,
        });
    }
    context.print(&lines, |lines| {
        if lines.is_empty() {
            return "no labs".into();
        }
        let row = |line: &LabLine| {
            let mut row = vec![line.name.clone(), format!("{} of {}", line.running, line.nodes)];
            if let Some(size) = &line.size {
                row.extend([size.memory, size.memory_shared, size.disk, size.disk_shared].map(mib));
            }
            row.push(line.labfile.display().to_string());
            row
        };
        let head: &[&str] = match sizes {
            true => &["LAB", "RUNNING", "MEMORY", "SHARED", "DISK", "SHARED", "LABFILE"],
            false => &["LAB", "RUNNING", "LABFILE"],
        };
        table(head, &lines.iter().map(row).collect::<Vec<_>>())
    })?;
    Ok(ExitCode::SUCCESS)
}
