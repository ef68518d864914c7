//! `lab init`, `lab validate`, `lab schema`: working on the labfile.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::ExitCode,
};

use super::{Context, Error, table, write_out};
use crate::labfile::{self, templates};

/// Writes a labfile here, from an example.
pub fn init(context: &Context, from: &str, list: bool) -> Result<ExitCode, Error> {
    if list {
        let rows: Vec<Vec<String>> = templates::templates()
            .iter()
            .map(|template| vec![template.name.into(), template.summary.into()])
            .collect();
        context.print(&rows, |rows| table(&["NAME", "WHAT"], rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    let template = templates::template(from).ok_or_else(|| {
        let names: Vec<&str> = templates::templates().iter().map(|template| template.name).collect();
        Error::Other(format!("there is no example `{from}`: the examples are {}", names.join(", ")))
    })?;
    let failed = |name: &str| {
        let action = format!("write {name} here");
        move |source| Error::Io { action, source }
    };
    // All or nothing, as far as that can be seen before.
    if let Some((name, ..)) =
        template.files.iter().find(|(name, ..)| Path::new(name).symlink_metadata().is_ok())
    {
        return Err(failed(name)(std::io::ErrorKind::AlreadyExists.into()));
    }
    for (name, bytes, executable) in template.files {
        write_new(Path::new(name), bytes, *executable).map_err(failed(name))?;
    }
    let more = match template.files.len() {
        1 => String::new(),
        count => format!(" and {} files beside it", count - 1),
    };
    context.progress.say(&format!("wrote lab.toml{more}; next: read it, then `lab up`"));
    Ok(ExitCode::SUCCESS)
}

fn write_new(path: &Path, bytes: &[u8], executable: bool) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mode = if executable { 0o777 } else { 0o666 };
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(bytes)
}

/// Checks the labfile.
pub fn validate(context: &Context) -> Result<ExitCode, Error> {
    let path = context.labfile()?;
    let topology = labfile::load(&path)?;
    context.print(&topology, |topology| {
        format!("{} is right: the lab `{}`, {} nodes", path.display(), topology.name, topology.nodes.len())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the labfile's JSON Schema.
pub fn schema() -> Result<ExitCode, Error> {
    let text = serde_json::to_string_pretty(&labfile::schema());
    write_out(&text.map_err(|e| Error::Io { action: "print the schema".into(), source: e.into() })?)?;
    Ok(ExitCode::SUCCESS)
}
