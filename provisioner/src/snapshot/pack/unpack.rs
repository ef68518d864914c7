//! An exported snapshot is unpacked beside the labs, where none is looked for: `labs/.NAME.import`. A journal says how much
//! of it is on the disk: an import that was cut off goes on from there.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Error,
    format::{CHUNK, Mark, Reader},
    mib, sparse,
    table::FOLDER,
};
use crate::{
    files::{self, hex},
    json_file, lock,
    paths::private_dir,
    progress::Task,
};

/// How many bytes are unpacked between two entries of the journal.
const STEP: u64 = 64 << 20;

/// What is on the disk of an import.
#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    /// The checksum of the table: what is imported.
    table: String,
    /// How far it is.
    mark: Mark,
    /// Bytes written up to there.
    written: u64,
}

/// Where an import is unpacked.
pub struct Place {
    root: PathBuf,
}

impl Place {
    /// A folder for an import, which need not exist.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What becomes the lab's folder.
    pub fn lab(&self) -> PathBuf {
        self.root.join("lab")
    }

    /// What becomes the labfile's folder.
    pub fn labfile(&self) -> PathBuf {
        self.root.join(FOLDER)
    }

    /// Where a file of the table goes; its path has been checked.
    pub(super) fn file(&self, path: &str) -> PathBuf {
        match path.split_once('/') {
            Some((FOLDER, rest)) => self.labfile().join(rest),
            _ => self.lab().join(path),
        }
    }

    fn journal(&self) -> PathBuf {
        self.root.join("journal.json")
    }

    /// Makes sure that all of it is on the disk, then says so.
    pub(super) fn record(&self, reader: &Reader, written: u64) -> Result<(), Error> {
        let root = File::open(&self.root).map_err(|source| Error::read(&self.root, source))?;
        rustix::fs::syncfs(&root).map_err(|errno| Error::write(&self.root, errno.into()))?;
        let journal = Journal { table: hex(&reader.table_sum()), mark: reader.mark(), written };
        Ok(json_file::write(&self.journal(), &journal)?)
    }

    /// How much is written, if something is there of the same import: then the reader goes on behind it.
    fn resume(&self, reader: &mut Reader) -> Result<Option<u64>, Error> {
        match json_file::read::<Journal>(&self.journal()) {
            Ok(Some(journal)) if journal.table == hex(&reader.table_sum()) && self.lab().exists() => {
                reader.go_on(journal.mark)?;
                Ok(Some(journal.written))
            }
            _ => Ok(None),
        }
    }

    /// Makes all files, empty and as long as they will be.
    fn begin(&self, reader: &Reader) -> Result<(), Error> {
        for old in [self.journal(), self.lab(), self.labfile(), self.root.join("old")] {
            clear(&old)?;
        }
        for entry in &reader.table().files {
            let path = self.file(&entry.path);
            if let Some(folder) = path.parent() {
                private_dir(folder)?;
            }
            let mode = (entry.mode & 0o777) | 0o600;
            let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
            file.and_then(|file| file.set_len(entry.length)).map_err(|source| Error::write(&path, source))?;
        }
        self.record(reader, 0)
    }

    /// Makes the folder, for this process alone as long as the lock is held.
    pub fn hold(&self) -> Result<File, Error> {
        private_dir(&self.root)?;
        let path = self.root.join("lock");
        let lock = lock::try_lock(&path).map_err(|source| Error::write(&path, source))?;
        lock.ok_or_else(|| Error::Busy(self.root.clone()))
    }

    /// Unpacks all files, and gives what `check` finds in them. Of what is damaged or refused nothing is left.
    pub fn unpack_checked<T>(
        &self,
        reader: &mut Reader,
        task: &Task,
        check: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, Error> {
        let path = reader.path().to_path_buf();
        let refused = |what| Error::Refused { path, what };
        let unpacked = self.unpack(reader, task).and_then(|()| check().map_err(refused));
        if let Err(Error::Damaged { .. } | Error::Refused { .. } | Error::Cut { .. }) = unpacked {
            // It won't do better the next time. What can't be removed does not matter.
            drop(self.remove());
        }
        unpacked
    }

    /// Unpacks all files.
    pub(super) fn unpack(&self, reader: &mut Reader, task: &Task) -> Result<(), Error> {
        let mut written = match self.resume(reader)? {
            Some(written) => written,
            None => {
                self.begin(reader)?;
                0
            }
        };
        let total = reader.table().data_bytes;
        let room = rustix::fs::statvfs(&self.root).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        let bytes = total.saturating_sub(written);
        if room.is_ok_and(|room| room < bytes) {
            return Err(Error::Room { path: self.root.clone(), bytes });
        }
        let mut recorded = written;
        let mut open: Option<(u32, PathBuf, File)> = None;
        let mut buffer = vec![0; CHUNK as usize];
        let mut unpacker = zstd::bulk::Decompressor::new().map_err(|_| Error::Packing)?;
        while let Some(chunk) = reader.chunk()? {
            if open.as_ref().is_none_or(|(number, ..)| *number != chunk.file) {
                let entry = reader.table().files.get(chunk.file as usize);
                let path = entry.map(|entry| self.file(&entry.path)).unwrap_or_default();
                let file = OpenOptions::new().write(true).open(&path);
                let file = file.map_err(|source| Error::write(&path, source))?;
                open = Some((chunk.file, path, file));
            }
            let Some((_, path, file)) = &open else { continue };
            // No more than the chunk says, whatever its packed bytes would like to be.
            let room = buffer.get_mut(..chunk.length as usize).unwrap_or_default();
            match unpacker.decompress_to_buffer(&chunk.packed, room) {
                Ok(length) if length == room.len() => {}
                _ => return Err(reader.damaged("the chunk before cannot be unpacked")),
            }
            written +=
                sparse::write(file, chunk.offset, room).map_err(|source| Error::write(path, source))?;
            if written > total {
                return Err(reader.damaged("it holds more than its table of contents says"));
            }
            if written - recorded >= STEP {
                task.detail("sync");
                self.record(reader, written)?;
                recorded = written;
            }
            task.detail(&format!("{} of {} MiB", mib(written), mib(total)));
        }
        task.detail("sync");
        self.record(reader, written)
    }

    /// Removes all of it.
    pub fn remove(&self) -> Result<(), Error> {
        // The journal first: without it, what is left is begun anew.
        clear(&self.journal())?;
        clear(&self.root)
    }
}

/// Removes a file or folder, if it is there.
pub fn clear(path: &Path) -> Result<(), Error> {
    files::remove(path).map_err(|source| Error::write(path, source))
}
