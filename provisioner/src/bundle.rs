//! Bundles: folders with files that stacks install where nothing is to be downloaded: programs, and archives of container
//! images. Each has a `SHA256SUMS`, as sha256sum(1) writes it, and only what that lists is used.
//!
//! A stack names a file by a pattern such as `k8s-{version}-images.tar`; what stands for `{version}` is the version that
//! is installed. `LAB_BUNDLES` names folders, as PATH does; the folder `LAB_HOME/bundles`, and each folder in it, is one,
//! too.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::files::hex;

/// What stands for the version in a file's name.
const VERSION: &str = "{version}";
/// The list of a bundle's files with their checksums.
pub const SUMS: &str = "SHA256SUMS";
/// Longest `SHA256SUMS`, in bytes.
const MAX_SUMS: u64 = 1 << 20;

/// Why a bundle's file can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None has it.
    #[error(
        "no bundle has the file {pattern} for {user}: looked in {looked}\n  LAB_BUNDLES names folders with bundles; docs/bundles.md says what one is"
    )]
    NotFound {
        /// Its name, or what it is like.
        pattern: String,
        /// The step that wants it.
        user: String,
        /// The folders that were looked in.
        looked: String,
    },
    /// There are only other versions.
    #[error(
        "{user}: the labfile asks for version {wanted}, but {file} is another one: leave `version` out, or name a bundle with that version by LAB_BUNDLES"
    )]
    OtherVersion {
        /// The step that wants it.
        user: String,
        /// The version in the labfile.
        wanted: String,
        /// What is there.
        file: PathBuf,
    },
    /// The file is not what the bundle says.
    #[error("{path} is not what its bundle's {SUMS} says: get the bundle again")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The host refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A file of a bundle.
#[derive(Debug, Clone, PartialEq)]
pub struct BundleFile {
    /// What it is called in a step: the pattern without its version, `k8s-images.tar`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What stands for `{version}` in its name; empty if the pattern has none.
    pub version: String,
    /// SHA-256 that its bundle says it has, in hexadecimal digits.
    pub sha256: String,
}

/// The first file that fits a pattern. `wanted` is the version that it must have, or the first numbers of it; empty: any.
/// Of several in its folder the latest.
/// `user` is the step that wants it.
///
/// # Errors
/// There is none, or none of this version.
pub fn find(folders: &[PathBuf], pattern: &str, wanted: &str, user: &str) -> Result<BundleFile, Error> {
    let mut other = None;
    for folder in folders {
        let mut fitting: Vec<BundleFile> = listed(folder)?
            .into_iter()
            .filter_map(|(sha256, file)| {
                let version = version_in(&file, pattern)?.to_owned();
                let name = pattern.replace(&format!("-{VERSION}"), "").replace(VERSION, "");
                Some(BundleFile { name, path: folder.join(file), version, sha256 })
            })
            .collect();
        fitting.sort_by_key(|file| numbers(&file.version));
        while let Some(file) = fitting.pop() {
            if is_of(&file.version, wanted) || !pattern.contains(VERSION) {
                return Ok(file);
            }
            other = Some(file.path);
        }
    }
    let user = user.to_owned();
    Err(match other {
        Some(file) => Error::OtherVersion { user, wanted: wanted.into(), file },
        None => {
            let looked: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
            Error::NotFound { pattern: pattern.into(), user, looked: looked.join(", ") }
        }
    })
}

impl BundleFile {
    /// Its name in the bundle.
    pub fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Opens the file when all of it has been read and is what the bundle says.
    ///
    /// # Errors
    /// It is not, or can't be read.
    pub fn open(&self) -> Result<fs::File, Error> {
        let failed = |source| Error::Io { path: self.path.clone(), source };
        let mut file = fs::File::open(&self.path).map_err(failed)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hash.update(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        if hex(&hash.finalize()) != self.sha256 {
            return Err(Error::Damaged { path: self.path.clone() });
        }
        io::Seek::rewind(&mut file).map_err(failed)?;
        Ok(file)
    }
}

/// Checksums and names of the files that a folder's `SHA256SUMS` lists; nothing if it has none.
fn listed(folder: &Path) -> Result<Vec<(String, String)>, Error> {
    let path = folder.join(SUMS);
    let mut text = String::new();
    match fs::File::open(&path).and_then(|file| file.take(MAX_SUMS).read_to_string(&mut text)) {
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {}
        Err(source) => return Err(Error::Io { path, source }),
        Ok(_) => {}
    }
    let line = |line: &str| {
        let (sum, name) = line.split_once(' ')?;
        // A second blank, or the `*` of a file that was read as binary.
        let name = name.strip_prefix([' ', '*']).unwrap_or(name);
        let right = sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
        let beside = !name.contains('/') && ![".", "..", ""].contains(&name);
        (right && beside).then(|| (sum.to_ascii_lowercase(), name.to_owned()))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// What stands for the version in a file's name; `None` if the name does not fit the pattern.
fn version_in<'n>(name: &'n str, pattern: &str) -> Option<&'n str> {
    let Some((before, after)) = pattern.split_once(VERSION) else {
        return (name == pattern).then_some("");
    };
    let version = name.strip_prefix(before)?.strip_suffix(after)?;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".+~".contains(&byte);
    (version.starts_with(|c: char| c.is_ascii_digit()) && version.bytes().all(fits)).then_some(version)
}

/// Whether a version is the wanted one, or one of those that are: 1.20.2 of 1.20.
fn is_of(version: &str, wanted: &str) -> bool {
    let rest = version.strip_prefix(wanted);
    wanted.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A version's numbers, to be compared.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        let mut sums = String::from("not a line\n0000  short\n");
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
            sums += &format!("{}  {name}\n", hex(&Sha256::digest(text)));
        }
        sums += &format!("{}  ../outside\n", "0".repeat(64));
        fs::write(folder.join(SUMS), sums).unwrap();
    }

    #[test]
    fn files_are_found_by_pattern_and_version() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        let files = [("k8s-1.9.1-images.tar", "9"), ("k8s-1.20.2-images.tar", "20"), ("tool", "t")];
        bundle(&home.join("bundles/one"), &files);
        fs::write(home.join("bundles/one/k8s-1.30.0-images.tar"), "not listed").unwrap();
        let folders = crate::paths::Paths::at(&home, &home).bundles();
        let find = |pattern, wanted| find(&folders, pattern, wanted, "k8s/images");
        let found = find("k8s-{version}-images.tar", "").unwrap();
        assert_eq!((found.version.as_str(), found.name.as_str()), ("1.20.2", "k8s-images.tar"));
        let mut text = String::new();
        found.open().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "20");
        assert_eq!(find("k8s-{version}-images.tar", "1.9.1").unwrap().version, "1.9.1");
        assert_eq!(find("k8s-{version}-images.tar", "1.20").unwrap().version, "1.20.2");
        assert!(find("k8s-{version}-images.tar", "1.2").is_err());
        assert_eq!(find("tool", "1.9.1").unwrap().version, "");
        let refused = find("k8s-{version}-images.tar", "1.30.0").unwrap_err().to_string();
        assert!(refused.contains("asks for version 1.30.0") && refused.contains("images.tar"), "{refused}");
        for pattern in ["outside", "../outside", "k8s-{version}", "none-{version}"] {
            let said = find(pattern, "").unwrap_err().to_string();
            assert!(said.contains("home/bundles") && said.contains("k8s/images"), "{said}");
        }
    }

    #[test]
    fn what_is_damaged_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        bundle(dir.path(), &[("tool", "good")]);
        let found = find(&[dir.path().into()], "tool", "", "x").unwrap();
        found.open().unwrap();
        fs::write(dir.path().join("tool"), "bad").unwrap();
        assert!(matches!(found.open(), Err(Error::Damaged { .. })));
        fs::remove_file(dir.path().join("tool")).unwrap();
        assert!(matches!(found.open(), Err(Error::Io { .. })));
    }
}
