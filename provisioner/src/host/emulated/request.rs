//! What is asked of the emulated host and what it answers: the command with all that it would have here, the end of it,
//! and what is running after it.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    path::PathBuf,
};

use lab_net::config::Forward;
use serde::{Deserialize, Serialize};

use super::{Error, VERSION, files::Files};

/// Variables that mean something else on another machine.
const NOT_CARRIED: [&str; 12] = [
    "XDG_RUNTIME_DIR",
    "SSH_AUTH_SOCK",
    "SSH_CONNECTION",
    "SSH_CLIENT",
    "SSH_TTY",
    "DBUS_SESSION_BUS_ADDRESS",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "NOTIFY_SOCKET",
    "JOURNAL_STREAM",
    "INVOCATION_ID",
    "LAB_HOST",
];

/// A command to be run in the emulated host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub v: u32,
    /// The program and its arguments; none for a report alone.
    pub command: Vec<OsString>,
    /// Folder to run it in.
    pub folder: OsString,
    /// File mode mask.
    pub umask: u32,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Whether it gets a terminal.
    pub terminal: bool,
    /// Forwards that it will open.
    pub forwards: Vec<Forward>,
    /// Port of the real machine's 127.0.0.1 where signals come from and the answer is expected.
    pub port: u16,
    /// What has to be said there first.
    pub token: String,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Exit status, 128 and the signal's number if a signal ended it, or why it could not be started.
    pub ended: Result<u8, String>,
    /// What is running after it.
    pub report: Report,
}

/// What is running in the emulated host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Later reports have greater numbers.
    pub sequence: u64,
    /// Names of the labs that have a process.
    pub labs: Vec<String>,
    /// Forwards of all labs' networks.
    pub forwards: Vec<Forward>,
}

impl Request {
    /// A request for a command with this process' folder, mask and environment, whose answer is expected on `port`.
    pub fn new(files: &Files, command: Vec<OsString>, port: u16, token: String) -> Result<Self, Error> {
        Ok(Self {
            v: VERSION,
            command,
            folder: folder()?,
            umask: umask(),
            environment: environment(files),
            terminal: false,
            forwards: Vec::new(),
            port,
            token,
        })
    }
}

/// A request on disk, locked while its command is under way.
pub struct Written {
    /// Its file.
    pub path: PathBuf,
    _lock: File,
}

impl Written {
    /// Writes a request.
    pub fn new(files: &Files, request: &Request) -> Result<Self, Error> {
        let io = |source| Error::Io { what: "cannot write a request to the emulated host".into(), source };
        let bytes = serde_json::to_vec(request).map_err(|error| io(error.into()))?;
        // A name that nobody has had: what is remembered of a name in there need not be current.
        let mut file =
            tempfile::Builder::new().prefix("r").suffix(".json").tempfile_in(files.requests()).map_err(io)?;
        rustix::fs::flock(file.as_file(), rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| io(e.into()))?;
        file.write_all(&bytes).map_err(io)?;
        let (lock, path) = file.keep().map_err(|error| io(error.error))?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn folder() -> Result<OsString, Error> {
    std::env::current_dir()
        .map(Into::into)
        .map_err(|source| Error::Io { what: "cannot find the current folder".into(), source })
}

fn umask() -> u32 {
    // There is no way to read it but to set it; /proc has it since Linux 4.7.
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022)
}

fn environment(files: &Files) -> Vec<(OsString, OsString)> {
    let carried = std::env::vars_os()
        .filter(|(name, _)| !NOT_CARRIED.iter().any(|not| name == not) && name != "LAB_HOME");
    carried
        .chain([
            ("LAB_HOME".into(), files.home.clone().into()),
            ("LAB_HOST".into(), "local".into()),
            ("LAB_CARRIED".into(), "1".into()),
            ("XDG_RUNTIME_DIR".into(), runtime_folder().into()),
        ])
        .collect()
}

/// The runtime folder of the user that init has made in there.
pub fn runtime_folder() -> String {
    format!("/run/user/{}", rustix::process::getuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{json_file, lock};

    #[test]
    fn the_environment_says_where_it_is() {
        let files = Files { home: "/h".into(), dir: "/h/host".into(), sockets: "/s".into() };
        let environment = environment(&files);
        let get = |name: &str| {
            let values: Vec<_> = environment.iter().filter(|(n, _)| n == name).map(|(_, v)| v).collect();
            assert!(values.len() <= 1, "{name} is given twice");
            values.first().map(|value| value.to_string_lossy().into_owned())
        };
        assert_eq!(get("LAB_HOST").as_deref(), Some("local"));
        assert_eq!(get("LAB_HOME").as_deref(), Some("/h"));
        assert!(get("XDG_RUNTIME_DIR").unwrap().starts_with("/run/user/"));
        assert!(get("PATH").is_some());
    }

    #[test]
    fn a_request_is_locked_and_then_gone() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { home: dir.path().into(), dir: dir.path().into(), sockets: dir.path().into() };
        fs::create_dir(files.requests()).unwrap();
        let request = Request {
            v: VERSION,
            command: vec!["a b".into(), std::os::unix::ffi::OsStringExt::from_vec(vec![0xff, b'x'])],
            folder: "/".into(),
            umask: 0o27,
            environment: vec![("A".into(), "B".into())],
            terminal: false,
            forwards: Vec::new(),
            port: 1,
            token: "x".into(),
        };
        let written = Written::new(&files, &request).unwrap();
        assert!(lock::is_held(&written.path));
        assert_eq!(json_file::read(&written.path).unwrap(), Some(request));
        drop(written);
        assert_eq!(fs::read_dir(files.requests()).unwrap().count(), 0);
    }
}
