//! `lab snapshot import`: what was unpacked becomes a lab that has the snapshot, and nothing else yet, and its labfile with
//! what belongs to it gets a folder.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use lab_images::manifest::Manifest;

use super::{
    super::{FORMAT, Record, layers},
    Error,
    format::Reader,
    table::{FOLDER, LABFILE, Table},
    unpack::{Place, clear},
};
use crate::{
    fork, json_file, labfile, lock,
    paths::{LabPaths, Paths},
    progress::Task,
    state::{LabState, nodes_on_disk},
};

/// Name of a file while it is put into the labfile's folder.
const PARTIAL: &str = ".lab-import.part";

/// A lab that was imported.
#[derive(Debug)]
pub struct Imported {
    /// The folder with its labfile.
    pub folder: PathBuf,
    /// Its number, if it is a fork.
    pub fork: Option<u32>,
}

/// Imports an exported snapshot, with its labfile in `folder`.
pub fn import(paths: &Paths, mut reader: Reader, folder: &Path, task: &Task) -> Result<Imported, Error> {
    let table = reader.table().clone();
    let Some(snapshot) = &table.snapshot else { return Err(Error::IsBundle(reader.path().into())) };
    let dirs = paths.lab(&table.lab);
    refuse_existing(&dirs, &table.lab)?;
    fits(folder, "", &table)?;
    let place = Place::new(paths.labs().join(format!(".{}.import", table.lab)));
    let _lock = place.hold()?;
    let lab = LabPaths { dir: place.lab(), ..dirs.clone() };
    let mut record = place.unpack_checked(&mut reader, task, || check(&lab, &table, snapshot))?;
    task.detail("put it in its place");
    let folder = lay(&place.labfile(), folder, &table)?;
    let topology = &mut record.state.topology;
    topology.labfile = folder.join(LABFILE);
    for stack in topology.stacks.iter_mut().filter(|stack| stack.folder.is_some()) {
        stack.folder = Some(folder.join("stacks").join(&stack.name));
    }
    json_file::write(&super::super::folder(&lab, snapshot).join("snapshot.json"), &record)?;
    LabState { came_up: true, ..record.state.clone() }.write(&lab)?;
    take_place(&place, &dirs, &table.lab)?;
    place.remove()?;
    Ok(Imported { folder, fork: record.state.fork })
}

/// There must be no lab of this name.
fn refuse_existing(dirs: &LabPaths, name: &str) -> Result<(), Error> {
    let remedy = match LabState::read(dirs)? {
        Some(state) => {
            let fork = state.fork.map(|number| format!("--fork {number} ")).unwrap_or_default();
            format!("`lab {fork}-f {} destroy` removes it", state.topology.labfile.display())
        }
        None if nodes_on_disk(dirs).is_empty() => return Ok(()),
        None => format!("look at {}, and remove it", dirs.dir.display()),
    };
    Err(Error::LabExists { lab: name.into(), remedy })
}

/// The unpacked lab gets its name.
fn take_place(place: &Place, dirs: &LabPaths, name: &str) -> Result<(), Error> {
    let write = |source| Error::write(&dirs.dir, source);
    let mut held = None;
    if dirs.dir.exists() {
        // Of an `up` that got nowhere: nobody may be at work in it, nor begin.
        held = lock::try_lock(&dirs.lock()).map_err(write)?;
        if held.is_none() {
            return Err(Error::Busy(dirs.dir.clone()));
        }
        refuse_existing(dirs, name)?;
        let old = place.root().join("old");
        clear(&old)?;
        fs::rename(&dirs.dir, &old).map_err(write)?;
    }
    fs::rename(place.lab(), &dirs.dir).map_err(write)?;
    drop(held);
    let labs = dirs.dir.parent().unwrap_or(Path::new("/"));
    File::open(labs).and_then(|labs| labs.sync_all()).map_err(write)
}

/// What was unpacked must be a lab with a snapshot, and lead to no other file of this machine: names in it become paths.
fn check(lab: &LabPaths, table: &Table, snapshot: &str) -> Result<Record, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let path = super::super::folder(lab, snapshot).join("snapshot.json");
    let record: Record = json_file::read(&path).map_err(|e| text(&e))?.ok_or("it has no snapshot.json")?;
    if record.format != FORMAT {
        return Err(format!(
            "the snapshot has format {}, and this version of lab knows format {FORMAT}",
            record.format
        ));
    }
    let state = &record.state;
    let number = state.fork.map(|number| format!("-{number}"));
    if state.topology.name != table.lab
        || number.is_some_and(|number| !table.lab.ends_with(&number))
        || state.fork.is_some_and(|number| !fork::NUMBERS.contains(&number))
    {
        return Err("the snapshot is of another lab".into());
    }
    let known = |name: &str| state.topology.nodes.iter().any(|node| node.name == name);
    let names = state.topology.nodes.iter().map(|node| &node.name);
    if let Some(name) = names.chain(record.nodes.keys()).find(|name| !labfile::is_label(name) || !known(name))
    {
        return Err(format!("`{}` is no node", name.escape_debug()));
    }
    let inside = lab.dir.canonicalize().map_err(|e| text(&e))?;
    for node in record.nodes.values() {
        let image = &node.record.image;
        let has = |path: String| table.files.iter().any(|file| file.path == path);
        if image.contains('/') || !has(format!("images/{image}/manifest.json")) {
            return Err(format!("the image `{}` is missing", image.escape_debug()));
        }
        check_image(&lab.dir.join("images").join(image))?;
        for id in &node.layers {
            if id.contains('/') || !has(format!("layers/{id}/overlay.qcow2")) {
                return Err(format!("the layer `{}` is missing", id.escape_debug()));
            }
            check_disk(&layers::path(lab, id), &inside)?;
        }
    }
    Ok(record)
}

/// An image's manifest must name no files elsewhere; gives it.
pub(super) fn check_image(folder: &Path) -> Result<Manifest, String> {
    let manifest: Option<Manifest> =
        json_file::read(&folder.join("manifest.json")).map_err(|error| error.to_string())?;
    let manifest = manifest.ok_or("an image's manifest is missing")?;
    let elsewhere = |file: &String| file.contains('/') || file == "..";
    if manifest.files.keys().chain([&manifest.root_file]).any(elsewhere) {
        return Err(format!("the image {} names files elsewhere", folder.display()));
    }
    Ok(manifest)
}

/// A disk must lie on no file outside of a folder, which is given by its real path.
pub(super) fn check_disk(disk: &Path, inside: &Path) -> Result<(), String> {
    for file in layers::chain(disk).map_err(|error| error.to_string())? {
        if !file.canonicalize().is_ok_and(|file| file.starts_with(inside)) {
            return Err(format!("a disk lies on {}, which is no file of the lab", file.display()));
        }
    }
    Ok(())
}

/// Whether a folder is not there, or has nothing but what an import that was cut off has put there.
fn fits(folder: &Path, below: &str, table: &Table) -> Result<(), Error> {
    let taken = || Error::Folder(folder.into());
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Err(taken()),
        other => other.map_err(|source| Error::read(folder, source))?,
    };
    for entry in entries {
        let entry = entry.map_err(|source| Error::read(folder, source))?;
        let kind = entry.file_type().map_err(|source| Error::read(folder, source))?;
        let name = entry.file_name();
        let path = format!("{below}{}", name.to_str().ok_or_else(taken)?);
        let full = format!("{FOLDER}/{path}");
        let length = entry.metadata().map_or(u64::MAX, |metadata| metadata.len());
        let ours = |kind: fs::FileType| {
            kind.is_file()
                && (path == PARTIAL
                    || table.files.iter().any(|file| file.path == full && file.length == length))
        };
        if kind.is_dir() && table.files.iter().any(|file| file.path.starts_with(&format!("{full}/"))) {
            fits(&entry.path(), &format!("{path}/"), table).map_err(|error| match error {
                Error::Folder(_) => taken(),
                other => other,
            })?;
        } else if !ours(kind) {
            return Err(taken());
        }
    }
    Ok(())
}

/// Puts the labfile and what belongs to it into the user's folder; gives the folder's real path.
fn lay(from: &Path, folder: &Path, table: &Table) -> Result<PathBuf, Error> {
    fs::create_dir_all(folder).map_err(|source| Error::write(folder, source))?;
    let folder = &folder.canonicalize().map_err(|source| Error::read(folder, source))?;
    fits(folder, "", table)?;
    let partial = folder.join(PARTIAL);
    clear(&partial)?;
    for entry in &table.files {
        let Some(path) = entry.path.strip_prefix(FOLDER).and_then(|rest| rest.strip_prefix('/')) else {
            continue;
        };
        let (from, to) = (from.join(path), folder.join(path));
        if to.exists() {
            // Of an import that was cut off, or somebody else's.
            match same(&from, &to) {
                Ok(true) => continue,
                _ => return Err(Error::Folder(folder.clone())),
            }
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(|source| Error::write(parent, source))?;
        }
        fs::copy(&from, &partial)
            .and_then(|_| fs::set_permissions(&partial, fs::Permissions::from_mode(entry.mode & 0o755)))
            .and_then(|()| File::open(&partial)?.sync_all())
            .and_then(|()| fs::rename(&partial, &to))
            .map_err(|source| Error::write(&to, source))?;
    }
    Ok(folder.clone())
}

/// Whether two files have the same content.
fn same(one: &Path, other: &Path) -> std::io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    loop {
        first.clear();
        second.clear();
        Read::by_ref(&mut one).take(1 << 16).read_to_end(&mut first)?;
        Read::by_ref(&mut other).take(1 << 16).read_to_end(&mut second)?;
        if first != second {
            return Ok(false);
        }
        if first.is_empty() {
            return Ok(true);
        }
    }
}
