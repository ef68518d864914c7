//! The labfile: from its text to the [`topology::Topology`] that it means, or to everything that is wrong with it.
//!
//! - `file`: the types of the file as written; `schema`: the JSON Schema made from them
//! - `shape`: structure against that schema; `diagnostic`, `report`, `spell`: how errors are told
//! - `addresses`, `network`, `nodes`, `forward`, `size`, `names`, `mac`, `scripts`, `stacks`: what each part means
//! - `templates`: the example labfiles inside the binary
//!
//! What a stack consists of is in [`crate::stack`]; what is done about a topology is not here.

mod addresses;
pub mod diagnostic;
mod file;
mod forward;
mod mac;
mod names;
mod network;
mod nodes;
pub(crate) mod report;
pub(crate) mod schema;
mod scripts;
pub(crate) mod shape;
mod size;
pub(crate) mod spell;
mod stacks;
pub mod templates;
#[cfg(test)]
mod tests;
pub mod topology;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

pub use diagnostic::{Diagnostic, Diagnostics, Position};
pub use file::At;
pub use forward::parse_forward;
pub use names::is_label;
use report::Report;
pub use schema::schema;
pub use size::show as show_size;
pub use templates::templates;
use topology::Topology;

/// Longest labfile, script of a step, or stack file, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// Reads and checks the labfile at `path`. Nothing but files is looked at: whether images exist, ports are free and
/// memory suffices is for `up` to see.
///
/// # Errors
/// Everything that is wrong with it, with places and advice.
pub fn load(path: &Path) -> Result<Topology, Diagnostics> {
    let text = read_text(path, "labfile", "name another file with `-f FILE`, or make one with `lab init`")?;
    let absolute =
        fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned());
    parse(&text, path, absolute)
}

/// Checks the text of a labfile that is shown as `shown` in errors and lies at `absolute`, beside its scripts and
/// stacks.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, shown: &Path, absolute: PathBuf) -> Result<Topology, Diagnostics> {
    let mut report = Report::new(shown.to_owned(), text);
    match topology(text, absolute, &mut report) {
        Some(topology) if report.is_clean() => Ok(topology),
        _ => Err(Diagnostics { errors: report.into_errors() }),
    }
}

fn topology(text: &str, labfile: PathBuf, report: &mut Report<'_>) -> Option<Topology> {
    let mut document = shape::parse(text, report)?;
    if let Some((key, _)) = document.get_mut().remove_entry("link") {
        let message = "`[[link]]` is not supported by this version of lab".to_owned();
        report.error(
            Some(key.span()),
            "link",
            message,
            "remove it: links have neither delay nor loss for now",
        );
    }
    let file: file::File = shape::read(document, schema::structure(), report)?;
    let folder = labfile.parent().unwrap_or(Path::new("/")).to_owned();

    let name = names::lab(&file, report);
    let network = network::resolve(&file.network, report);
    let nodes = nodes::resolve(&file, name.as_deref(), network.as_ref(), report);
    let stacks = stacks::resolve(&file.stack, &folder, report);
    if let Some(network) = &network {
        addresses::check(&file, &folder, network, &nodes, report);
    }
    let places = scripts::Places::of(&nodes);
    let steps = scripts::steps(&file.step, &places, &folder, report);
    let checks = scripts::checks(&file.check, &places, &folder, report);
    Some(Topology { name: name?, labfile, network: network?, nodes, stacks, steps, checks })
}

/// The files that a right labfile needs, as it names them, relative to its folder: the scripts of its steps and checks, what
/// the options of its stacks name, and all that is in the folders of its own stacks.
///
/// # Errors
/// As [`load`].
pub fn companions(path: &Path) -> Result<Vec<PathBuf>, Diagnostics> {
    let topology = load(path)?;
    let text = read_text(path, "labfile", "name another file with `-f FILE`")?;
    let mut report = Report::new(path.to_owned(), &text);
    let file: Option<file::File> = shape::parse(&text, &mut report)
        .and_then(|document| shape::read(document, schema::structure(), &mut report));
    let file = file.unwrap_or_default();
    let scripts = file.step.iter().map(|step| &step.get().script);
    let scripts = scripts.chain(file.check.iter().map(|check| &check.get().script));
    let mut found: Vec<PathBuf> = scripts.flatten().map(|script| script.get().into()).collect();
    let folder = topology.labfile.parent().unwrap_or(Path::new("/"));
    for (name, table) in &file.stack {
        if let Some(definition) = crate::stack::find(name.get(), folder) {
            found.extend(stacks::files(&definition?, table).into_iter().map(PathBuf::from));
        }
    }
    for file in topology.steps.iter().flat_map(|step| &step.files).map(Path::new) {
        if folder.join(file).is_dir() {
            files_below(folder, file, &mut found)?;
        } else {
            found.push(file.into());
        }
    }
    for stack in topology.stacks.iter().filter(|stack| stack.folder.is_some()) {
        files_below(folder, &Path::new("stacks").join(&stack.name), &mut found)?;
    }
    Ok(found)
}

/// Adds the files below a folder of `base`.
fn files_below(base: &Path, below: &Path, found: &mut Vec<PathBuf>) -> Result<(), Diagnostics> {
    let unreadable = |error: std::io::Error| {
        let message = format!("the folder can't be read: {error}");
        Diagnostics::of_file(base.join(below), message, "look at its permissions")
    };
    let mut entries: Vec<_> =
        fs::read_dir(base.join(below)).and_then(Iterator::collect).map_err(unreadable)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = below.join(entry.file_name());
        match entry.file_type().map_err(unreadable)? {
            kind if kind.is_dir() => files_below(base, &path, found)?,
            // Also where a link leads to one.
            _ if base.join(&path).is_file() => found.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// Reads a text file whose kind is `what`; `missing` is the advice where there is none.
///
/// # Errors
/// It can't be read, is no regular file, is longer than [`MAX_BYTES`], or isn't UTF-8.
pub(crate) fn read_text(path: &Path, what: &str, missing: &str) -> Result<String, Diagnostics> {
    let fail = |message: String, help: &str| Diagnostics::of_file(path.to_owned(), message, help);
    let unreadable =
        |error: std::io::Error| fail(format!("the {what} can't be read: {error}"), "look at its permissions");
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(fail(format!("there is no such {what}"), missing));
        }
        Err(error) => return Err(unreadable(error)),
    };
    if !metadata.is_file() {
        return Err(fail(format!("the {what} is not a regular file"), missing));
    }
    let mut bytes = Vec::new();
    let limited = fs::File::open(path).map(|file| file.take(MAX_BYTES + 1));
    limited.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(fail(format!("the {what} is larger than 1 MiB"), "is it the right file?"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        let text = String::from_utf8_lossy(error.as_bytes());
        let mut report = Report::new(path.to_owned(), &text);
        let message = format!("the {what} is not UTF-8 text");
        report.error(Some(place..place), "", message, "save it as UTF-8, or remove what is no text");
        Diagnostics { errors: report.into_errors() }
    })?;
    // As editors on Windows leave it: a shell would take the carriage return for a part of the last word.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    Ok(text.replace("\r\n", "\n"))
}
