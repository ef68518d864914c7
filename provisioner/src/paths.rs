//! Where lab keeps what: `LAB_HOME` for what lasts, the runtime folder for sockets.

use std::{
    env, fs,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::files::hex;

/// Longest path that a UNIX socket can have (unix(7): `sun_path` is 108 bytes with its final zero).
const LONGEST_SOCKET_PATH: usize = 107;
/// Longest name that is used as it is in the path of a socket, of a lab or node, in bytes.
const LONGEST_NAME: usize = 16;
/// Longest file name that is put below a lab's runtime folder: a node's name, `.ssh`, and the 17 bytes that OpenSSH
/// appends to a ControlPath while it binds it.
const LONGEST_SOCKET_NAME: usize = LONGEST_NAME + 4 + 17;

/// A link in the folder of a lab, or of the emulated host, to that of its sockets.
const SOCKETS: &str = "sockets";

/// A lab's folder for what steps of stacks give each other.
pub const SECRETS: &str = "secrets";

/// Why a folder of lab's cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither variable is set.
    #[error("no home for lab: set LAB_HOME, XDG_DATA_HOME or HOME")]
    NoHome,
    /// The folder can't be made or read.
    #[error("cannot use the folder {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// Someone else could reach into it.
    #[error("the folder {0} belongs to another user: set XDG_RUNTIME_DIR to a folder of your own")]
    NotOurs(PathBuf),
    /// It is somebody else's.
    #[error("{path} belongs to the user with the number {owner}: set LAB_HOME to a folder of your own")]
    HomeNotOurs {
        /// The folder for what lasts.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// A socket below it could not be bound.
    #[error(
        "the folder {0} has too long a path for sockets (they are limited to 107 bytes): set XDG_RUNTIME_DIR to a shorter one"
    )]
    TooLong(PathBuf),
}

/// The folders of this user.
#[derive(Debug, Clone)]
pub struct Paths {
    home: PathBuf,
    runtime: PathBuf,
    /// What `LAB_BUNDLES` names.
    bundles: Vec<PathBuf>,
}

impl Paths {
    /// Finds the folders from the environment: `LAB_HOME`, else `$XDG_DATA_HOME/lab`, else `~/.local/share/lab`; sockets
    /// in `$XDG_RUNTIME_DIR/lab`, else `/run/lab` (root) or `/tmp/lab-UID`.
    pub fn from_env() -> Result<Self, Error> {
        let var = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = var("LAB_HOME")
            .or_else(|| var("XDG_DATA_HOME").map(|dir| dir.join("lab")))
            .or_else(|| var("HOME").map(|dir| dir.join(".local/share/lab")))
            .ok_or(Error::NoHome)?;
        let home =
            std::path::absolute(&home).map_err(|source| Error::Folder { path: home.clone(), source })?;
        let uid = rustix::process::getuid();
        not_of_others(&home, uid.as_raw())?;
        let runtime = var("XDG_RUNTIME_DIR").map(|dir| dir.join("lab")).unwrap_or_else(|| {
            if uid.is_root() { "/run/lab".into() } else { format!("/tmp/lab-{}", uid.as_raw()).into() }
        });
        let bundles = env::var_os("LAB_BUNDLES").unwrap_or_default();
        let bundles = env::split_paths(&bundles).filter(|folder| !folder.as_os_str().is_empty()).collect();
        Ok(Self { home, runtime, bundles })
    }

    /// The same in folders of a test's own, whatever the environment says.
    #[cfg(test)]
    pub fn at(home: &Path, runtime: &Path) -> Self {
        Self { home: home.into(), runtime: runtime.into(), bundles: Vec::new() }
    }

    /// The folder for what lasts.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.home.join("images")
    }

    /// The folders that may be bundles: what `LAB_BUNDLES` names, the home's own folder of them, and each folder in it.
    pub fn bundles(&self) -> Vec<PathBuf> {
        let own = self.home.join("bundles");
        let mut below: Vec<PathBuf> =
            fs::read_dir(&own).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        below.sort();
        below.retain(|path| path.is_dir());
        [self.bundles.clone(), vec![own], below].concat()
    }

    /// Where the files of bundles are that came with the offline bundle of lab `name`.
    pub fn offline_bundle(&self, name: &str) -> PathBuf {
        self.home.join("bundles").join(format!("offline-{name}"))
    }

    /// The folder of all labs.
    pub fn labs(&self) -> PathBuf {
        self.home.join("labs")
    }

    /// The folders of lab `name`; none of them is made yet.
    pub fn lab(&self, name: &str) -> LabPaths {
        let dir = self.labs().join(name);
        LabPaths { sockets: self.sockets(&dir, name), dir }
    }

    /// Where the sockets are of what is called `name` and lies in `dir`: where it was started, whatever the environment of
    /// the command that asks (a desktop's session and a job of cron's have different ones), or where it would be now.
    pub fn sockets(&self, dir: &Path, name: &str) -> PathBuf {
        let recorded = fs::read_link(dir.join(SOCKETS)).ok().filter(|folder| folder.is_dir());
        recorded.unwrap_or_else(|| self.runtime.join(socket_folder(&self.home, name)))
    }
}

/// Name of a lab's folder for sockets. Two values of `LAB_HOME` may both have a lab of this name.
fn socket_folder(home: &Path, name: &str) -> String {
    use std::os::unix::ffi::OsStrExt;
    format!("{}-{}", short(name), digest(home.as_os_str().as_bytes(), 3))
}

/// The first bytes of a digest.
fn digest(of: &[u8], bytes: usize) -> String {
    use sha2::{Digest, Sha256};
    hex(Sha256::digest(of).get(..bytes).unwrap_or_default())
}

/// A name, short enough for the path of a socket.
fn short(name: &str) -> String {
    if name.len() <= LONGEST_NAME {
        return name.into();
    }
    let begin: String = name.chars().take(LONGEST_NAME - 9).collect();
    format!("{begin}-{}", digest(name.as_bytes(), 4))
}

/// The folders of one lab.
#[derive(Debug, Clone)]
pub struct LabPaths {
    /// What lasts: `LAB_HOME/labs/NAME`.
    pub dir: PathBuf,
    /// Sockets.
    pub sockets: PathBuf,
}

impl LabPaths {
    /// Makes the folders, for this user alone.
    pub fn create(&self) -> Result<(), Error> {
        let longest = self.sockets.as_os_str().len() + 1 + LONGEST_SOCKET_NAME;
        if longest > LONGEST_SOCKET_PATH {
            return Err(Error::TooLong(self.sockets.clone()));
        }
        private_dir(&self.dir)?;
        for part in ["nodes", "net", "ssh", SECRETS] {
            private_dir(&self.dir.join(part))?;
        }
        if let Some(parent) = self.sockets.parent() {
            private_dir(parent)?;
            owned(parent)?;
        }
        private_dir(&self.sockets)?;
        record_sockets(&self.dir, &self.sockets)
    }

    /// Recorded state of the lab.
    pub fn state(&self) -> PathBuf {
        self.dir.join("lab.json")
    }

    /// The private key that opens all nodes of the lab.
    pub fn identity(&self) -> PathBuf {
        self.dir.join("ssh").join("id_ed25519")
    }

    /// How OpenSSH's tools get into the nodes that a command names (ssh_config(5)).
    pub fn ssh_config(&self) -> PathBuf {
        self.dir.join("ssh").join("config")
    }

    /// What steps of stacks give each other.
    pub fn secrets(&self) -> PathBuf {
        self.dir.join(SECRETS)
    }

    /// Held by the command that is changing the lab.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// A node's folder.
    pub fn node(&self, node: &str) -> PathBuf {
        self.dir.join("nodes").join(node)
    }

    /// A node's socket for `kind`: `ctl`, `vsock`, `console`, `ssh`.
    pub fn node_socket(&self, node: &str, kind: &str) -> PathBuf {
        self.sockets.join(format!("{}.{kind}", short(node)))
    }

    /// `lab-net`'s folder.
    pub fn net(&self) -> PathBuf {
        self.dir.join("net")
    }

    /// `lab-net`'s socket for cards.
    pub fn net_socket(&self) -> PathBuf {
        self.sockets.join("net.sock")
    }

    /// `lab-net`'s control socket.
    pub fn net_control(&self) -> PathBuf {
        self.sockets.join("net.ctl")
    }
}

/// Notes in `dir` where the sockets are of what lies there, for [`Paths::sockets`].
pub fn record_sockets(dir: &Path, sockets: &Path) -> Result<(), Error> {
    let link = dir.join(SOCKETS);
    if fs::read_link(&link).is_ok_and(|recorded| recorded == sockets) {
        return Ok(());
    }
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(sockets, &link).map_err(|source| Error::Folder { path: link, source })
}

/// Makes a folder, with those above it, that only this user may enter.
pub fn private_dir(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| Error::Folder { path: path.into(), source })
}

/// Refuses a home of somebody else's, in which each file would be refused for another reason. Root may look after all.
fn not_of_others(home: &Path, uid: u32) -> Result<(), Error> {
    match fs::metadata(home) {
        Ok(data) if data.uid() != uid && uid != 0 => {
            Err(Error::HomeNotOurs { path: home.into(), owner: data.uid() })
        }
        _ => Ok(()),
    }
}

fn owned(path: &Path) -> Result<(), Error> {
    let data = fs::symlink_metadata(path).map_err(|source| Error::Folder { path: path.into(), source })?;
    if !data.is_dir() || data.uid() != rustix::process::getuid().as_raw() || data.mode() & 0o077 != 0 {
        return Err(Error::NotOurs(path.into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_s_folders_are_private() {
        let base = tempfile::tempdir().unwrap();
        let paths = Paths::at(&base.path().join("home"), &base.path().join("run"));
        let lab = paths.lab("demo");
        lab.create().unwrap();
        for dir in [&lab.dir, &lab.sockets, &lab.net(), &lab.secrets()] {
            assert_eq!(fs::metadata(dir).unwrap().mode() & 0o777, 0o700, "{}", dir.display());
        }
    }

    #[test]
    fn sockets_are_where_the_lab_was_brought_up() {
        let base = tempfile::tempdir().unwrap();
        let home = base.path().join("home");
        let [desktop, cron] = ["desktop", "cron"].map(|name| Paths::at(&home, &base.path().join(name)));
        desktop.lab("demo").create().unwrap();
        assert_eq!(cron.lab("demo").sockets, desktop.lab("demo").sockets);
        cron.lab("demo").create().unwrap();
        assert!(!base.path().join("cron").exists());
        // The desktop's session is over.
        fs::remove_dir_all(base.path().join("desktop")).unwrap();
        cron.lab("demo").create().unwrap();
        assert!(cron.lab("demo").sockets.starts_with(base.path().join("cron")));
        assert_eq!(desktop.lab("demo").sockets, cron.lab("demo").sockets);
    }

    #[test]
    fn every_valid_name_has_room_for_its_sockets() {
        let longest = "n".repeat(63);
        let lab = Paths::at(Path::new("/home/ann/.local/share/lab"), Path::new("/run/user/4294967294/lab"))
            .lab(&longest);
        for kind in ["ctl", "vsock", "console", "ready", "behind", "ssh.0123456789abcdef"] {
            assert!(lab.node_socket(&longest, kind).as_os_str().len() <= LONGEST_SOCKET_PATH, "{kind}");
        }
        assert_ne!(lab.node_socket(&longest, "ctl"), lab.node_socket(&longest[1..], "ctl"));
        assert!(lab.node_socket("worker1", "ctl").ends_with("worker1.ctl"));
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let paths = Paths::at(base.path(), &base.path().join("x".repeat(90)));
        assert!(matches!(paths.lab("demo").create(), Err(Error::TooLong(_))));
    }

    #[test]
    fn a_home_of_somebody_else_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let owner = fs::metadata(base.path()).unwrap().uid();
        assert!(not_of_others(base.path(), owner).is_ok() && not_of_others(base.path(), 0).is_ok());
        assert!(not_of_others(&base.path().join("new"), owner + 1).is_ok());
        let error = not_of_others(base.path(), owner + 1).unwrap_err().to_string();
        assert!(
            error.contains(&format!("belongs to the user with the number {owner}: set LAB_HOME")),
            "{error}"
        );
    }

    #[test]
    fn a_runtime_folder_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let base = tempfile::tempdir().unwrap();
        let runtime = base.path().join("run");
        fs::create_dir(&runtime).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o777)).unwrap();
        let paths = Paths::at(base.path(), &runtime);
        assert!(matches!(paths.lab("demo").create(), Err(Error::NotOurs(_))));
    }
}
