//! An ext4 file system in an image.

use std::error::Error as StdError;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::{Error, disk::Disk};

/// Largest kernel or initrd that is read, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Most of a text that is read, in bytes.
const MAX_TEXT: u64 = 1 << 20;

/// A part of the disk.
struct Part {
    disk: Disk,
    start: u64,
    length: u64,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn StdError + Send + Sync + 'static>> {
        let inside = start.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.length);
        match self.start.checked_add(start) {
            Some(offset) if inside => Ok(self.disk.read_at(buffer, offset)?),
            _ => Err("the file system is larger than its partition".into()),
        }
    }
}

/// A file system that is read.
pub(super) struct FileSystem {
    ext4: Ext4,
    /// Its name on the kernel's command line, behind `root=`.
    pub name: String,
}

impl FileSystem {
    /// The file system in `length` bytes of the disk from `start` on. `name` is its partition's; without one, it is
    /// called by its UUID.
    pub fn load(disk: &Disk, start: u64, length: u64, name: Option<String>) -> Result<Self, Ext4Error> {
        let ext4 = Ext4::load(Box::new(Part { disk: disk.clone(), start, length }))?;
        let name = name.unwrap_or_else(|| format!("UUID={}", ext4.uuid()));
        Ok(Self { ext4, name })
    }

    /// Whether there is something at `path`, links followed.
    pub fn exists(&self, path: &str) -> bool {
        self.ext4.exists(path).unwrap_or(false)
    }

    /// Names in a folder that are UTF-8, in order; none if there is no such folder.
    pub fn names(&self, folder: &str) -> Result<Vec<String>, Error> {
        if !self.exists(folder) {
            return Ok(Vec::new());
        }
        let mut names = Vec::new();
        for entry in self.ext4.read_dir(folder).map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            names.extend(entry.file_name().as_str().ok().map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// A kernel or an initrd.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        let bytes = self.ext4.metadata(path).map_err(damaged)?.len();
        if bytes > MAX_FILE {
            return Err(Error::TooLarge { file: path.into(), bytes });
        }
        self.ext4.read(path).map_err(damaged)
    }

    /// A small text; nothing if it is not there, too large for one or cannot be read.
    pub fn text(&self, path: &str) -> Option<String> {
        self.ext4.metadata(path).ok().filter(|metadata| metadata.len() <= MAX_TEXT)?;
        Some(String::from_utf8_lossy(&self.ext4.read(path).ok()?).into_owned())
    }

    /// The last component of what a symbolic link leads to; nothing if there is no such link.
    pub fn link(&self, path: &str) -> Option<String> {
        let target = self.ext4.read_link(path).ok()?;
        Some(target.to_str().ok()?.rsplit('/').next()?.to_owned())
    }
}

fn damaged(error: Ext4Error) -> Error {
    Error::FileSystem(error.to_string())
}
