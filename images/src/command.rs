//! Programs of the host: run them, and say what to install when one is missing.

use std::{
    ffi::OsStr,
    io,
    process::{Command, Output},
};

/// Why a program of the host failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not installed.
    #[error("{program} is missing; {}", install(package, has_apt()))]
    Missing {
        /// The program.
        program: String,
        /// Debian's package that brings it.
        package: &'static str,
    },
    /// It could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// What the host said.
        source: io::Error,
    },
    /// It failed.
    #[error("{program} failed ({status}):\n{output}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit status or signal.
        status: String,
        /// The end of what it wrote to standard error.
        output: String,
    },
}

/// Whether this host has Debian's package manager.
pub fn has_apt() -> bool {
    std::path::Path::new("/usr/bin/apt-get").exists()
}

/// How one of Debian's packages gets here.
pub fn install(package: &str, has_apt: bool) -> String {
    match has_apt {
        true => format!("install it: apt install {package}"),
        false => format!(
            "install what is {package} in Debian by this system's packages. Where there is no such package, build images on \
             a machine with Debian or Ubuntu: `lab bundle build` there and `lab up --offline` here need nothing of that"
        ),
    }
}

/// Run a program to its end and return what it wrote to standard output.
pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>, Error> {
    let output = command.output().map_err(|source| start_error(command.get_program(), source))?;
    check(command.get_program(), output)
}

/// Whether a program that another one is to start is there.
pub(crate) fn is_installed(program: &str) -> Result<(), Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
        return Ok(());
    }
    Err(start_error(OsStr::new(program), io::ErrorKind::NotFound.into()))
}

/// The error for a program that could not be started.
pub(crate) fn start_error(program: &OsStr, source: io::Error) -> Error {
    let program = program.to_string_lossy().into_owned();
    match (source.kind(), package(&program)) {
        (io::ErrorKind::NotFound, Some(package)) => Error::Missing { program, package },
        _ => Error::Start { program, source },
    }
}

/// Standard output of a program that succeeded, or the error that tells how it failed.
pub(crate) fn check(program: &OsStr, output: Output) -> Result<Vec<u8>, Error> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let program = program.to_string_lossy().into_owned();
    Err(Error::Failed { program, status: output.status.to_string(), output: last_lines(&output.stderr) })
}

/// The last 20 lines of a program's output.
pub(crate) fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Debian's package for each program that is used here.
fn package(program: &str) -> Option<&'static str> {
    Some(match program {
        "mmdebstrap" => "mmdebstrap debian-archive-keyring",
        "mke2fs" => "e2fsprogs",
        "dpkg-deb" => "dpkg",
        "tar" => "tar",
        "unshare" => "util-linux",
        "newuidmap" => "uidmap",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let error = start_error(OsStr::new("mke2fs"), io::ErrorKind::NotFound.into());
        let how = install("e2fsprogs", has_apt());
        assert_eq!(error.to_string(), format!("mke2fs is missing; {how}"));
        assert_eq!(install("e2fsprogs", true), "install it: apt install e2fsprogs");
        assert!(install("e2fsprogs", false).contains("e2fsprogs in Debian by this system's packages"));
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo too bad >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed (exit status: 3):\ntoo bad");
        assert_eq!(run(Command::new("echo").arg("hello")).unwrap(), b"hello\n");
    }
}
