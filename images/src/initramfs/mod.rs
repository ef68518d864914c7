//! Initial RAM file systems of our own making: static busybox, the few kernel modules that are needed and an `/init`.
//! No udev, nothing compressed, few processes: a node is on its own root within a fraction of a second.

mod modules;

use std::{collections::BTreeMap, io::Write, path::Path};

use cpio::newc::{self, ModeFileType};

pub use modules::{Error as ModuleError, Module, Tree, unpack as unpack_module};

/// The nodes' `/init`.
pub const NODE_INIT: &[u8] = include_bytes!("../../initramfs/init");

/// Modules that a node's initramfs loads; what a kernel has built in is left out.
pub const NODE_MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "button", "evdev", "ext4"];

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that leaves the archive or names nothing.
    #[error("{0:?} cannot be a path in an initramfs")]
    BadPath(String),
    /// A file that the format cannot hold.
    #[error("{path} has {bytes} bytes: too many for an initramfs")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// A kernel module cannot be had.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// Writing failed.
    #[error("cannot write the initramfs: {0}")]
    Write(#[from] std::io::Error),
}

/// What is at a path.
#[derive(Debug, Clone)]
enum Entry {
    Folder { mode: u32 },
    File { mode: u32, bytes: Vec<u8> },
    Symlink { target: String },
    CharacterDevice { mode: u32, major: u32, minor: u32 },
}

/// An initramfs in the making. Paths are absolute; parent folders that are not named get mode 0755.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    entries: BTreeMap<String, Entry>,
}

impl Builder {
    /// An archive without anything.
    pub fn new() -> Builder {
        Builder::default()
    }

    /// An archive that can run an `/init` of busybox' shell: busybox as `/bin/busybox` and `/bin/sh` (its applets need
    /// no links: the shell finds them once `/proc` is mounted), `/dev/console`, empty `/proc`, `/sys`, `/root`.
    pub fn with_busybox(busybox: Vec<u8>, init: &[u8]) -> Result<Builder, Error> {
        let mut builder = Builder::new();
        builder.file("/bin/busybox", 0o755, busybox)?;
        builder.symlink("/bin/sh", "busybox")?;
        builder.file("/init", 0o755, init.to_vec())?;
        for folder in ["/dev", "/proc", "/sys", "/root"] {
            builder.folder(folder, 0o755)?;
        }
        let console = Entry::CharacterDevice { mode: 0o600, major: 5, minor: 1 };
        builder.insert("/dev/console", console)?;
        Ok(builder)
    }

    /// Add a file with these permission bits.
    pub fn file(&mut self, path: &str, mode: u32, bytes: Vec<u8>) -> Result<&mut Builder, Error> {
        self.insert(path, Entry::File { mode: mode & 0o7777, bytes })
    }

    /// Add a folder with these permission bits.
    pub fn folder(&mut self, path: &str, mode: u32) -> Result<&mut Builder, Error> {
        self.insert(path, Entry::Folder { mode: mode & 0o7777 })
    }

    /// Add a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Builder, Error> {
        self.insert(path, Entry::Symlink { target: target.into() })
    }

    /// Add kernel modules, by name, with all that they depend on, unpacked, and the `modules.dep` with which
    /// `modprobe -a NAME…` loads them in order. `modules_dir` is `lib/modules/RELEASE` of the kernel. A module that is
    /// built into the kernel is passed over; one that the kernel does not have is an error. Returns the names that are
    /// there to be loaded.
    pub fn modules<'a>(&mut self, modules_dir: &Path, names: &[&'a str]) -> Result<Vec<&'a str>, Error> {
        let tree = modules::Tree::open(modules_dir)?;
        let chosen = tree.closure(names)?;
        let folder = format!("/lib/modules/{}", tree.release());
        let mut dependencies = String::new();
        for module in &chosen {
            dependencies.push_str(&format!("{}.ko:", module.name));
            for dependency in module.all_dependencies(&chosen) {
                dependencies.push_str(&format!(" {dependency}.ko"));
            }
            dependencies.push('\n');
        }
        let loadable = names
            .iter()
            .copied()
            .filter(|name| chosen.iter().any(|m| m.name == modules::normal(name)))
            .collect();
        for module in chosen {
            self.file(&format!("{folder}/{}.ko", module.name), 0o644, module.bytes)?;
        }
        self.file(&format!("{folder}/modules.dep"), 0o644, dependencies.into_bytes())?;
        Ok(loadable)
    }

    /// The archive, in the format "newc", uncompressed.
    pub fn finish(self) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        // The map is sorted, so folders come before what is in them, as the kernel needs it.
        for (number, (path, entry)) in (1u32..).zip(&self.entries) {
            let header = newc::Builder::new(path).ino(number);
            let (header, bytes) = match entry {
                Entry::Folder { mode } => {
                    (header.mode(*mode).set_mode_file_type(ModeFileType::Directory).nlink(2), &[][..])
                }
                Entry::File { mode, bytes } => {
                    (header.mode(*mode).set_mode_file_type(ModeFileType::Regular), bytes.as_slice())
                }
                Entry::Symlink { target } => {
                    (header.mode(0o777).set_mode_file_type(ModeFileType::Symlink), target.as_bytes())
                }
                Entry::CharacterDevice { mode, major, minor } => {
                    let header = header.mode(*mode).set_mode_file_type(ModeFileType::Char);
                    (header.rdev_major(*major).rdev_minor(*minor), &[][..])
                }
            };
            let Ok(size) = u32::try_from(bytes.len()) else {
                return Err(Error::TooLarge { path: path.clone(), bytes: bytes.len() });
            };
            let mut writer = header.write(&mut out, size);
            writer.write_all(bytes)?;
            writer.finish()?;
        }
        newc::trailer(&mut out)?;
        Ok(out)
    }

    fn insert(&mut self, path: &str, entry: Entry) -> Result<&mut Builder, Error> {
        let relative = path.strip_prefix('/').unwrap_or(path);
        let bad = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
        if relative.split('/').any(bad) {
            return Err(Error::BadPath(path.into()));
        }
        for (end, _) in relative.match_indices('/') {
            let parent = relative[..end].to_owned();
            self.entries.entry(parent).or_insert(Entry::Folder { mode: 0o755 });
        }
        self.entries.insert(relative.into(), entry);
        Ok(self)
    }
}

/// The initramfs with which our images start.
pub fn node_initramfs(busybox: Vec<u8>, modules_dir: &Path) -> Result<Vec<u8>, Error> {
    let mut builder = Builder::with_busybox(busybox, NODE_INIT)?;
    let loadable = builder.modules(modules_dir, NODE_MODULES)?;
    builder.file("/modules", 0o644, loadable.join(" ").into_bytes())?;
    builder.finish()
}

/// A node's own files, as a second initrd behind [`node_initramfs`]: (path, permission bits, content).
///
/// What is below `/node/run/` is found below `/run` in the booted node; what lies elsewhere is lost when the root file
/// system takes over. Folders named `credentials` and all below them are for root alone (systemd takes
/// `/node/run/credentials/@initrd/NAME` for the system credential NAME).
pub fn node_cpio(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>, Error> {
    let mut builder = Builder::new();
    for (path, mode, bytes) in files {
        let relative = path.strip_prefix('/').unwrap_or(path);
        for (end, _) in relative.match_indices('/') {
            let parent = &relative[..end];
            let private = parent.split('/').any(|part| part == "credentials");
            builder.folder(parent, if private { 0o700 } else { 0o755 })?;
        }
        builder.file(path, *mode, bytes.to_vec())?;
    }
    builder.finish()
}

#[cfg(test)]
mod tests;
