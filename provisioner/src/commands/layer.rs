//! `lab layer`: what baked steps have made of images.

use std::process::ExitCode;

use super::{Context, Error, ago, mib, table};
use crate::{
    cli::LayerAction,
    layer::{Entry, Store},
};

/// Letters of a key that are shown.
const SHOWN: usize = 12;

/// Lists or removes layers.
pub fn run(context: &Context, action: LayerAction) -> Result<ExitCode, Error> {
    let store = Store::new(context.paths.home());
    let gone = match action {
        LayerAction::Ls => {
            list(context, &store)?;
            return Ok(ExitCode::SUCCESS);
        }
        LayerAction::Rm { keys } => {
            // All of them are known before one goes.
            let keys = keys.iter().map(|key| store.find(key)).collect::<Result<Vec<_>, _>>()?;
            let mut gone = Vec::new();
            for key in keys.iter().filter(|key| !key.is_empty()) {
                if !gone.contains(key) {
                    gone.extend(store.remove_with_upper(key)?);
                }
            }
            gone
        }
        LayerAction::Prune => store.prune()?,
    };
    for key in &gone {
        context.progress.say(&format!("removed {}", short(key)));
    }
    if gone.is_empty() {
        context.progress.say("there is nothing to remove: every layer has something that stands on it");
    }
    Ok(ExitCode::SUCCESS)
}

fn short(key: &str) -> &str {
    key.get(..SHOWN).unwrap_or(key)
}

fn list(context: &Context, store: &Store) -> Result<(), Error> {
    context.print(&store.list()?, |entries| {
        if entries.is_empty() {
            return "no layers".into();
        }
        let row = |entry: &Entry| {
            vec![
                short(&entry.key).to_owned(),
                entry.layer.step.clone(),
                entry.layer.parent.as_deref().map_or(entry.layer.image.as_str(), short).to_owned(),
                ago(entry.layer.created_s),
                mib(entry.disk_bytes),
                if entry.used { "yes" } else { "no" }.to_owned(),
            ]
        };
        let rows: Vec<_> = entries.iter().map(row).collect();
        table(&["LAYER", "STEP", "ON", "MADE", "DISK", "IN USE"], &rows)
    })
}
