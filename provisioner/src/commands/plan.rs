//! `lab plan`: what `up` would do.

use std::process::ExitCode;

use super::{Context, Error, table};
use crate::actions;

/// Prints the plan.
pub fn run(context: &Context) -> Result<ExitCode, Error> {
    let lab = context.wanted()?;
    let entries = actions::plan(&lab)?.entries(&lab)?;
    context.print(&entries, |entries| {
        let row = |entry: &crate::plan::Entry| {
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
        let open = entries.iter().filter(|entry| entry.state == "to do").count();
        table(&["#", "NODE", "ACTION", "STATE", "AFTER"], &rows)
            + &format!("\n{open} of {} to do", rows.len())
    })?;
    Ok(ExitCode::SUCCESS)
}
