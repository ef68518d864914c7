//! The programs that make up the emulated host: where they are, and whether they are new enough.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Oldest QEMU whose emulation of SVM carries current guest kernels. Older ones corrupt the flags around `cmpxchg16b`
/// in nested guests.
pub const OLDEST_QEMU: u32 = 10;

/// Why a program can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It is not there.
    #[error("{0} is not installed: run scripts/install-dependencies")]
    Missing(&'static str),
    /// It is there, and too old.
    #[error(
        "QEMU {found} is too old for the emulated host, which needs {OLDEST_QEMU} or newer: run scripts/install-dependencies"
    )]
    OldQemu {
        /// Its version.
        found: String,
    },
}

/// Where the programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// The virtiofs server.
    pub virtiofsd: PathBuf,
    /// The SSH server.
    pub dropbear: PathBuf,
    /// Makes its keys.
    pub dropbearkey: PathBuf,
    /// The SSH client.
    pub ssh: PathBuf,
    /// Makes its keys.
    pub ssh_keygen: PathBuf,
}

impl Tools {
    /// Finds all of them, or says which one is missing.
    pub fn find() -> Result<Self, Error> {
        let found = |name: &'static str| find(name).ok_or(Error::Missing(name));
        let qemu = found("qemu-system-x86_64")?;
        let version = qemu_version(&qemu).unwrap_or_default();
        if major(&version) < OLDEST_QEMU {
            return Err(Error::OldQemu {
                found: if version.is_empty() { "of unknown version".into() } else { version },
            });
        }
        Ok(Self {
            qemu,
            virtiofsd: virtiofsd().ok_or(Error::Missing("virtiofsd"))?,
            dropbear: found("dropbear")?,
            dropbearkey: found("dropbearkey")?,
            ssh: found("ssh")?,
            ssh_keygen: found("ssh-keygen")?,
        })
    }
}

/// A program in `PATH` or in the folders of system programs, which ordinary users often don't have there.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/libexec"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
}

/// The virtiofs server: the distribution's, or the one that scripts/install-dependencies has built.
pub fn virtiofsd() -> Option<PathBuf> {
    find("virtiofsd").or_else(|| newest_built(&cache()?))
}

fn cache() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("lab"))
}

fn newest_built(cache: &Path) -> Option<PathBuf> {
    let version = |path: &Path| -> Vec<u32> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let version = name.trim_start_matches("virtiofsd-").to_string();
        version.split('.').map(|part| part.parse().unwrap_or(0)).collect()
    };
    let built = fs::read_dir(cache).ok()?.flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("virtiofsd-") && is_program(&path.join("bin/virtiofsd"))
    });
    built.max_by_key(|path| version(path)).map(|path| path.join("bin/virtiofsd"))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// QEMU's version, such as `10.0.2`.
pub fn qemu_version(qemu: &Path) -> Option<String> {
    let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.strip_prefix("QEMU emulator version ")?.split_whitespace().next().map(Into::into)
}

/// The first number of a version; 0 if there is none.
pub fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|part| part.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn program(path: &Path, script: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = fs::File::options().create_new(true).write(true).mode(0o755).open(path).unwrap();
        std::io::Write::write_all(&mut file, script.as_bytes()).unwrap();
    }

    #[test]
    fn the_newest_virtiofsd_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest_built(dir.path()), None);
        for version in ["1.9.0", "1.14.0", "1.13.2"] {
            program(&dir.path().join(format!("virtiofsd-{version}/bin/virtiofsd")), "");
        }
        // Half-built ones have no program.
        fs::create_dir(dir.path().join("virtiofsd-2.0.0")).unwrap();
        assert_eq!(newest_built(dir.path()), Some(dir.path().join("virtiofsd-1.14.0/bin/virtiofsd")));
    }

    #[test]
    fn versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let qemu = dir.path().join("qemu");
        program(
            &qemu,
            "#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)'\necho Copyright\n",
        );
        assert_eq!(qemu_version(&qemu).as_deref(), Some("10.0.2"));
        assert_eq!(major("10.0.2"), 10);
        assert_eq!(major("?"), 0);
    }
}
