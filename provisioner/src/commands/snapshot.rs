//! `lab snapshot`: the whole running lab, saved and restored.

use std::{path::Path, process::ExitCode};

use super::{Context, Error, ago, end, mib, status, table};
use crate::{
    capacity,
    cli::SnapshotAction,
    lab::Lab,
    progress::Task,
    snapshot::{self, pack},
};

/// Saves, restores, lists, removes, exports or imports snapshots.
pub fn run(context: &Context, action: SnapshotAction) -> Result<ExitCode, Error> {
    if let SnapshotAction::Import { path, folder } = &action {
        return import(context, path, folder.as_deref());
    }
    let mut lab = context.existing()?;
    match action {
        SnapshotAction::Ls => list(context, &lab)?,
        SnapshotAction::Save { name } => {
            let _lock = lab.lock()?;
            told(&lab, &format!("save snapshot {name}"), |task| snapshot::save(&lab, &name, task))?;
        }
        SnapshotAction::Restore { name } => {
            let _lock = lab.lock()?;
            restore(&mut lab, &name)?;
            status::print(context, &lab)?;
        }
        SnapshotAction::Rm { names } => {
            let _lock = lab.lock()?;
            names.iter().try_for_each(|name| snapshot::remove(&lab, name))?;
        }
        SnapshotAction::Export { name, path } => {
            let _lock = lab.lock()?;
            told(&lab, &format!("export snapshot {name}"), |task| pack::export(&lab, &name, &path, task))?;
        }
        // Without a lab.
        SnapshotAction::Import { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a lab from an exported snapshot.
fn import(context: &Context, file: &Path, folder: Option<&Path>) -> Result<ExitCode, Error> {
    let reader = pack::Reader::open(file)?;
    let (lab, name) = (reader.table().lab.clone(), reader.table().snapshot.clone().unwrap_or_default());
    let folder = folder.map_or_else(|| lab.clone().into(), Path::to_path_buf);
    let task = context.progress.begin(&lab, &format!("import snapshot {name}"));
    let imported = pack::import(&context.paths, reader, &folder, &task);
    let imported = end(task, imported)?;
    let fork = imported.fork.map(|number| format!("--fork {number} ")).unwrap_or_default();
    context.progress.say(&format!(
        "next: `cd {}`, then `lab {fork}snapshot restore {name}` brings it up",
        imported.folder.display()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Puts the lab away.
pub fn suspend(context: &Context) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let _lock = lab.lock()?;
    told(&lab, "suspend", |task| snapshot::suspend(&lab, task))?;
    Ok(ExitCode::SUCCESS)
}

/// Goes on with a lab that was put away.
pub fn resume(context: &Context) -> Result<ExitCode, Error> {
    let mut lab = context.existing()?;
    let _lock = lab.lock()?;
    restore(&mut lab, snapshot::SUSPENDED)?;
    status::print(context, &lab)?;
    Ok(ExitCode::SUCCESS)
}

/// Does what comes before everything else that brings a lab up: a restoring that was interrupted, and what was suspended.
/// What the labfile says comes after it.
pub fn go_on(lab: &mut Lab) -> Result<(), Error> {
    let name = match snapshot::is_unfinished(&lab.dirs)? {
        Some(name) => name,
        None if snapshot::is_suspended(lab) => snapshot::SUSPENDED.into(),
        None => return Ok(()),
    };
    let wanted = lab.topology.clone();
    let restored = restore(lab, &name);
    lab.topology = wanted;
    match restored {
        // Then from the disks.
        Err(Error::Snapshot(error @ snapshot::Error::NotRestored { .. })) => {
            lab.progress.warn(&error.to_string());
            Ok(())
        }
        other => other,
    }
}

/// Restores a snapshot, with progress.
pub fn restore(lab: &mut Lab, name: &str) -> Result<(), Error> {
    let what = if name == snapshot::SUSPENDED { "resume".into() } else { format!("restore snapshot {name}") };
    capacity::check(lab)?;
    let task = lab.progress.begin(&lab.topology.name, &what);
    let restored = snapshot::restore(lab, name, &task);
    end(task, restored)
}

fn told<E: Into<Error>>(
    lab: &Lab,
    what: &str,
    run: impl FnOnce(&Task) -> Result<(), E>,
) -> Result<(), Error> {
    let task = lab.progress.begin(&lab.topology.name, what);
    let done = run(&task);
    end(task, done)
}

fn list(context: &Context, lab: &Lab) -> Result<(), Error> {
    context.print(&snapshot::list(lab)?, |entries| {
        let row = |entry: &snapshot::Entry| {
            vec![
                entry.name.clone(),
                ago(entry.created_s),
                entry.nodes.join(", "),
                mib(entry.memory_bytes),
                mib(entry.disk_bytes),
            ]
        };
        table(
            &["NAME", "MADE", "RUNNING NODES", "MEMORY", "DISK"],
            &entries.iter().map(row).collect::<Vec<_>>(),
        )
    })
}
