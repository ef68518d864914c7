//! `lab init`, `lab validate`, `lab schema`: working on the labfile.

use std::{fs::OpenOptions, io::Write, process::ExitCode};

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
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open("lab.toml")
        .and_then(|mut file| file.write_all(template.text.as_bytes()));
    written.map_err(|source| Error::Io { action: "write lab.toml here".into(), source })?;
    context.progress.say("wrote lab.toml; next: read it, then `lab up`");
    Ok(ExitCode::SUCCESS)
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
