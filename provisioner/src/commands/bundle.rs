//! `lab bundle build`: all that an `up` would fetch or build, as one file.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{Context, Error, end};
use crate::{actions, files, lab::Lab, plan, snapshot::pack};

/// Makes the images and layers of the labfile's nodes that are not there yet, and packs all of them.
pub fn build(context: &Context, to: Option<&Path>) -> Result<ExitCode, Error> {
    let mut topology = context.wanted()?.topology;
    let name = topology.name.clone();
    let target = to.map_or_else(|| format!("{name}.labbundle").into(), PathBuf::from);
    // A lab that is never brought up, whatever there is of the labfile's own.
    topology.name = format!(".bundle-{name}");
    let lab = Lab::new(&context.paths, topology, context.progress.clone())?;
    let _lock = lab.lock()?;
    let made = make(&lab, &name, &target);
    for dir in [&lab.dirs.sockets, &lab.dirs.dir] {
        let action = format!("remove {}", dir.display());
        files::remove(dir).map_err(|source| Error::Io { action, source })?;
    }
    made?;
    context.progress.say(&format!(
        "wrote {}; next, on a machine with lab and this labfile: `lab up --offline {}`",
        target.display(),
        target.file_name().unwrap_or_default().to_string_lossy()
    ));
    Ok(ExitCode::SUCCESS)
}

fn make(lab: &Lab, name: &str, target: &Path) -> Result<(), Error> {
    if target.symlink_metadata().is_ok() {
        return Err(pack::Error::Exists(target.into()).into());
    }
    for item in actions::plan(lab)?.items.iter().filter(|item| item.action.outlives_lab()) {
        plan::run_one(item, lab)?;
    }
    let task = lab.progress.begin(name, "pack the bundle");
    let built = pack::bundle::build(lab, name, target, &task);
    end(task, built)
}
