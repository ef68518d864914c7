//! Packages out of Debian's archive, downloaded and unpacked without installing anything: `mmdebstrap` sets up an apt
//! of its own for any suite (its default mirror and keyring, rootless where needed), which then only downloads.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use crate::command;

/// Where Debian's keys are expected.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Downloads each package named on the command line into /debs, a kernel's (linux-image-cloud-amd64) with those that it
/// consists of.
const DOWNLOAD: &str = include_str!("download.sh");

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program of the host is missing or failed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// The archive's keys are not installed.
    #[error("{KEYRING} is missing; {}", command::install("debian-archive-keyring", command::has_apt()))]
    NoKeyring,
    /// The installed keys do not know the suite.
    #[error(
        "the installed Debian keys do not know the suite {0}; update them: apt update && apt install debian-archive-keyring"
    )]
    OldKeyring(String),
    /// Lists of packages that are not valid at this machine's date.
    #[error(
        "the archive's lists of the suite {suite} are not valid today: {reason}\nIs this machine's date right ({today})? If it is, the mirror has stood still: take another, or wait"
    )]
    NotValidToday {
        /// The suite.
        suite: String,
        /// What apt said.
        reason: String,
        /// This machine's date.
        today: String,
    },
    /// A name that cannot be a package's or a suite's.
    #[error("{0:?} is not a name of a Debian package or suite")]
    BadName(String),
    /// The download ended without this package.
    #[error("the package {package} was not found in Debian's {suite}")]
    NotFound {
        /// The package.
        package: String,
        /// The suite.
        suite: String,
    },
    /// The host refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// A package and its version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// A downloaded package.
#[derive(Debug, Clone)]
pub struct Deb {
    /// Which package it is.
    pub package: Package,
    /// The .deb file.
    pub path: PathBuf,
}

impl Deb {
    /// Unpack the package's files below `folder`.
    pub fn unpack(&self, folder: &Path) -> Result<(), Error> {
        command::run(Command::new("dpkg-deb").arg("-x").arg(&self.path).arg(folder))?;
        Ok(())
    }
}

/// Download packages of a suite (`trixie`) into the existing folder `dest`, in the order of `packages`. In the place of a
/// kernel's are all that it consists of.
pub fn download(suite: &str, packages: &[&str], dest: &Path) -> Result<Vec<Deb>, Error> {
    check_names(packages.iter().copied().chain([suite]))?;
    let dest =
        fs::canonicalize(dest).map_err(|source| Error::Io { action: "open", path: dest.into(), source })?;
    let script = format!("set -- \"$1\" {}\n{DOWNLOAD}", packages.join(" "));
    let mut mmdebstrap = mmdebstrap(suite)?;
    // Goes with `dest` if we are killed; a user namespace's root cannot enter there.
    if rustix::process::geteuid().is_root() {
        mmdebstrap.env("TMPDIR", &dest);
    }
    mmdebstrap.args(["--variant=custom", "--format=null"]);
    mmdebstrap.arg(format!("--customize-hook={script}"));
    mmdebstrap.arg(format!("--customize-hook=sync-out /debs {}", quote(&dest.to_string_lossy())));
    mmdebstrap.args([suite, "/dev/null"]);
    run_mmdebstrap(&mut mmdebstrap, suite)?;
    let found = packages.iter().enumerate().map(|(index, package)| find(suite, package, &dest, index));
    Ok(found.collect::<Result<Vec<_>, _>>()?.concat())
}

/// What was downloaded as the `index`th, by name.
fn find(suite: &str, package: &str, dest: &Path, index: usize) -> Result<Vec<Deb>, Error> {
    let folder = dest.join(index.to_string());
    let entries =
        fs::read_dir(&folder).map_err(|source| Error::Io { action: "open", path: folder.clone(), source })?;
    let mut paths: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect();
    paths.sort();
    if paths.is_empty() {
        return Err(Error::NotFound { package: package.into(), suite: suite.into() });
    }
    paths.into_iter().map(deb).collect()
}

/// A package's file, with what it says of itself.
fn deb(path: PathBuf) -> Result<Deb, Error> {
    let shown = command::run(
        Command::new("dpkg-deb").args(["--show", "--showformat=${Package}\t${Version}"]).arg(&path),
    )?;
    let shown = String::from_utf8_lossy(&shown).into_owned();
    let (name, version) = shown.split_once('\t').unwrap_or((shown.as_str(), ""));
    Ok(Deb { package: Package { name: name.into(), version: version.into() }, path })
}

/// `mmdebstrap` with what all uses of it share: rootless unless we are root, temporary files in `/var/tmp` (`/tmp` is
/// often memory), default mirror and keyring.
pub(crate) fn mmdebstrap(suite: &str) -> Result<Command, Error> {
    check_names([suite])?;
    if !Path::new(KEYRING).exists() {
        return Err(Error::NoKeyring);
    }
    let mut command = if rustix::process::geteuid().is_root() {
        // It mounts /proc and /sys below its folder: among mounts of its own, so that none is left when it is killed.
        command::is_installed("mmdebstrap")?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "mmdebstrap", "--mode=root"]);
        command
    } else {
        let mut command = Command::new("mmdebstrap");
        command.arg("--mode=unshare");
        command
    };
    if std::env::var_os("TMPDIR").is_none() {
        command.env("TMPDIR", "/var/tmp");
    }
    // Otherwise it keeps apt's reasons to itself.
    command.env("LC_ALL", "C.UTF-8").arg("--verbose");
    Ok(command)
}

/// Run `mmdebstrap` and explain its most common failure.
pub(crate) fn run_mmdebstrap(mmdebstrap: &mut Command, suite: &str) -> Result<Vec<u8>, Error> {
    command::run(mmdebstrap).map_err(|error| explain(error, suite))
}

/// Say what to do where `mmdebstrap`'s own message does not.
pub(crate) fn explain(error: command::Error, suite: &str) -> Error {
    let command::Error::Failed { output, .. } = &error else { return error.into() };
    if output.contains("NO_PUBKEY") {
        return Error::OldKeyring(suite.into());
    }
    let dated = |line: &&str| line.contains(" is expired (") || line.contains(" is not valid yet (");
    let Some(line) = output.lines().find(dated) else { return error.into() };
    let reason =
        line.trim_start_matches("E: ").trim_end_matches(" Updates for this repository will not be applied.");
    let today = command::run(Command::new("date").args(["-u", "+%F"])).unwrap_or_default();
    let today = String::from_utf8_lossy(&today).trim().to_owned();
    Error::NotValidToday { suite: suite.into(), reason: reason.into(), today }
}

/// Refuse what is no name of a package or a suite: it becomes part of a command.
pub(crate) fn check_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<(), Error> {
    let good = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
    };
    match names.into_iter().find(|name| !good(name)) {
        Some(name) => Err(Error::BadName(name.into())),
        None => Ok(()),
    }
}

/// A word of a shell command.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_says_is_explained() {
        let failed = |output: &str| {
            let (program, status) = ("mmdebstrap".to_owned(), "exit status: 25".to_owned());
            explain(command::Error::Failed { program, status, output: output.into() }, "sid").to_string()
        };
        let said = failed(
            "Get:1 http://x sid InRelease\nE: Release file for http://x/dists/sid/InRelease is expired (invalid since \
             24d 12h 42min 39s). Updates for this repository will not be applied.\nE: apt-get update failed",
        );
        assert!(said.contains("sid are not valid today: Release file for http://x"), "{said}");
        assert!(
            said.contains("(invalid since 24d 12h 42min 39s).\nIs this machine's date right (20"),
            "{said}"
        );
        assert!(failed("W: GPG error: NO_PUBKEY 1234\nE: x").contains("update them"));
        assert!(failed("E: Unable to locate package x").contains("Unable to locate package x"));
    }

    #[test]
    fn names_cannot_carry_commands() {
        assert!(check_names(["trixie", "libstdc++6", "linux-image-6.12.1-cloud-amd64"]).is_ok());
        for bad in ["", "-o", "a b", "a;b", "$(x)", "A", "a/b"] {
            let error = check_names([bad]).unwrap_err();
            assert_eq!(error.to_string(), format!("{bad:?} is not a name of a Debian package or suite"));
        }
    }

    #[test]
    fn an_old_keyring_is_explained() {
        let failed = command::Error::Failed {
            program: "mmdebstrap".into(),
            status: "exit status: 1".into(),
            output: "W: GPG error: NO_PUBKEY 6ED0E7B82643E131".into(),
        };
        let text = explain(failed, "trixie").to_string();
        assert!(text.contains("apt install debian-archive-keyring"), "{text}");
    }

    #[test]
    fn quoted_words_come_back() {
        let word = "it's a $HOME";
        let out =
            command::run(Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))])).unwrap();
        assert_eq!(out, word.as_bytes());
    }
}
