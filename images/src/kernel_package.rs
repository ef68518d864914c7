//! A distribution's kernel package, unpacked and not installed: the kernel, its modules, and the static busybox that
//! an initramfs of ours is made with.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::archive::{self, Deb, Package};

/// The kernel for virtual machines in Debian.
pub const CLOUD_KERNEL: &str = "linux-image-cloud-amd64";
/// Busybox, linked statically.
const BUSYBOX: &str = "busybox-static";
/// What the folder contains, written last.
const RECORD: &str = "packages.json";

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// A package without the file that it was downloaded for.
    #[error("{package} has no {file}")]
    Missing {
        /// The package.
        package: String,
        /// The file.
        file: &'static str,
    },
    /// The host refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A kernel's files.
#[derive(Debug, Clone)]
pub struct KernelPackage {
    /// The kernel as the package has it (see [`crate::kernel::unpack`]).
    pub bzimage: PathBuf,
    /// Its modules: the folder named by the release, below `lib/modules`.
    pub modules_dir: PathBuf,
    /// The kernel's release, `6.12.48+deb13-cloud-amd64` (`uname -r`).
    pub version: String,
    /// Static busybox.
    pub busybox: PathBuf,
    /// The packages that these came from: the kernel's, then busybox'.
    pub packages: Vec<Package>,
}

/// What `RECORD` holds.
#[derive(Serialize, Deserialize)]
struct Record {
    packages: Vec<Package>,
}

/// Download and unpack the cloud kernel of a Debian suite (`trixie`) into the folder `dest`, which appears when it is
/// complete and replaces an earlier one. Takes some ten seconds.
pub fn fetch(dest: &Path, suite: &str) -> Result<KernelPackage, Error> {
    fetch_kernel(dest, suite, CLOUD_KERNEL)
}

/// Like [`fetch`], with another kernel package.
pub fn fetch_kernel(dest: &Path, suite: &str, kernel: &str) -> Result<KernelPackage, Error> {
    let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| io_error("create", parent, e))?;
    let work = tempfile::Builder::new()
        .prefix(".kernel-")
        .tempdir_in(parent)
        .map_err(|e| io_error("create a folder in", parent, e))?;
    let debs = work.path().join("debs");
    let files = work.path().join("files");
    for folder in [&debs, &files] {
        fs::create_dir(folder).map_err(|e| io_error("create", folder, e))?;
    }
    let downloaded = archive::download(suite, &[kernel, BUSYBOX], &debs)?;
    for deb in &downloaded {
        deb.unpack(&files)?;
    }
    let packages: Vec<Package> = downloaded.into_iter().map(|Deb { package, .. }| package).collect();
    let record = serde_json::to_vec(&Record { packages }).map_err(|e| io_error("write", &files, e.into()))?;
    fs::write(files.join(RECORD), record).map_err(|e| io_error("write", &files, e))?;
    open(&files)?;
    if dest.exists() {
        fs::remove_dir_all(dest).map_err(|e| io_error("replace", dest, e))?;
    }
    fs::rename(&files, dest).map_err(|e| io_error("create", dest, e))?;
    open(dest)
}

/// A kernel that [`fetch`] has put into the folder `dest`.
pub fn open(dest: &Path) -> Result<KernelPackage, Error> {
    let record = dest.join(RECORD);
    let bytes = fs::read(&record).map_err(|e| io_error("read", &record, e))?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|e| io_error("read", &record, e.into()))?;
    let missing = |file| Error::Missing {
        package: record.packages.first().map(|package| package.name.clone()).unwrap_or_default(),
        file,
    };
    let modules_dir =
        ["usr/lib/modules", "lib/modules"].iter().find_map(|folder| entry(&dest.join(folder), ""));
    let modules_dir = modules_dir.ok_or_else(|| missing("lib/modules"))?;
    // Beside its modules in Debian's from 7.x on.
    let beside = modules_dir.join("vmlinuz");
    let bzimage = entry(&dest.join("boot"), "vmlinuz-").or_else(|| beside.exists().then_some(beside));
    let bzimage = bzimage.ok_or_else(|| missing("boot/vmlinuz"))?;
    let version = modules_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let busybox =
        ["usr/bin/busybox", "bin/busybox"].iter().map(|path| dest.join(path)).find(|path| path.exists());
    let busybox = busybox.ok_or_else(|| missing("bin/busybox"))?;
    Ok(KernelPackage { bzimage, modules_dir, version, busybox, packages: record.packages })
}

/// The entry of a folder whose name begins so.
fn entry(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    entries
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { action, path: path.into(), source }
}
