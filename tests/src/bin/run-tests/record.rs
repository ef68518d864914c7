//! What tests took on this machine: a file that lasts from run to run. Nothing depends on it but what is expected.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::table::Row;

/// What a test took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    /// In seconds.
    seconds: f64,
    /// How slow the machine was at that time.
    factor: f64,
    /// What the table said: a row that has changed is of a test that has, too.
    table_seconds: f64,
}

/// The file.
pub struct Record {
    path: Option<PathBuf>,
    entries: BTreeMap<String, Entry>,
}

/// Where the file is: `$XDG_CACHE_HOME/lab/tests.json`, else `~/.cache/lab/tests.json`.
pub fn path() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("lab/tests.json"))
}

impl Record {
    /// Reads the file; one that can't be read counts as empty.
    pub fn read(path: Option<PathBuf>) -> Self {
        let text = path.as_ref().and_then(|path| fs::read(path).ok()).unwrap_or_default();
        let mut entries: BTreeMap<String, Entry> = serde_json::from_slice(&text).unwrap_or_default();
        let is_sane = |value: f64| value.is_finite() && value > 0.0;
        entries.retain(|_, entry| is_sane(entry.seconds) && is_sane(entry.factor));
        Self { path, entries }
    }

    /// What a test takes where the factor is 1, in seconds: as seen here, else as the table says.
    pub fn seconds(&self, row: &Row) -> f64 {
        let seen = self.entries.get(&row.name).filter(|entry| entry.table_seconds == row.seconds);
        seen.map_or(row.seconds, |entry| entry.seconds / entry.factor)
    }

    /// Keeps what a test took, on a machine this slow.
    pub fn took(&mut self, row: &Row, seconds: f64, factor: f64) -> io::Result<()> {
        let entry = Entry { seconds, factor, table_seconds: row.seconds };
        self.entries.insert(row.name.clone(), entry);
        let Some(path) = &self.path else { return Ok(()) };
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer_pretty(&file, &self.entries)?;
        file.persist(path)?;
        Ok(())
    }

    /// Keeps that a test had not ended after this time, if it was expected to.
    pub fn took_more(&mut self, row: &Row, seconds: f64, factor: f64) -> io::Result<()> {
        if seconds > self.seconds(row) * factor { self.took(row, seconds, factor) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, seconds: f64) -> Row {
        Row { seconds, ..Row::unknown(name) }
    }

    #[test]
    fn what_was_seen_here_counts_until_the_table_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().join("below/tests.json"));
        let mut record = Record::read(path.clone());
        let (one, two) = (row("one", 100.0), row("two", 100.0));
        record.took(&one, 400.0, 2.0).unwrap();
        record.took_more(&two, 150.0, 2.0).unwrap();
        assert_eq!(record.seconds(&two), 100.0, "it was stopped earlier than it was expected to end");
        record.took_more(&two, 300.0, 2.0).unwrap();
        let record = Record::read(path);
        assert_eq!((record.seconds(&one), record.seconds(&two)), (200.0, 150.0));
        assert_eq!(record.seconds(&row("one", 90.0)), 90.0);
        assert_eq!(record.seconds(&row("three", 5.0)), 5.0);
    }

    #[test]
    fn garbage_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tests.json");
        let one = row("one", 100.0);
        for text in [
            "",
            "{",
            "[]",
            "\u{0}",
            r#"{"one": 3}"#,
            r#"{"one": {"seconds": 0, "factor": 1, "table_seconds": 100}}"#,
            r#"{"one": {"seconds": 5, "factor": -1, "table_seconds": 100}}"#,
        ] {
            fs::write(&path, text).unwrap();
            let mut record = Record::read(Some(path.clone()));
            assert_eq!(record.seconds(&one), 100.0, "{text}");
            record.took(&one, 7.0, 1.0).unwrap();
            assert_eq!(Record::read(Some(path.clone())).seconds(&one), 7.0, "{text}");
        }
    }
}
