//! Offline bundles: the images and layers of a lab's nodes, and the files of bundles that its stacks use, as one file. What a
//! baked step downloads is in its layer, so this is all that an `up` fetches or builds.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lab_images::store::Store as Images;
use sha2::{Digest, Sha256};

use super::{
    Error, Reader, export,
    gather::{Gathered, files_of},
    import::{check_disk, check_image},
    table::{BUNDLES, FORMAT, Table},
    unpack::{Place, clear},
};
use crate::{
    actions,
    bundle::SUMS,
    files::hex,
    json_file,
    lab::Lab,
    layer::{Layer, OVERLAY, Store as Layers},
    paths::{Paths, private_dir},
    progress::Task,
};

/// Writes what an `up` of the lab needs to a file that is not there yet. Images and layers have to be there.
pub fn build(lab: &Lab, name: &str, file: &Path, task: &Task) -> Result<(), Error> {
    let action = |error: actions::Error| Error::Action(Box::new(error));
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    let mut add = |path: String, source: PathBuf| {
        if !found.iter().any(|(known, _)| *known == path) {
            found.push((path, source));
        }
    };
    let layers = lab.paths.home().join("layers");
    for node in &lab.topology.nodes {
        let image = lab.store.get(&node.image)?;
        let folder = actions::image_folder(&image.manifest);
        for source in files_of(&image.dir)? {
            let file = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
            add(format!("images/{folder}/{file}"), source);
        }
        let (keys, steps): (Vec<_>, Vec<_>) =
            actions::layer_keys(lab, node).map_err(action)?.into_iter().unzip();
        let size = node.disk_bytes.max(image.manifest.root_bytes);
        let there = Layers::new(lab.paths.home()).present(&keys, size)?;
        if let Some(step) = steps.into_iter().nth(there) {
            return Err(Error::NoLayer(step));
        }
        for key in keys {
            for file in ["layer.json", OVERLAY] {
                add(format!("layers/{key}/{file}"), layers.join(&key).join(file));
            }
        }
    }
    let mut sums = String::new();
    for used in &lab.topology.stacks {
        for file in actions::bundle_files(lab, used).map_err(action)? {
            sums += &format!("{}  {}\n", file.sha256, file.file_name());
            add(format!("{BUNDLES}/{}", file.file_name()), file.path);
        }
    }
    let write = |source| Error::write(file, source);
    let list = tempfile::NamedTempFile::new().map_err(write)?;
    if !sums.is_empty() {
        fs::write(list.path(), &sums).map_err(write)?;
        add(format!("{BUNDLES}/{SUMS}"), list.path().into());
    }
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    let table = Table {
        format: FORMAT,
        lab_version: env!("CARGO_PKG_VERSION").into(),
        lab: name.into(),
        snapshot: None,
        // An earlier try of the same contents is gone on with.
        created_s: now.map_or(0, |now| now.as_secs()) / 86400 * 86400,
        data_bytes: 0,
        files: Vec::new(),
    };
    export::write(&Gathered::of(table, found)?, file, task)
}

/// Takes in what a bundle has and LAB_HOME has not: its images in the place of others of the same names, its layers, and
/// its files as `LAB_HOME/bundles/offline-LAB`.
pub fn take_in(paths: &Paths, file: &Path, task: &Task) -> Result<(), Error> {
    let mut reader = Reader::open(file)?;
    let table = reader.table().clone();
    if table.snapshot.is_some() {
        return Err(Error::IsSnapshot(file.into()));
    }
    let home = Home { paths, bundles: paths.offline_bundle(&table.lab) };
    if home.has_all(&table)? {
        return Ok(());
    }
    let place = Place::new(paths.home().join(".offline.import"));
    let _lock = place.hold()?;
    place.unpack_checked(&mut reader, task, || check(&place.lab(), &table))?;
    task.detail("put it in its place");
    home.take(&place.lab(), &table)?;
    place.remove()
}

/// The folders of one kind in a table.
fn folders<'t>(table: &'t Table, kind: &'t str) -> Vec<&'t str> {
    let mut found: Vec<&str> = table
        .files
        .iter()
        .filter_map(|file| file.path.strip_prefix(kind)?.strip_prefix('/')?.split_once('/'))
        .map(|(folder, _)| folder)
        .collect();
    found.dedup();
    found
}

/// What was unpacked must be whole images and layers that stand on each other and on nothing else of this machine.
fn check(root: &Path, table: &Table) -> Result<(), String> {
    let inside = root.canonicalize().map_err(|error| error.to_string())?;
    let images = folders(table, "images");
    for image in &images {
        let manifest = check_image(&root.join("images").join(image))?;
        if actions::image_folder(&manifest) != **image {
            return Err(format!("the image `{}` is another one", image.escape_debug()));
        }
    }
    let layers = folders(table, "layers");
    for key in &layers {
        let folder = root.join("layers").join(key);
        let layer: Option<Layer> =
            json_file::read(&folder.join("layer.json")).map_err(|error| error.to_string())?;
        let layer = layer.ok_or_else(|| format!("the layer `{}` is missing", key.escape_debug()))?;
        let below = layer.parent.as_ref().is_none_or(|parent| layers.contains(&parent.as_str()));
        if !below || !images.contains(&layer.image.as_str()) || !key.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("what the layer `{}` stands on is missing", key.escape_debug()));
        }
        check_disk(&folder.join(OVERLAY), &inside)?;
    }
    Ok(())
}

/// Where a bundle's content goes.
struct Home<'p> {
    paths: &'p Paths,
    /// Folder for the files of bundles.
    bundles: PathBuf,
}

impl Home<'_> {
    fn images(&self) -> Images {
        Images::open(&self.paths.images())
    }

    fn layers(&self) -> Layers {
        Layers::new(self.paths.home())
    }

    /// Whether there is nothing to be taken.
    fn has_all(&self, table: &Table) -> Result<bool, Error> {
        for folder in folders(table, "images") {
            let name = folder.rsplit_once('-').map_or(folder, |(name, _)| name);
            if !self.images().get(name).is_ok_and(|image| actions::image_folder(&image.manifest) == folder) {
                return Ok(false);
            }
        }
        let same = |path: &str, file: &Path| match table.files.iter().find(|entry| entry.path == path) {
            None => true,
            Some(entry) => {
                fs::read(file).is_ok_and(|text| entry.sha256.as_ref() == Some(&hex(&Sha256::digest(text))))
            }
        };
        // Layers of the same keys that were made elsewhere are other disks, and those above need the very ones below.
        let layers = folders(table, "layers");
        let is_there = |key: &&str| {
            let path = format!("layers/{key}/layer.json");
            same(&path, &self.paths.home().join(&path))
        };
        let sums = format!("{BUNDLES}/{SUMS}");
        let files = match table.files.iter().any(|entry| entry.path == sums) {
            true => same(&sums, &self.bundles.join(SUMS)),
            // Those of an earlier bundle would be taken for this one's.
            false => !self.bundles.exists(),
        };
        Ok(files && layers.iter().all(is_there))
    }

    /// Gives what was unpacked its places.
    fn take(&self, root: &Path, table: &Table) -> Result<(), Error> {
        for folder in folders(table, "images") {
            self.images().adopt(&root.join("images").join(folder))?;
        }
        for key in folders(table, "layers") {
            let folder = root.join("layers").join(key);
            if let Some(layer) = json_file::read::<Layer>(&folder.join("layer.json"))?
                && self.layers().get(key)?.as_ref() != Some(&layer)
            {
                self.layers().add(key, &layer, &folder.join(OVERLAY))?;
            }
        }
        let files = root.join(BUNDLES);
        clear(&self.bundles)?;
        if files.exists() {
            if let Some(parent) = self.bundles.parent() {
                private_dir(parent)?;
            }
            fs::rename(&files, &self.bundles).map_err(|source| Error::write(&self.bundles, source))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which source a lab has that leaves it open is seen by the files that came with its bundle.
    #[test]
    fn the_files_of_an_earlier_bundle_go() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path(), dir.path());
        let (home, root) =
            (Home { paths: &paths, bundles: paths.offline_bundle("demo") }, dir.path().join("new"));
        let table = Table {
            format: FORMAT,
            lab_version: "1".into(),
            lab: "demo".into(),
            snapshot: None,
            created_s: 0,
            data_bytes: 0,
            files: Vec::new(),
        };
        assert!(home.has_all(&table).unwrap());
        fs::create_dir_all(&home.bundles).unwrap();
        fs::write(home.bundles.join(SUMS), "of an earlier one").unwrap();
        assert!(!home.has_all(&table).unwrap());
        home.take(&root, &table).unwrap();
        assert!(!home.bundles.exists() && home.has_all(&table).unwrap());
        fs::create_dir_all(root.join(BUNDLES)).unwrap();
        fs::write(root.join(BUNDLES).join(SUMS), "of this one").unwrap();
        home.take(&root, &table).unwrap();
        assert_eq!(fs::read_to_string(home.bundles.join(SUMS)).unwrap(), "of this one");
    }
}
