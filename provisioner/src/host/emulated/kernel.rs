//! The emulated machine's kernel and modules: Debian's kernel for virtual machines, unpacked once.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::json_file;

/// Suite that the kernel comes from.
const SUITE: &str = "trixie";
/// What commands need before they can run.
const FIRST: [&str; 2] = ["virtio_net", "kvm_amd"];
/// What can follow while they do: what other hypervisors need that lab is measured against.
const LATER: [&str; 3] = ["tun", "vhost_vsock", "overlay"];
/// What a signed module ends with (scripts/sign-file.c in Linux), behind `struct module_signature`.
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
/// Size of `struct module_signature` in bytes; its last four are the signature's length, big-endian.
const SIGNATURE_HEADER: usize = 12;
/// Changed when what this file makes changes, so that older folders are made anew.
const RECIPE: u32 = 1;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be had.
    #[error("the emulated host's kernel cannot be had: {0}")]
    Fetch(#[from] lab_images::kernel_package::Error),
    /// It does not unpack.
    #[error("the emulated host's kernel is not what was expected: {0}")]
    Unpack(#[from] lab_images::kernel::Error),
    /// A module is missing or does not unpack.
    #[error("the emulated host's kernel is not what was expected: {0}")]
    Modules(#[from] lab_images::initramfs::ModuleError),
    /// A file can't be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The record can't be read or written.
    #[error(transparent)]
    Record(#[from] json_file::Error),
}

/// A kernel, ready to be started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    recipe: u32,
    /// Its release (`uname -r`).
    pub release: String,
    /// Names of the modules that must be loaded first, in order, each a file below `modules/`.
    pub first: Vec<String>,
    /// Names of those that may follow.
    pub later: Vec<String>,
}

/// Path of the ELF kernel in a kernel's folder.
pub fn image(folder: &Path) -> PathBuf {
    folder.join("vmlinux")
}

/// Path of a module in a kernel's folder.
pub fn module(folder: &Path, name: &str) -> PathBuf {
    folder.join("modules").join(format!("{name}.ko"))
}

/// The kernel in `folder`; `None` if it has to be prepared.
pub fn open(folder: &Path) -> Option<Kernel> {
    let kernel: Option<Kernel> = json_file::read(&folder.join("kernel.json")).ok()?;
    kernel.filter(|kernel| kernel.recipe == RECIPE)
}

/// Fetches the kernel from Debian's archive into `folder`, which appears when it is complete. Takes some ten seconds.
pub fn prepare(folder: &Path) -> Result<Kernel, Error> {
    let parent = folder.parent().unwrap_or(Path::new("."));
    let work =
        tempfile::Builder::new().prefix(".kernel-").tempdir_in(parent).map_err(io_error("write", parent))?;
    let package = lab_images::kernel_package::fetch(&work.path().join("package"), SUITE)?;
    let made = work.path().join("made");
    fs::create_dir_all(made.join("modules")).map_err(io_error("create", &made))?;

    let packed = fs::read(&package.bzimage).map_err(io_error("read", &package.bzimage))?;
    let path = image(&made);
    fs::write(&path, lab_images::kernel::unpack(&packed)?).map_err(io_error("write", &path))?;

    let tree = lab_images::initramfs::Tree::open(&package.modules_dir)?;
    let first: Vec<String> = tree.closure(&FIRST)?.into_iter().map(|module| module.name).collect();
    let all: Vec<&str> = FIRST.into_iter().chain(LATER).collect();
    let mut later = Vec::new();
    for found in tree.closure(&all)? {
        let path = module(&made, &found.name);
        fs::write(&path, without_signature(&found.bytes)).map_err(io_error("write", &path))?;
        if !first.contains(&found.name) {
            later.push(found.name);
        }
    }
    let kernel = Kernel { recipe: RECIPE, release: package.version, first, later };
    json_file::write(&made.join("kernel.json"), &kernel)?;
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(io_error("replace", folder))?;
    }
    fs::rename(&made, folder).map_err(io_error("create", folder))?;
    Ok(kernel)
}

/// A module without its signature: checking it takes the emulated processor longer than loading the module, and
/// whoever could change these files could as well change the kernel beside them.
fn without_signature(module: &[u8]) -> &[u8] {
    let split = || {
        let signed = module.strip_suffix(SIGNATURE_MARK)?;
        let (signed, header) = signed.split_at_checked(signed.len().checked_sub(SIGNATURE_HEADER)?)?;
        let length = u32::from_be_bytes(header.get(8..)?.try_into().ok()?) as usize;
        signed.get(..signed.len().checked_sub(length)?)
    };
    split().unwrap_or(module)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_cut_off() {
        let mut module = b"\x7fELF code".to_vec();
        module.extend(b"signature");
        module.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        module.extend(SIGNATURE_MARK);
        assert_eq!(without_signature(&module), b"\x7fELF code");
        assert_eq!(without_signature(b"\x7fELF code"), b"\x7fELF code");
        // A length beyond the file: nothing is cut.
        let mut wrong = vec![0xff; SIGNATURE_HEADER];
        wrong.extend(SIGNATURE_MARK);
        assert_eq!(without_signature(&wrong), wrong);
    }

    #[test]
    fn another_recipe_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(open(dir.path()), None);
        let mut kernel = Kernel { recipe: RECIPE, release: "6.12".into(), first: vec![], later: vec![] };
        json_file::write(&dir.path().join("kernel.json"), &kernel).unwrap();
        assert_eq!(open(dir.path()), Some(kernel.clone()));
        kernel.recipe += 1;
        json_file::write(&dir.path().join("kernel.json"), &kernel).unwrap();
        assert_eq!(open(dir.path()), None);
    }
}
