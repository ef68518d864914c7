//! `lab plan`: what `up` would do.

use std::process::ExitCode;

use serde::Serialize;

use super::{Context, Error, stacks_line, table};
use crate::{actions, plan};

/// An action as it is printed.
#[derive(Debug, Serialize)]
struct Entry {
    #[serde(flatten)]
    entry: plan::Entry,
    /// Where the software of its stack comes from, if it is of one.
    source: Option<String>,
}

/// Prints the plan.
pub fn run(context: &Context) -> Result<ExitCode, Error> {
    let lab = context.wanted()?;
    let plan = actions::plan(&lab)?;
    let stacks = &lab.topology.stacks;
    let source = |stack: &str| Some(stacks.iter().find(|used| used.name == stack)?.source.clone());
    let sources = plan.items.iter().map(|item| item.action.stack().and_then(source));
    let entries = plan.entries(&lab)?.into_iter().zip(sources);
    let entries: Vec<Entry> = entries.map(|(entry, source)| Entry { entry, source }).collect();
    context.print(&entries, |entries| {
        let row = |Entry { entry, .. }: &Entry| {
            let after: Vec<String> = entry.after.iter().map(ToString::to_string).collect();
            vec![
                entry.number.to_string(),
                entry.node.clone().unwrap_or_else(|| "(lab)".into()),
                entry.action.clone(),
                entry.state.into(),
                after.join(","),
            ]
        };
        let rows: Vec<_> = entries.iter().map(row).collect();
        let open = entries.iter().filter(|Entry { entry, .. }| entry.state == "to do").count();
        table(&["#", "NODE", "ACTION", "STATE", "AFTER"], &rows)
            + "\n"
            + &stacks_line(stacks, |used| {
                let files = actions::bundle_files(&lab, used).unwrap_or_default();
                files.into_iter().map(|file| file.version).find(|version| !version.is_empty())
            })
            + &format!("{open} of {} to do", rows.len())
    })?;
    Ok(ExitCode::SUCCESS)
}
