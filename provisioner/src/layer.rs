//! Layers: what baked steps have made of an image, as qcow2 overlays that any lab can stand on, keyed by content.
//!
//! ```text
//! LAB_HOME/layers/KEY/layer.json      what it is (`Layer`); what has none is no layer
//! LAB_HOME/layers/KEY/overlay.qcow2   the disk of a node after the step; its header names what is below it by the way
//!                                     there in a lab's folder, where it is linked to before it is used
//! ```
//!
//! A layer's key is a digest of the image or layer below it and of all that the step depends on, so it is never changed,
//! only made and removed. One that is made again under the same key has the same files, but in other blocks of its disk: a
//! layer only ever stands on the very one that it was made on. `actions::Layer` makes them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{files, json_file, lock, paths};

/// Version of `layer.json`.
const FORMAT: u32 = 1;
/// A layer's disk.
pub const OVERLAY: &str = "overlay.qcow2";

/// Why layers can't be worked on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("there is no layer `{0}`: `lab layer ls` lists them")]
    NotThere(String),
    /// Several begin so.
    #[error("`{0}` is the beginning of more than one layer's key: write more of it")]
    Ambiguous(String),
    /// The image was built anew meanwhile.
    #[error(
        "the image `{0}` was replaced while a layer was made of it: `lab up` again makes it of the new one"
    )]
    ImageChanged(String),
    /// The lab has disks on another layer of this key.
    #[error(
        "the layer {0} was made again since this lab was brought up, whose disks stand on the earlier one, and what is to be made would need both: `lab destroy`, then `lab up` makes all of it anew"
    )]
    Another(String),
    /// Another command makes it.
    #[error("the layer {key} is still being made by another lab command after {seconds} s: wait for its end")]
    Busy {
        /// The layer.
        key: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A folder of lab's.
    #[error(transparent)]
    Paths(#[from] paths::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// The host refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.into(), source }
}

/// `layer.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    format: u32,
    /// The step: `docker/install`.
    pub step: String,
    /// The image at the bottom: its folder in a lab's `images/`.
    pub image: String,
    /// Key of the layer below; `None` if that is the image.
    pub parent: Option<String>,
    /// When that was made: another one of the same key is another disk.
    #[serde(default)]
    pub parent_created_s: Option<u64>,
    /// Size of the disk in bytes: a node's can't be smaller.
    pub size_bytes: u64,
    /// When it was made: seconds since 1970.
    pub created_s: u64,
}

impl Layer {
    /// A layer that is made now, upon the one of this key that was made then.
    pub fn new(step: &str, image: &str, parent: Option<(String, u64)>, size_bytes: u64) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        let created_s = now.map_or(0, |now| now.as_secs());
        let (parent, parent_created_s) = parent.unzip();
        Self {
            format: FORMAT,
            step: step.into(),
            image: image.into(),
            parent,
            parent_created_s,
            size_bytes,
            created_s,
        }
    }
}

/// A layer in a list.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// What it is.
    #[serde(flatten)]
    pub layer: Layer,
    /// Space that it takes, in bytes.
    pub disk_bytes: u64,
    /// Whether a lab, a snapshot or what the next `up` starts from stands on it.
    pub used: bool,
}

/// Keys of the layers that steps of these digests make, one upon the other, from an image.
pub fn keys(image_digest: &str, steps: impl Iterator<Item = String>) -> Vec<String> {
    let mut below = image_digest.to_owned();
    steps
        .map(|step| {
            let digest = Sha256::digest(format!("{below}\0{step}"));
            below = files::hex(&digest[..16]);
            below.clone()
        })
        .collect()
}

/// The store of layers.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store below LAB_HOME.
    pub fn new(home: &Path) -> Self {
        Self { dir: home.join("layers") }
    }

    /// The layer of this key; `None` if there is none.
    pub fn get(&self, key: &str) -> Result<Option<Layer>, Error> {
        let layer: Option<Layer> = json_file::read(&self.dir.join(key).join("layer.json"))?;
        Ok(layer.filter(|layer| layer.format == FORMAT && self.dir.join(key).join(OVERLAY).exists()))
    }

    /// How many of these steps the highest layer that is there for a disk of this size has in it.
    pub fn present(&self, keys: &[String], disk_bytes: u64) -> Result<usize, Error> {
        let (mut below, mut count) = (None, 0);
        for (index, key) in keys.iter().enumerate() {
            let fits = |layer: &Layer| {
                // One that stands on the image alone has the steps before it in itself.
                let stands = layer.parent.is_none() || below.is_some() && layer.parent_created_s == below;
                layer.size_bytes <= disk_bytes && stands
            };
            below = self.get(key)?.filter(fits).map(|layer| layer.created_s);
            if below.is_some() {
                count = index + 1;
            }
        }
        Ok(count)
    }

    /// Takes the right to make a layer, which is held as long as the file is open. Waits for whoever has it.
    pub fn lock(&self, key: &str, limit: Duration, waiting: &mut dyn FnMut()) -> Result<fs::File, Error> {
        paths::private_dir(&self.dir)?;
        let path = self.dir.join(format!(".{key}.lock"));
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(file) = lock::try_lock(&path).map_err(failed("lock", &path))? {
                return Ok(file);
            }
            waiting();
            // A lock's release can only be waited for without a limit.
            std::thread::park_timeout(Duration::from_millis(200));
        }
        Err(Error::Busy { key: key.into(), seconds: limit.as_secs() })
    }

    /// Takes a disk as the layer of this key, in the place of one that there may be.
    pub fn add(&self, key: &str, layer: &Layer, disk: &Path) -> Result<(), Error> {
        let (target, partial) = (self.dir.join(key), self.dir.join(format!(".{key}.part")));
        clear(&partial)?;
        paths::private_dir(&partial)?;
        let overlay = partial.join(OVERLAY);
        fs::rename(disk, &overlay).map_err(failed("take", disk))?;
        fs::File::open(&overlay).and_then(|file| file.sync_all()).map_err(failed("sync", &overlay))?;
        json_file::write(&partial.join("layer.json"), layer)?;
        self.remove(key)?;
        fs::rename(&partial, &target).map_err(failed("make", &target))
    }

    /// Gives a layer and all below it a second name in `layers`, a folder of a lab's.
    ///
    /// # Errors
    /// One of them is not there, or the folder has another one of its key.
    pub fn link(&self, key: &str, layers: &Path) -> Result<(), Error> {
        let mut next = Some(key.to_owned());
        while let Some(key) = next {
            let Some(layer) = self.get(&key)? else { return Err(Error::NotThere(key)) };
            let (from, to) = (self.dir.join(&key).join(OVERLAY), layers.join(&key).join(OVERLAY));
            paths::private_dir(&layers.join(&key))?;
            match fs::hard_link(&from, &to) {
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                    let inode =
                        |path: &Path| fs::metadata(path).map(|file| file.ino()).map_err(failed("read", path));
                    if inode(&from)? != inode(&to)? {
                        return Err(Error::Another(key));
                    }
                }
                other => other.map_err(failed("link", &to))?,
            }
            next = layer.parent;
        }
        Ok(())
    }

    /// All layers, those of an image together, each after the one below it.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut open: Vec<Entry> = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            // Locks, and what is being made, have a dot in front.
            let Some(key) = entry.file_name().into_string().ok().filter(|key| !key.starts_with('.')) else {
                continue;
            };
            if !entry.path().is_dir() {
                continue;
            }
            let Some(layer) = self.get(&key)? else { continue };
            if let Ok(metadata) = fs::metadata(entry.path().join(OVERLAY)) {
                let (disk_bytes, used) = (metadata.blocks() * 512, metadata.nlink() > 1);
                open.push(Entry { key, layer, disk_bytes, used });
            }
        }
        open.sort_by(|a, b| {
            (&a.layer.image, a.layer.created_s, &a.key).cmp(&(&b.layer.image, b.layer.created_s, &b.key))
        });
        Ok(open)
    }

    /// The whole key that begins so.
    pub fn find(&self, start: &str) -> Result<String, Error> {
        let mut keys = self.list()?.into_iter().map(|entry| entry.key).filter(|key| key.starts_with(start));
        match (keys.next(), keys.next()) {
            (Some(key), None) => Ok(key),
            (None, _) => Err(Error::NotThere(start.into())),
            (Some(_), Some(_)) => Err(Error::Ambiguous(start.into())),
        }
    }

    /// Removes a layer with those that stand on it; their keys. Labs that stand on them keep what they have.
    pub fn remove_with_upper(&self, key: &str) -> Result<Vec<String>, Error> {
        let mut gone = vec![key.to_owned()];
        let all = self.list()?;
        // As long as there is one more that stands on one of these.
        while let Some(upper) = all.iter().find(|entry| {
            !gone.contains(&entry.key)
                && entry.layer.parent.as_ref().is_some_and(|parent| gone.contains(parent))
        }) {
            gone.push(upper.key.clone());
        }
        for key in gone.iter().rev() {
            self.remove(key)?;
        }
        Ok(gone)
    }

    /// Removes the layers that nothing stands on; their keys.
    pub fn prune(&self) -> Result<Vec<String>, Error> {
        let mut gone = Vec::new();
        for entry in self.list()?.into_iter().filter(|entry| !entry.used) {
            self.remove(&entry.key)?;
            gone.push(entry.key);
        }
        // What was cut off while it was made.
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if [".part", ".raw"].iter().any(|end| name.as_encoded_bytes().ends_with(end.as_bytes())) {
                clear(&entry.path())?;
            }
        }
        Ok(gone)
    }

    /// Removes one layer, if it is there.
    fn remove(&self, key: &str) -> Result<(), Error> {
        let folder = self.dir.join(key);
        // Without its description it is none.
        clear(&folder.join("layer.json"))?;
        clear(&folder)
    }
}

fn clear(path: &Path) -> Result<(), Error> {
    files::remove(path).map_err(failed("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(names: &[&str]) -> Vec<String> {
        keys("image", names.iter().map(|name| name.to_string()))
    }

    #[test]
    fn a_key_is_of_all_below() {
        let (ab, ac, xb) = (steps(&["a", "b"]), steps(&["a", "c"]), steps(&["x", "b"]));
        assert!(ab[0] == ac[0] && ab[1] != ac[1] && ab[1] != xb[1]);
        assert_ne!(ab[0], keys("other", ["a".to_owned()].into_iter())[0]);
    }

    #[test]
    fn layers_are_made_linked_and_removed() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::new(home.path());
        let keys = steps(&["one", "two"]);
        let make = |index: usize, size| {
            let disk = home.path().join("disk");
            fs::write(&disk, [index as u8; 5000]).unwrap();
            let parent = index.checked_sub(1).map(|below| (keys[below].clone(), 1));
            let layer = Layer { created_s: 1, ..Layer::new("s/step", "tiny-1", parent, size) };
            store.add(&keys[index], &layer, &disk).unwrap();
            assert!(!disk.exists());
        };
        assert_eq!(store.present(&keys, 100).unwrap(), 0);
        make(1, 100);
        assert_eq!(store.present(&keys, 100).unwrap(), 0, "nothing below it");
        make(0, 50);
        assert_eq!([100, 60, 40].map(|size| store.present(&keys, size).unwrap()), [2, 1, 0]);
        make(1, 60);
        assert_eq!(store.present(&keys, 60).unwrap(), 2, "made again for smaller disks");
        let whole = home.path().join("disk");
        fs::write(&whole, "disk").unwrap();
        let alone = steps(&["one", "other"]);
        store.remove(&keys[0]).unwrap();
        store.add(&alone[1], &Layer::new("s/other", "tiny-1", None, 50), &whole).unwrap();
        assert_eq!(
            [50, 40].map(|size| store.present(&alone, size).unwrap()),
            [2, 0],
            "it stands on the image"
        );
        store.remove(&alone[1]).unwrap();
        make(0, 50);

        let layers = home.path().join("lab/layers");
        store.link(&keys[1], &layers).unwrap();
        store.link(&keys[1], &layers).unwrap();
        assert!(keys.iter().all(|key| layers.join(key).join(OVERLAY).exists()));
        assert!(store.list().unwrap().iter().all(|entry| entry.used && entry.disk_bytes >= 5000));
        assert!(store.prune().unwrap().is_empty());
        fs::create_dir(home.path().join("layers/.left.part")).unwrap();
        fs::write(home.path().join("layers/.left.raw"), "").unwrap();
        fs::write(home.path().join("layers/notes"), "somebody's").unwrap();
        let lock = store.lock(&keys[0], Duration::from_secs(1), &mut || ()).unwrap();
        let mut waited = 0;
        assert!(matches!(
            store.lock(&keys[0], Duration::from_millis(300), &mut || waited += 1),
            Err(Error::Busy { .. })
        ));
        assert!(waited > 0);
        drop(lock);
        fs::remove_dir_all(layers.join(&keys[1])).unwrap();
        assert_eq!(store.prune().unwrap(), [keys[1].clone()]);
        assert!(
            [".left.part", ".left.raw"].iter().all(|left| !home.path().join("layers").join(left).exists())
        );

        make(1, 60);
        assert_eq!(store.find(&keys[0][..6]).unwrap(), keys[0]);
        assert!(matches!(store.find(""), Err(Error::Ambiguous(_))));
        assert!(matches!(store.find("zz"), Err(Error::NotThere(_))));
        assert_eq!(store.remove_with_upper(&keys[0]).unwrap(), keys);
        assert!(store.list().unwrap().is_empty() && layers.join(&keys[0]).join(OVERLAY).exists());
        assert!(matches!(store.link(&keys[0], &layers), Err(Error::NotThere(_))));
    }

    #[test]
    fn a_layer_stands_on_the_one_it_was_made_on() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::new(home.path());
        let keys = steps(&["one", "two"]);
        let add = |index: usize, parent, created_s| {
            let disk = home.path().join("disk");
            fs::write(&disk, "disk").unwrap();
            let layer = Layer { created_s, ..Layer::new("s/step", "tiny-1", parent, 10) };
            store.add(&keys[index], &layer, &disk).unwrap();
        };
        add(0, None, 5);
        add(1, Some((keys[0].clone(), 5)), 6);
        assert_eq!(store.present(&keys, 10).unwrap(), 2);
        let layers = home.path().join("lab/layers");
        store.link(&keys[1], &layers).unwrap();
        // The lower one is made again: the upper one is of another disk.
        add(0, None, 7);
        assert_eq!(store.present(&keys, 10).unwrap(), 1);
        add(1, Some((keys[0].clone(), 7)), 8);
        assert_eq!(store.present(&keys, 10).unwrap(), 2);
        assert!(matches!(store.link(&keys[1], &layers), Err(Error::Another(key)) if key == keys[1]));
        store.link(&keys[1], &home.path().join("other/layers")).unwrap();
    }

    #[test]
    fn half_a_layer_is_none() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::new(home.path());
        fs::create_dir_all(home.path().join("layers/k")).unwrap();
        fs::write(home.path().join("layers/k").join(OVERLAY), "disk").unwrap();
        assert_eq!(store.get("k").unwrap(), None);
        json_file::write(
            &home.path().join("layers/k/layer.json"),
            &Layer { format: 99, ..Layer::new("a", "i", None, 1) },
        )
        .unwrap();
        assert_eq!(store.get("k").unwrap(), None, "of another version");
    }
}
