//! `lab init`, `lab validate`, `lab schema`: working on the labfile.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::ExitCode,
};

use lab_images::{definition::Definition, store::Store};

use super::{Context, Error, table, write_out};
use crate::labfile::{self, spell::advice, templates, topology::Topology};

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
    for line in unknown_images(&topology, &Store::open(&context.paths.images())) {
        context.progress.warn(&line);
    }
    context.print(&topology, |topology| {
        format!("{} is right: the lab `{}`, {} nodes", path.display(), topology.name, topology.nodes.len())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A line for each image that the topology names, and that is neither in the store nor one that lab can build.
fn unknown_images(topology: &Topology, store: &Store) -> Vec<String> {
    let listed = store.list().unwrap_or_default();
    let listed = listed.iter().map(|(name, _)| name.as_str());
    let known: BTreeSet<&str> = Definition::builtin_names().into_iter().chain(listed).collect();
    let known: Vec<&str> = known.into_iter().collect();
    let named: BTreeSet<&str> = topology.nodes.iter().map(|node| node.image.as_str()).collect();
    named
        .into_iter()
        .filter(|name| !known.contains(name))
        .map(|name| {
            let nodes = topology.nodes.iter().filter(|node| node.image == name);
            let nodes: Vec<&str> = nodes.map(|node| node.name.as_str()).collect();
            format!(
                "there is no image `{name}` ({}): {}; `lab image import` and `lab image build FILE` make others",
                nodes.join(", "),
                advice(name, &known, "there are")
            )
        })
        .collect()
}

/// Prints the labfile's JSON Schema.
pub fn schema() -> Result<ExitCode, Error> {
    let text = serde_json::to_string_pretty(&labfile::schema());
    write_out(&text.map_err(|e| Error::Io { action: "print the schema".into(), source: e.into() })?)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_nobody_has_is_told_with_its_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let text = "name = \"x\"\n[node.a]\nimage = \"debain-13\"\n[node.b]\nimage = \"mine\"\n[node.c]\n";
        let topology = labfile::parse(text, Path::new("lab.toml"), dir.path().join("lab.toml")).unwrap();
        let store = Store::open(&dir.path().join("images"));
        let lines = unknown_images(&topology, &store);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("`debain-13` (a): did you mean `debian-13`?"), "{}", lines[0]);
        assert!(lines[1].contains("`mine` (b): there are: `debian-12`, `debian-13`,"), "{}", lines[1]);
        // Also a damaged one is there: `up` tells what is wrong with it.
        std::fs::create_dir_all(dir.path().join("images/mine")).unwrap();
        assert_eq!(unknown_images(&topology, &store).len(), 1);
    }
}
