//! A node's disks: a qcow2 overlay on its image, and empty ones.

use std::{fs, path::PathBuf};

use lab_vmm::{config::DiskFormat, qcow2};

use super::{Action, Error, Script, image, layer};
use crate::{
    channel, files, json_file,
    lab::Lab,
    labfile::topology::Node,
    layer::{OVERLAY, Store},
    paths,
    progress::Task,
    state::{NodeRecord, StepRecords},
};

/// Makes a node's folder with its disks and keys.
pub struct Disk {
    /// The node.
    pub node: Node,
    /// The steps that layers may have for it, from the image on.
    pub baked: Vec<Script>,
}

/// File name of disk number `index`: 0 is the root disk.
pub fn file_name(index: usize) -> String {
    format!("disk{index}.qcow2")
}

impl Action for Disk {
    fn describe(&self) -> String {
        "make the disk".into()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        let dir = lab.dirs.node(&self.node.name);
        let disks = 1 + self.node.extra_disks_bytes.len();
        Ok(lab.record_of(&self.node.name)?.is_some()
            && (0..disks).all(|index| dir.join(file_name(index)).exists()))
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        let Node { image, disk_bytes, extra_disks_bytes, .. } = &self.node;
        serde_json::to_string(&(image, disk_bytes, extra_disks_bytes)).ok()
    }

    fn run(&self, lab: &Lab, _task: &Task) -> Result<(), Error> {
        let dir = lab.dirs.node(&self.node.name);
        paths::private_dir(&dir).map_err(crate::lab::Error::from)?;
        channel::ensure_key(&dir.join("ssh_host_ed25519_key"))?;
        let record = match lab.record_of(&self.node.name)? {
            Some(record) => record,
            None => {
                let image = lab.store.get(&self.node.image)?;
                let folder = image::folder(&image.manifest);
                // A disk without a record was being made when something ended lab: nothing has run on it.
                let disk = dir.join(file_name(0));
                let size = self.node.disk_bytes.max(image.manifest.root_bytes);
                let (base, format, done) = match self.layer(lab, size)? {
                    Some((layer, done)) => (layer, DiskFormat::Qcow2, done),
                    None => {
                        let root = lab.pinned(&folder).join(&image.manifest.root_file);
                        (root, image.manifest.root_format, StepRecords::new())
                    }
                };
                fresh(&disk, |partial| qcow2::create_overlay(partial, &base, format, size))?;
                remove(&dir.join("vm.json"))?;
                json_file::write(&dir.join("steps.json"), &done)?;
                NodeRecord { image: folder, machine_id: random_id()? }
            }
        };
        for (index, &bytes) in self.node.extra_disks_bytes.iter().enumerate() {
            let disk = dir.join(file_name(index + 1));
            if !disk.exists() {
                fresh(&disk, |partial| qcow2::create_empty(partial, bytes))?;
            }
        }
        Ok(json_file::write(&dir.join("node.json"), &record)?)
    }
}

impl Disk {
    /// The highest layer that is there for the node, now in the lab's folder, and the records of the steps in it.
    fn layer(&self, lab: &Lab, disk_bytes: u64) -> Result<Option<(PathBuf, StepRecords)>, Error> {
        let store = Store::new(lab.paths.home());
        let (_, keys) = layer::keys(lab, &self.node.image, &self.baked)?;
        let count = store.present(&keys, disk_bytes)?;
        let Some(key) = keys.get(..count).and_then(<[String]>::last) else { return Ok(None) };
        let layers = lab.dirs.dir.join("layers");
        store.link(key, &layers)?;
        let done = self.baked.iter().take(count).map(|step| (step.name.clone(), step.digest())).collect();
        Ok(Some((layers.join(key).join(OVERLAY), done)))
    }
}

/// Makes a disk under another name, then gives it its own: it is whole or not there.
pub fn fresh(
    path: &std::path::Path,
    make: impl FnOnce(&std::path::Path) -> Result<(), qcow2::Error>,
) -> Result<(), Error> {
    let partial = path.with_extension("partial");
    remove(&partial)?;
    make(&partial)?;
    let io = |source| Error::Io { action: "make the disk", path: path.into(), source };
    fs::File::open(&partial).and_then(|file| file.sync_all()).map_err(io)?;
    fs::rename(&partial, path).map_err(io)
}

fn remove(path: &std::path::Path) -> Result<(), Error> {
    files::remove(path).map_err(|source| Error::Io { action: "remove", path: path.into(), source })
}

/// A machine id: 32 hexadecimal digits.
pub fn random_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/uuid";
    let text =
        fs::read_to_string(path).map_err(|source| Error::Io { action: "read", path: path.into(), source })?;
    Ok(text.trim().replace('-', ""))
}

/// The format of disk number `index`: all of lab's node disks are qcow2.
pub const FORMAT: DiskFormat = DiskFormat::Qcow2;
