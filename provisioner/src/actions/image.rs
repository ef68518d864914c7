//! The image that nodes stand on: built if the store has none, and pinned in the lab by hard links.

use std::{fs, path::PathBuf};

use super::{Action, Error};
use crate::{lab::Lab, progress::Task};

/// Makes sure that an image is there and pinned.
pub struct Image {
    /// Its name.
    pub name: String,
}

/// Folder below the lab's `images/` for the store's present image of this name.
pub fn folder(manifest: &lab_images::manifest::Manifest) -> String {
    let digest = manifest.digest();
    format!("{}-{}", manifest.name, digest.get(..12).unwrap_or(&digest))
}

impl Action for Image {
    fn describe(&self) -> String {
        format!("image {}", self.name)
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        // What nodes stand on already is theirs, whatever the store has now.
        let users = lab.topology.nodes.iter().filter(|node| node.image == self.name);
        let mut all = true;
        for node in users {
            all &= lab.record_of(&node.name)?.is_some();
        }
        if all {
            return Ok(true);
        }
        match lab.store.get(&self.name) {
            Ok(image) => Ok(lab.pinned(&folder(&image.manifest)).join("manifest.json").exists()),
            Err(_) => Ok(false),
        }
    }

    fn inputs(&self, lab: &Lab) -> Option<String> {
        // What is to be built will be another one.
        Some(lab.store.get(&self.name).map_or_else(|_| String::new(), |image| image.manifest.digest()))
    }

    fn outlives_lab(&self) -> bool {
        true
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let image = match lab.store.get(&self.name) {
            Err(_) if lab.offline => return Err(Error::Offline(format!("the image {}", self.name))),
            _ => lab.store.ensure(&self.name, &mut |step| task.detail(step))?,
        };
        let target = lab.pinned(&folder(&image.manifest));
        let io = |action: &'static str, path: PathBuf| move |source| Error::Io { action, path, source };
        let parent = lab.dirs.dir.join("images");
        fs::create_dir_all(&parent).map_err(io("make the folder", parent.clone()))?;
        let partial = tempfile::tempdir_in(&parent).map_err(io("make a folder in", parent.clone()))?;
        for entry in fs::read_dir(&image.dir).map_err(io("read", image.dir.clone()))? {
            let entry = entry.map_err(io("read", image.dir.clone()))?;
            fs::hard_link(entry.path(), partial.path().join(entry.file_name()))
                .map_err(io("link", entry.path()))?;
        }
        match fs::rename(partial.path(), &target) {
            Ok(()) => {
                // Renamed away: nothing is left to remove.
                let _ = partial.keep();
                Ok(())
            }
            Err(_) if target.join("manifest.json").exists() => Ok(()),
            Err(source) => Err(Error::Io { action: "make the folder", path: target, source }),
        }
    }
}
