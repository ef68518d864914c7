//! Import of a distribution's cloud image: its kernel and initrd are taken out, so that a node boots without firmware
//! and boot loader; the disk itself is copied. `volumes` is what is in its `partitions`, `boot` and `menu` choose the
//! kernel.

mod access;
mod boot;
mod disk;
mod efi;
mod error;
mod fields;
mod filesystem;
mod menu;
mod partitions;
mod recognise;
mod version;
mod volumes;

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use lab_vmm::config::DiskFormat;

use crate::{
    build, kernel,
    manifest::{self, Manifest, SshTransport},
};
use boot::Boot;
use disk::Disk;
pub use error::Error;
use error::io_error;

/// Import the image `path` into the folder `out`; returns the manifest, not yet written, and what the image seems to lack,
/// a sentence each.
pub(crate) fn import(
    name: &str,
    path: &Path,
    out: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<(Manifest, Vec<String>), Error> {
    let format = disk::format(path)?;
    let root_file = match format {
        DiskFormat::Raw => "root.img",
        DiskFormat::Qcow2 => "root.qcow2",
    };
    let root = out.join(root_file);
    let disk = match format {
        DiskFormat::Raw => Disk::open(path, format)?,
        DiskFormat::Qcow2 => {
            progress("unpacking the disk");
            guarded(|| disk::unpack(path, &root))?;
            Disk::open(&root, format)?
        }
    };
    progress("looking for kernel and initrd");
    let found = guarded(|| boot::find(&disk))?;
    if format == DiskFormat::Raw {
        progress("copying the disk");
        disk::copy_sparse(path, &root)?;
    }
    write_boot_files(&found, out)?;
    progress("computing digests");
    let mut files = BTreeMap::new();
    for file in ["kernel", "initrd", root_file] {
        let path = out.join(file);
        files.insert(file.to_owned(), manifest::digest_file(&path).map_err(io_error("read", &path))?);
    }
    let definition = files.get(root_file).map(|digest| digest.sha256.clone()).unwrap_or_default();
    let manifest = Manifest {
        version: manifest::VERSION,
        name: name.into(),
        description: found.description,
        architecture: "x86_64".into(),
        source: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        definition,
        created_unix_s: build::now_unix_s(),
        ssh: if found.ssh_over_vsock { SshTransport::Vsock } else { SshTransport::Tcp },
        clock_port: None,
        cloud_init: true,
        cmdline: format!("root={} ro console=hvc0 quiet", found.root),
        root_file: root_file.into(),
        root_format: format,
        root_bytes: disk.size_bytes(),
        root_sector_bytes: found.sector_bytes,
        files,
        packages: Vec::new(),
    };
    Ok((manifest, found.warnings))
}

/// Do what reads an image: that is anybody's, and a panic of a library is about it, too.
fn guarded<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Error::Nonsense)?
}

fn write_boot_files(found: &Boot, out: &Path) -> Result<(), Error> {
    let kernel = out.join("kernel");
    let unpacked = kernel::unpack(&found.kernel)
        .map_err(|source| Error::Kernel { file: found.kernel_path.clone(), source })?;
    fs::write(&kernel, unpacked).map_err(io_error("write", &kernel))?;
    let initrd = out.join("initrd");
    fs::write(&initrd, &found.initrd).map_err(io_error("write", &initrd))
}

#[cfg(test)]
mod tests;
