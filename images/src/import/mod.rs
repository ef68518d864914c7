//! Import of a distribution's cloud image: its kernel and initrd are taken out, so that a node boots without firmware
//! and boot loader; the disk itself is copied as it is.

mod boot;
mod disk;
mod version;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use lab_vmm::config::DiskFormat;

use crate::{
    build, kernel,
    manifest::{self, Manifest, SshTransport},
};
use boot::Boot;
use disk::Disk;

/// Why an image could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The qcow2 image cannot be used.
    #[error(transparent)]
    Qcow2(#[from] lab_vmm::qcow2::Error),
    /// The image stands on another file, which would have to be imported with it.
    #[error("it has the backing file {}: make one file of both first (qemu-img convert -O qcow2)", .0.display())]
    HasBacking(PathBuf),
    /// The disk ends before what is on it.
    #[error("it is truncated: what is on it ends at byte {end}, the disk at byte {length}; copy it again")]
    Truncated {
        /// Where the last partition or file system ends, in bytes.
        end: u64,
        /// Size of the disk in bytes.
        length: u64,
    },
    /// Neither a partition table nor a file system that is known here.
    #[error(
        "it has neither a GUID partition table nor an ext4 file system; lab imports cloud images of Debian, Ubuntu and others like them"
    )]
    NoFileSystem,
    /// No partition holds a system.
    #[error("none of its file systems is a Linux system's root (ext4, with usr/lib/os-release); seen: {0}")]
    NoRoot(String),
    /// No kernel.
    #[error(
        "it has no kernel with an initrd in /boot (vmlinuz-VERSION, initrd.img-VERSION or initramfs-VERSION.img)"
    )]
    NoKernel,
    /// A file that is too large to be what it should be.
    #[error("{file} in it has {bytes} bytes, which is too much for a kernel or an initrd")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
    },
    /// A file system that contradicts itself.
    #[error("its file system is damaged: {0}")]
    FileSystem(String),
    /// Reading the image made one of the libraries give up.
    #[error("it is damaged: its tables make no sense")]
    Nonsense,
    /// The kernel cannot be unpacked.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
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

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// Import the image `path` into the folder `out`; returns the manifest, not yet written.
pub(crate) fn import(
    name: &str,
    path: &Path,
    out: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Manifest, Error> {
    progress("looking for kernel and initrd");
    let disk = Disk::open(path)?;
    // What is in the image is anybody's; a panic of a library is about the image, too.
    let found = catch_unwind(AssertUnwindSafe(|| boot::find(&disk))).map_err(|_| Error::Nonsense)??;
    write_boot_files(&found, out)?;
    progress("copying the disk");
    let format = disk.format();
    let root_file = match format {
        DiskFormat::Raw => "root.img",
        DiskFormat::Qcow2 => "root.qcow2",
    };
    let root = out.join(root_file);
    disk::copy_sparse(path, &root)?;
    progress("computing digests");
    let mut files = BTreeMap::new();
    for file in ["kernel", "initrd", root_file] {
        let path = out.join(file);
        files.insert(file.to_owned(), manifest::digest_file(&path).map_err(io_error("read", &path))?);
    }
    let definition = files.get(root_file).map(|digest| digest.sha256.clone()).unwrap_or_default();
    Ok(Manifest {
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
        files,
        packages: Vec::new(),
    })
}

fn write_boot_files(found: &Boot, out: &Path) -> Result<(), Error> {
    let kernel = out.join("kernel");
    fs::write(&kernel, kernel::unpack(&found.kernel)?).map_err(io_error("write", &kernel))?;
    let initrd = out.join("initrd");
    fs::write(&initrd, &found.initrd).map_err(io_error("write", &initrd))
}

/// A file that is read from; its path goes into messages.
fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(io_error("open", path))
}

#[cfg(test)]
mod tests;
