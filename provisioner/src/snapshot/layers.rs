//! Layers: frozen overlays of disks, in the lab's folder `layers`. A disk is frozen by giving its file a second name there
//! and laying a new overlay in its place; nothing is copied. A machine that runs meanwhile stands still, and goes on in the
//! new overlay.
//!
//! Each layer has a folder of its own, so that it lies as deep as a node's disks do: its header names the file below it by
//! the way there, which is the same for both.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use lab_vmm::{config::DiskFormat, qcow2};

use super::{Error, io};
use crate::{actions, json_file, lab::Lab, paths::LabPaths, state};

/// Longest chain of files that is frozen as it is, the disk itself included: `lab-vmm` opens chains of 32.
const DEPTH_MAX: usize = 20;
/// Longest chain that is followed.
const CHAIN_MAX: usize = 32;
/// Of a longer one than [`DEPTH_MAX`], how many files at the bottom stay: the image, and layers that other nodes stand on.
const KEPT: usize = 8;

fn folder(dirs: &LabPaths) -> PathBuf {
    dirs.dir.join("layers")
}

/// The file of a layer.
pub(super) fn path(dirs: &LabPaths, id: &str) -> PathBuf {
    folder(dirs).join(id).join("overlay.qcow2")
}

/// Freezes a disk; the layer's id. Interrupted at any point, the disk holds what it held. A disk that was frozen often
/// becomes one file with most of those below it, which takes as long as copying them.
pub fn freeze(dirs: &LabPaths, disk: &Path) -> Result<String, Error> {
    let depth = chain(disk)?.len();
    let id = actions::random_id().map_err(Box::new)?;
    let layer = path(dirs, &id);
    crate::paths::private_dir(&folder(dirs).join(&id))?;
    if depth > DEPTH_MAX {
        qcow2::flatten(disk, depth - KEPT, &layer)?;
    } else {
        fs::hard_link(disk, &layer).map_err(io("link", &layer))?;
    }
    chain(&layer)?;
    lay(dirs, &id, disk)?;
    Ok(id)
}

/// Lays an empty overlay on a layer, in the place of `disk`.
pub fn lay(dirs: &LabPaths, id: &str, disk: &Path) -> Result<(), Error> {
    let layer = path(dirs, id);
    let size = qcow2::info(&layer)?.size_bytes;
    actions::fresh_disk(disk, |partial| qcow2::create_overlay(partial, &layer, DiskFormat::Qcow2, size))
        .map_err(|error| Box::new(error).into())
}

/// Makes sure that a layer outlives a power cut.
pub fn sync(dirs: &LabPaths, id: &str) -> Result<(), Error> {
    let layer = path(dirs, id);
    fs::File::open(&layer).and_then(|file| file.sync_all()).map_err(io("sync", &layer))
}

/// The files that a disk stands on, itself first. All of them are there.
pub(super) fn chain(disk: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut chain = vec![disk.to_path_buf()];
    let mut next = qcow2::info(disk)?.backing;
    while let Some((path, format)) = next {
        next = match format {
            Some(DiskFormat::Qcow2) if chain.len() <= CHAIN_MAX => qcow2::info(&path)?.backing,
            _ => {
                fs::metadata(&path).map_err(io("find", &path))?;
                None
            }
        };
        chain.push(path);
    }
    Ok(chain)
}

/// The layers of these ids with all layers below them: their files, each once.
pub fn below<'a>(dirs: &LabPaths, ids: impl Iterator<Item = &'a String>) -> Result<BTreeSet<PathBuf>, Error> {
    let mut all = BTreeSet::new();
    for id in ids {
        all.extend(layers_of(dirs, &path(dirs, id))?);
    }
    Ok(all)
}

/// Of a disk's chain, the files that are layers.
fn layers_of(dirs: &LabPaths, disk: &Path) -> Result<Vec<PathBuf>, Error> {
    let Ok(folder) = folder(dirs).canonicalize() else { return Ok(Vec::new()) };
    let files = chain(disk)?.into_iter().filter_map(|path| path.canonicalize().ok());
    Ok(files.filter(|path| path.starts_with(&folder)).collect())
}

/// Removes the layers that no disk and no snapshot stands on.
pub fn prune(lab: &Lab) -> Result<(), Error> {
    let dirs = &lab.dirs;
    let mut used = BTreeSet::new();
    for node in state::nodes_on_disk(dirs) {
        let dir = dirs.node(&node);
        for disk in (0..).map(|index| dir.join(actions::disk_file(index))).take_while(|disk| disk.exists()) {
            used.extend(layers_of(dirs, &disk)?);
        }
    }
    for name in super::names(dirs) {
        let record = super::read(lab, &name)?;
        used.extend(below(dirs, record.nodes.values().flat_map(|node| &node.layers))?);
    }
    let used: BTreeSet<_> = used.iter().filter_map(|file| file.parent()).collect();
    let Ok(folder) = folder(dirs).canonicalize() else { return Ok(()) };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !used.contains(&*entry.path()) {
            fs::remove_dir_all(entry.path()).map_err(io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// The steps that are recorded for a node.
pub fn steps(dirs: &LabPaths, node: &str) -> Result<state::StepRecords, json_file::Error> {
    Ok(json_file::read(&dirs.node(node).join("steps.json"))?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_disk_has_an_overlay_in_its_place() {
        let home = tempfile::tempdir().unwrap();
        let dirs = LabPaths { dir: home.path().join("lab"), sockets: home.path().join("run") };
        fs::create_dir_all(dirs.node("n")).unwrap();
        fs::create_dir_all(dirs.dir.join("images/i")).unwrap();
        let (base, disk) = (dirs.dir.join("images/i/root.img"), dirs.node("n").join("disk0.qcow2"));
        fs::write(&base, [0; 4096]).unwrap();
        qcow2::create_overlay(&disk, &base, DiskFormat::Raw, 1 << 20).unwrap();
        let before = fs::read(&disk).unwrap();
        let first = freeze(&dirs, &disk).unwrap();
        let second = freeze(&dirs, &disk).unwrap();
        assert_eq!(fs::read(path(&dirs, &first)).unwrap(), before);
        assert_eq!(layers_of(&dirs, &disk).unwrap(), [path(&dirs, &second), path(&dirs, &first)]);
        assert_eq!(below(&dirs, [&second, &first].into_iter()).unwrap().len(), 2);
        // Moved together, they hold together.
        let moved = LabPaths { dir: home.path().join("other"), ..dirs.clone() };
        fs::rename(&dirs.dir, &moved.dir).unwrap();
        let disk = moved.node("n").join("disk0.qcow2");
        assert_eq!(layers_of(&moved, &disk).unwrap().len(), 2);
        // However often it is frozen, no chain gets too long, and what a guest wrote stays.
        let mut longest = 0;
        for _ in 0..3 * DEPTH_MAX {
            freeze(&moved, &disk).unwrap();
            longest = longest.max(chain(&disk).unwrap().len());
        }
        assert_eq!(longest, DEPTH_MAX + 1);
        assert!(layers_of(&moved, &disk).unwrap().ends_with(&[path(&moved, &second), path(&moved, &first)]));
    }
}
