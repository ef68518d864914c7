//! What a definition lays over the packages' files: its files and links, and the kernel's modules.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
};

use super::{Error, io_error};
use crate::{command, definition::Definition, initramfs, kernel_package::KernelPackage};

/// Files beside a kernel's modules that `depmod` needs.
const MODULE_LISTS: &[&str] = &["modules.order", "modules.builtin", "modules.builtin.modinfo"];

/// Write the tar archive `tar`, with a temporary tree in `work`.
pub(super) fn write(
    definition: &Definition,
    kernel: &KernelPackage,
    work: &Path,
    tar: &Path,
) -> Result<(), Error> {
    let tree = work.join("overlay");
    create_folders(&tree)?;
    for file in &definition.files {
        let path = inside(&tree, &file.path)?;
        fs::write(&path, &file.bytes).map_err(io_error("write", &path))?;
        let mode = fs::Permissions::from_mode(file.mode);
        fs::set_permissions(&path, mode).map_err(io_error("write", &path))?;
    }
    for link in &definition.links {
        let path = inside(&tree, &link.path)?;
        symlink(&link.target, &path).map_err(io_error("write", &path))?;
    }
    if definition.modules {
        modules(kernel, &tree)?;
    }
    // Everything belongs to root, whoever builds. The tree itself is not a member: its mode is not the image's.
    let mut command = Command::new("tar");
    command.args(["--owner=root:0", "--group=root:0", "--sort=name", "-cf"]).arg(tar).arg("-C").arg(&tree);
    let mut entries = Vec::new();
    for entry in fs::read_dir(&tree).map_err(io_error("read", &tree))? {
        entries.push(entry.map_err(io_error("read", &tree))?.file_name());
    }
    if entries.is_empty() {
        command.args(["--files-from", "/dev/null"]);
    }
    command::run(command.args(entries))?;
    Ok(())
}

/// The kernel's modules, unpacked, so that no node has to unpack them when it loads them.
fn modules(kernel: &KernelPackage, tree: &Path) -> Result<(), Error> {
    let from = &kernel.modules_dir;
    let to = tree.join("usr/lib/modules").join(&kernel.version);
    let modules = initramfs::Tree::open(from).map_err(initramfs::Error::from)?;
    for file in modules.files() {
        let relative = file.strip_prefix(from).unwrap_or(file).with_extension("");
        let relative = if relative.extension().is_some() { relative } else { relative.with_extension("ko") };
        let path = to.join(relative);
        create_folders(path.parent().unwrap_or(&to))?;
        let bytes = initramfs::unpack_module(file).map_err(initramfs::Error::from)?;
        fs::write(&path, bytes).map_err(io_error("write", &path))?;
    }
    for list in MODULE_LISTS {
        fs::copy(from.join(list), to.join(list)).map_err(io_error("copy", &from.join(list)))?;
    }
    Ok(())
}

/// The place of an absolute path below `tree`, whose parents are made.
fn inside(tree: &Path, path: &str) -> Result<std::path::PathBuf, Error> {
    let place = tree.join(path.trim_start_matches('/'));
    create_folders(place.parent().unwrap_or(tree))?;
    Ok(place)
}

/// Make folders that everybody may enter, whatever the umask is: they become the image's.
fn create_folders(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_folders(parent)?;
    }
    fs::create_dir(path).map_err(io_error("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io_error("create", path))
}
