//! The image store: a folder an image, `NAME/`, with `manifest.json`, `kernel`, `initrd` and the root disk. A folder
//! appears complete or not at all, and no file in it is ever changed in place: whoever needs the files for longer makes
//! hard links to them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use crate::{
    build,
    definition::{self, Definition},
    import,
    manifest::{self, Manifest},
};

/// Folders that are being written.
const PARTIAL: &str = ".build-";
/// The manifest's file.
const MANIFEST: &str = "manifest.json";
/// How long to wait for another process that builds, imports or removes.
const LOCK_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such image.
    #[error("there is no image {0}; build it: lab image build {0}")]
    NotFound(String),
    /// A file of an image is not what the manifest says.
    #[error("the image {name} is damaged: {} {what}; {}", file.display(), remedy(name, *imported))]
    Damaged {
        /// The image.
        name: String,
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
        /// Whether the image was imported rather than built.
        imported: bool,
    },
    /// Somebody else works in the store.
    #[error("another process has been writing to the image store {} for {} minutes", .0.display(), LOCK_LIMIT.as_secs() / 60)]
    Busy(PathBuf),
    /// A name that cannot be an image's.
    #[error("{0}")]
    BadName(String),
    /// The definition cannot be used.
    #[error(transparent)]
    Definition(#[from] definition::Error),
    /// The build failed.
    #[error("cannot build the image {name}: {source}")]
    Build {
        /// The image.
        name: String,
        /// Why.
        source: Box<build::Error>,
    },
    /// The import failed.
    #[error("cannot import {}: {source}", path.display())]
    Import {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<import::Error>,
    },
    /// The host refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn remedy(name: &str, imported: bool) -> String {
    match imported {
        true => format!("remove it (lab image rm {name}) and import it again"),
        false => format!("build it anew: lab image build {name} --force"),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// The folder with all images.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// What is known of it.
    pub manifest: Manifest,
    /// Its folder.
    pub dir: PathBuf,
}

impl Image {
    /// The kernel: an ELF file.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// The initrd.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// The root disk.
    pub fn root(&self) -> PathBuf {
        self.dir.join(&self.manifest.root_file)
    }

    /// The files of its root file system as a tar archive packed by zstd; `None` of an image that was not built here.
    pub fn files(&self) -> Option<PathBuf> {
        Some(self.dir.join(build::FILES)).filter(|path| path.exists())
    }

    /// Space that the image takes on the host, in bytes (holes take none).
    pub fn space_bytes(&self) -> u64 {
        let names = self.manifest.files.keys().map(String::as_str).chain([build::FILES]);
        let files = names.map(|file| fs::metadata(self.dir.join(file)));
        files.filter_map(Result::ok).map(|metadata| metadata.blocks().saturating_mul(512)).sum()
    }
}

/// A name in the store, and the image or what is wrong with it.
pub type Listed = (String, Result<Image, Error>);

impl Store {
    /// The store in this folder (`LAB_HOME/images`), which need not exist yet.
    pub fn open(folder: &Path) -> Store {
        Store { folder: folder.into() }
    }

    /// The image of that name; its files' sizes are compared with the manifest.
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        manifest::check_name(name).map_err(Error::BadName)?;
        let dir = self.folder.join(name);
        let path = dir.join(MANIFEST);
        let damaged = |file: PathBuf, what: String, imported| Error::Damaged {
            name: name.into(),
            file,
            what,
            imported,
        };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(Error::NotFound(name.into()));
            }
            Err(error) => return Err(damaged(path, format!("cannot be read ({error})"), false)),
        };
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(path.clone(), format!("is no manifest ({error})"), false))?;
        let imported = manifest.cloud_init;
        if manifest.version != manifest::VERSION {
            let what = format!("has version {}, this lab knows {}", manifest.version, manifest::VERSION);
            return Err(damaged(path, what, imported));
        }
        // The manifest is only trusted as far as to name files beside it.
        let known = ["kernel", "initrd", manifest.root_file.as_str()];
        for file in known {
            let path = dir.join(file);
            let Some(expected) = manifest.files.get(file).filter(|_| !file.contains('/')) else {
                return Err(damaged(path, "is not in the manifest".into(), imported));
            };
            match fs::metadata(&path) {
                Ok(metadata) if metadata.len() == expected.bytes => {}
                Ok(metadata) => {
                    let what = format!("has {} bytes instead of {}", metadata.len(), expected.bytes);
                    return Err(damaged(path, what, imported));
                }
                Err(error) => return Err(damaged(path, format!("cannot be read ({error})"), imported)),
            }
        }
        Ok(Image { manifest, dir })
    }

    /// All images, by name; damaged ones with the error that [`Store::get`] gives.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.folder)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read", &self.folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') && entry.path().is_dir() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names.into_iter().map(|name| (name.clone(), self.get(&name))).collect())
    }

    /// The image of that name, with all its files' digests computed and compared.
    pub fn verify(&self, name: &str) -> Result<Image, Error> {
        let image = self.get(name)?;
        for (file, expected) in &image.manifest.files {
            let path = image.dir.join(file);
            let found = manifest::digest_file(&path).map_err(io_error("read", &path))?;
            if found != *expected {
                let what = "does not have the digest that the manifest tells".into();
                let imported = image.manifest.cloud_init;
                return Err(Error::Damaged { name: name.into(), file: path, what, imported });
            }
        }
        Ok(image)
    }

    /// Remove an image, damaged or not. Hard links to its files are not touched.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        manifest::check_name(name).map_err(Error::BadName)?;
        let dir = self.folder.join(name);
        if !dir.exists() {
            return Err(Error::NotFound(name.into()));
        }
        let _lock = self.lock(&mut |_| {})?;
        let work = self.partial()?;
        fs::rename(&dir, work.path().join("old")).map_err(io_error("remove", &dir))?;
        work.close().map_err(io_error("remove", &dir))
    }

    /// The image of that name, built first if the store has none and lab has a definition of that name.
    pub fn ensure(&self, name: &str, progress: &mut dyn FnMut(&str)) -> Result<Image, Error> {
        match self.get(name) {
            Err(Error::NotFound(_)) if Definition::builtin_names().contains(&name) => {
                self.build(&Definition::find(name)?, false, progress)
            }
            found => found,
        }
    }

    /// Build an image. If the store has one of the same definition already, nothing happens, unless `force` is set.
    pub fn build(
        &self,
        definition: &Definition,
        force: bool,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Image, Error> {
        let name = &definition.name;
        let same = |image: &Image| image.manifest.definition == definition.digest;
        if !force && let Some(image) = self.get(name).ok().filter(same) {
            return Ok(image);
        }
        let _lock = self.lock(progress)?;
        // Somebody else may have built it while we waited.
        if !force && let Some(image) = self.get(name).ok().filter(same) {
            return Ok(image);
        }
        let (work, out) = (self.partial()?, self.partial()?);
        let manifest = build::build(definition, work.path(), out.path(), progress)
            .map_err(|source| Error::Build { name: name.clone(), source: Box::new(source) })?;
        self.publish(out, &manifest)
    }

    /// Import a distribution's cloud image (raw or qcow2) under a name; an earlier image of that name is replaced. Returns
    /// what it seems to lack for a node, too, a sentence each.
    pub fn import(
        &self,
        name: &str,
        path: &Path,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(Image, Vec<String>), Error> {
        manifest::check_name(name).map_err(Error::BadName)?;
        let _lock = self.lock(progress)?;
        let out = self.partial()?;
        let (manifest, warnings) = import::import(name, path, out.path(), progress)
            .map_err(|source| Error::Import { path: path.into(), source: Box::new(source) })?;
        Ok((self.publish(out, &manifest)?, warnings))
    }

    /// Take the image in a folder beside the store, whose files have to be as its manifest says, and leave the folder
    /// empty; an earlier image of that name is replaced.
    pub fn adopt(&self, from: &Path) -> Result<Image, Error> {
        let path = from.join(MANIFEST);
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| io_error("read", &path)(error.into()))?;
        manifest::check_name(&manifest.name).map_err(Error::BadName)?;
        let _lock = self.lock(&mut |_| {})?;
        let out = self.partial()?;
        for (file, expected) in &manifest.files {
            let path = from.join(file);
            if manifest::digest_file(&path).map_err(io_error("read", &path))? != *expected {
                let what = "does not have the digest that the manifest tells".into();
                let (name, imported) = (manifest.name.clone(), manifest.cloud_init);
                return Err(Error::Damaged { name, file: path, what, imported });
            }
            fs::rename(&path, out.path().join(file)).map_err(io_error("take", &path))?;
        }
        self.publish(out, &manifest)
    }

    /// A folder for what is not complete; removed when dropped, or by the next process that works in the store.
    fn partial(&self) -> Result<tempfile::TempDir, Error> {
        let made = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(&self.folder);
        made.map_err(io_error("create a folder in", &self.folder))
    }

    /// Write the manifest and put the folder in place, on disk to the last byte before its name changes.
    fn publish(&self, out: tempfile::TempDir, manifest: &Manifest) -> Result<Image, Error> {
        let path = out.path().join(MANIFEST);
        let text = serde_json::to_vec_pretty(manifest).map_err(|e| io_error("write", &path)(e.into()))?;
        fs::write(&path, text).map_err(io_error("write", &path))?;
        for file in manifest.files.keys().map(String::as_str).chain([MANIFEST, "."]) {
            let path = out.path().join(file);
            File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("write", &path))?;
        }
        let dir = self.folder.join(&manifest.name);
        let failed = |error: rustix::io::Errno| io_error("replace", &dir)(error.into());
        match renameat_with(CWD, out.path(), CWD, &dir, RenameFlags::NOREPLACE) {
            // The folder has another name now: nothing is left to remove.
            Ok(()) => drop(out.keep()),
            // Exchanged in one step, so that there is always one of the two; the old one goes with `out`.
            Err(rustix::io::Errno::EXIST) => {
                renameat_with(CWD, out.path(), CWD, &dir, RenameFlags::EXCHANGE).map_err(failed)?;
                drop(out);
            }
            Err(error) => return Err(failed(error)),
        }
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(io_error("write", &self.folder))?;
        self.get(&manifest.name)
    }

    /// Keep others from writing to the store; removes what an interrupted process has left.
    fn lock(&self, progress: &mut dyn FnMut(&str)) -> Result<File, Error> {
        fs::create_dir_all(&self.folder).map_err(io_error("create", &self.folder))?;
        let path = self.folder.join(".lock");
        let file = File::options().create(true).append(true).open(&path).map_err(io_error("open", &path))?;
        let begun = Instant::now();
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_LIMIT => {
                    if !told {
                        progress("waiting for another process that writes to the image store");
                        told = true;
                    }
                    // flock has no limit of its own.
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy(self.folder.clone())),
                Err(error) => return Err(io_error("lock", &path)(error.into())),
            }
        }
        for entry in fs::read_dir(&self.folder).map_err(io_error("read", &self.folder))? {
            let entry = entry.map_err(io_error("read", &self.folder))?;
            if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
                fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests;
