//! Files that a step takes along: its script finds them in the node, in `$LAB_STEP`. Those of a labfile's step lie beside
//! the labfile, those of a stack's step in the stack's folder.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::Serialize;
use sha2::{Digest, Sha256};

/// What all files of a step may have together, in bytes.
const MAX_BYTES: u64 = 16 << 20; // as the error says
/// How many they may be.
const MAX_FILES: usize = 1000;
/// How deep their folders may be, where a link may lead back up.
const MAX_DEPTH: usize = 16;

/// Why a step's files can't be taken along.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They are too much.
    #[error(
        "the files of a step are more than 16 MiB or {MAX_FILES} at {0}: let the script fetch what is large"
    )]
    TooMuch(PathBuf),
    /// Neither a file nor a folder, or not called in UTF-8.
    #[error("{0} is no file that a step can take along: leave it out of the folder")]
    Unfit(PathBuf),
    /// The host refused.
    #[error("cannot read {path}, which a step takes along: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Enclosed {
    /// Its path below `$LAB_STEP`.
    pub path: String,
    /// Whether it may be run.
    pub executable: bool,
    /// What is in it.
    pub bytes: Vec<u8>,
}

impl Enclosed {
    /// A text file of a stack.
    pub fn text(path: &str, text: &str) -> Self {
        Self { path: path.into(), executable: false, bytes: text.into() }
    }

    /// Whether it is a text that has this word in it.
    pub fn names(&self, word: &str) -> bool {
        std::str::from_utf8(&self.bytes).is_ok_and(|text| text.contains(word))
    }
}

/// The files of these names in a folder, with all that is in those that are folders; links are followed. In the order of
/// the names, and of those in folders.
///
/// # Errors
/// They can't be read, or are too much.
pub fn beside(folder: &Path, names: &[String]) -> Result<Vec<Enclosed>, Error> {
    let mut found = Vec::new();
    let mut bytes = 0;
    for name in names {
        add(folder, name.trim_end_matches('/'), 0, &mut bytes, &mut found)?;
    }
    Ok(found)
}

fn add(
    folder: &Path,
    name: &str,
    depth: usize,
    bytes: &mut u64,
    found: &mut Vec<Enclosed>,
) -> Result<(), Error> {
    let path = folder.join(name);
    let io = |source| Error::Io { path: path.clone(), source };
    let metadata = fs::metadata(&path).map_err(io)?;
    if metadata.is_dir() && depth < MAX_DEPTH {
        let entries: Vec<_> = fs::read_dir(&path).and_then(Iterator::collect).map_err(io)?;
        let mut entries: Vec<_> = entries.iter().map(fs::DirEntry::file_name).collect();
        entries.sort();
        for entry in entries {
            let entry = entry.to_str().ok_or_else(|| Error::Unfit(path.join(&entry)))?;
            // What Python keeps beside its sources is no change of them.
            if entry == "__pycache__" {
                continue;
            }
            add(folder, &format!("{name}/{entry}"), depth + 1, bytes, found)?;
        }
        return Ok(());
    }
    if !metadata.is_file() {
        return Err(Error::Unfit(path));
    }
    *bytes = bytes.saturating_add(metadata.len());
    if *bytes > MAX_BYTES || found.len() >= MAX_FILES {
        return Err(Error::TooMuch(path));
    }
    found.push(Enclosed {
        path: name.into(),
        executable: metadata.permissions().mode() & 0o100 != 0,
        bytes: fs::read(&path).map_err(io)?,
    });
    Ok(())
}

/// A digest of names, contents and whether they may be run.
pub fn digest(files: &[Enclosed]) -> Vec<u8> {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(format!("{}\0{}\0{}\0", file.path, file.executable, file.bytes.len()));
        hash.update(&file.bytes);
    }
    hash.finalize().to_vec()
}

/// They as a tar archive, for `tar -x` in the node.
///
/// # Errors
/// A path is too long for one.
pub fn pack(files: &[Enclosed]) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    append(files, &mut archive)?;
    archive.into_inner()
}

/// Adds them to a tar archive.
///
/// # Errors
/// A path is too long for one.
pub fn append<W: io::Write>(files: &[Enclosed], archive: &mut tar::Builder<W>) -> io::Result<()> {
    for file in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(file.bytes.len() as u64);
        header.set_mode(if file.executable { 0o755 } else { 0o644 });
        archive.append_data(&mut header, &file.path, file.bytes.as_slice())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_and_folders_come_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("app/lib")).unwrap();
        fs::write(path("app/run"), "#!/bin/sh").unwrap();
        fs::set_permissions(path("app/run"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("app/lib/a"), [0, 255]).unwrap();
        fs::create_dir(path("app/__pycache__")).unwrap();
        fs::write(path("app/__pycache__/a.pyc"), "").unwrap();
        fs::write(path("one"), "1").unwrap();
        symlink("app", path("link")).unwrap();
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let found = beside(dir.path(), &names(&["one", "app/"])).unwrap();
        let told: Vec<_> = found.iter().map(|file| (file.path.as_str(), file.executable)).collect();
        assert_eq!(told, [("one", false), ("app/lib/a", false), ("app/run", true)]);
        assert_eq!(beside(dir.path(), &names(&["link"])).unwrap()[0].path, "link/lib/a");

        let archive = pack(&found).unwrap();
        let out = tempfile::tempdir().unwrap();
        tar::Archive::new(archive.as_slice()).unpack(out.path()).unwrap();
        assert_eq!(fs::read(out.path().join("app/lib/a")).unwrap(), [0, 255]);
        assert_eq!(fs::metadata(out.path().join("app/run")).unwrap().permissions().mode() & 0o777, 0o755);

        let before = digest(&found);
        fs::write(path("app/lib/a"), [0, 254]).unwrap();
        assert_ne!(digest(&beside(dir.path(), &names(&["one", "app"])).unwrap()), before);
    }

    #[test]
    fn what_is_too_much_or_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("around")).unwrap();
        symlink(".", path("around/again")).unwrap();
        let refused = |name: &str| beside(dir.path(), &[name.to_owned()]).unwrap_err();
        assert!(matches!(refused("around"), Error::Unfit(_)));
        assert!(matches!(refused("missing"), Error::Io { .. }));
        fs::File::create(path("large")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(refused("large"), Error::TooMuch(_)));
    }
}
