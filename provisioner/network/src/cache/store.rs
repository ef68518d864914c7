//! What is kept: a file for each address, called by its SHA-256. The least recently used go when there is no more room.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use sha2::{Digest, Sha256};

/// Most that is kept, in bytes.
const ROOM: u64 = 4 << 30;
/// How long one connection waits for another that fetches the same: less than apt does for the first byte (30 s).
const PATIENCE: Duration = Duration::from_secs(20);
/// When a file that is not whole was written to for the last time, if nobody writes to it any more.
const ABANDONED: Duration = Duration::from_secs(600);
/// What begins the name of a file that is not whole.
const PARTIAL: &str = ".part";

/// The files that are kept.
pub struct Store {
    folder: PathBuf,
    room: u64,
    patience: Duration,
    /// Addresses that are being fetched.
    fetching: Mutex<HashSet<String>>,
    fetched: Condvar,
}

/// The right to fetch an address, as long as it is held.
pub struct Turn<'s> {
    store: &'s Store,
    url: String,
}

/// A file that is being kept. Dropped before it is whole, it is gone.
pub struct Writer<'s> {
    store: &'s Store,
    url: String,
    file: tempfile::NamedTempFile,
}

impl Store {
    /// What is kept in a folder.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
            room: ROOM,
            patience: PATIENCE,
            fetching: Mutex::default(),
            fetched: Condvar::new(),
        }
    }

    /// What is kept in a folder, for who does not wait.
    #[cfg(test)]
    pub fn impatient(folder: &Path) -> Self {
        Self { patience: Duration::ZERO, ..Self::new(folder) }
    }

    fn path(&self, url: &str) -> PathBuf {
        let digest = Sha256::digest(url);
        self.folder.join(digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    /// What is kept of an address: the file and its length.
    pub fn get(&self, url: &str) -> Option<(File, u64)> {
        let file = File::open(self.path(url)).ok()?;
        let length = file.metadata().ok()?.len();
        // So it is known what was used last. A file system that is read only does without.
        let _ = file.set_modified(SystemTime::now());
        Some((file, length))
    }

    fn fetching(&self) -> MutexGuard<'_, HashSet<String>> {
        self.fetching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else fetches an address. `None` if that takes too long.
    pub fn turn(&self, url: &str) -> Option<Turn<'_>> {
        let busy = |fetching: &mut HashSet<String>| fetching.contains(url);
        let waited = self.fetched.wait_timeout_while(self.fetching(), self.patience, busy);
        let (mut fetching, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        fetching.insert(url.into());
        Some(Turn { store: self, url: url.into() })
    }

    /// Makes room, and begins to keep an address.
    pub fn begin(&self, url: &str, length: u64) -> io::Result<Writer<'_>> {
        // Before all else goes for nothing.
        if length > self.room {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        fs::create_dir_all(&self.folder)?;
        self.make_room(length)?;
        let file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(&self.folder)?;
        Ok(Writer { store: self, url: url.into(), file })
    }

    fn make_room(&self, length: u64) -> io::Result<()> {
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            let used = metadata.modified()?;
            let partial = entry.file_name().as_encoded_bytes().starts_with(PARTIAL.as_bytes());
            // Of a process that was killed; what is being written now is younger.
            if partial && used.elapsed().is_ok_and(|age| age > ABANDONED) {
                fs::remove_file(entry.path())?;
            } else if !partial {
                kept.push((used, metadata.len(), entry.path()));
            }
        }
        kept.sort();
        let mut total: u64 = kept.iter().map(|(_, length, _)| length).sum();
        for (_, old, path) in kept {
            if total.saturating_add(length) <= self.room {
                return Ok(());
            }
            fs::remove_file(path)?;
            total = total.saturating_sub(old);
        }
        Ok(())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.store.fetching().remove(&self.url);
        self.store.fetched.notify_all();
    }
}

impl Writer<'_> {
    /// The file is whole.
    pub fn keep(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(self.store.path(&self.url)).map_err(|error| error.error)?;
        Ok(())
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_whole_is_kept_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store { room: 25, ..Store::new(&dir.path().join("cache")) };
        let keep = |url: &str| {
            let mut writer = store.begin(url, 10).unwrap();
            writer.write_all(b"0123456789").unwrap();
            writer.keep().unwrap();
        };
        assert!(store.get("a").is_none());
        keep("a");
        keep("b");
        drop(store.begin("c", 10).unwrap()); // never whole; `a` had to go for it
        assert!(store.get("a").is_none() && store.get("c").is_none());
        let (mut file, length) = store.get("b").unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), length), ("0123456789", 10));
        assert!(store.begin("d", 26).is_err());
        assert!(store.get("b").is_some(), "nothing goes for what there can be no room for");
    }

    #[test]
    fn an_address_is_fetched_once_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let first = store.turn("a").unwrap();
            scope.spawn(|| {
                let _second = store.turn("a").unwrap();
                order.lock().unwrap().push(2);
            });
            drop(store.turn("b").unwrap());
            order.lock().unwrap().push(1);
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), [1, 2]);
        assert!(store.patience < Duration::from_secs(30), "apt's");
    }
}
