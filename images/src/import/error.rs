//! Why an image could not be imported.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::kernel;

/// Why an image could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The qcow2 image cannot be used.
    #[error(transparent)]
    Qcow2(#[from] lab_vmm::qcow2::Error),
    /// The image stands on another file, which would have to be imported with it.
    #[error("it has the backing file {}: make one file of both first (qemu-img convert -O qcow2)", .0.display())]
    HasBacking(PathBuf),
    /// It is no disk image, or one in another format.
    #[error("it is {what}: {step}")]
    OtherFormat {
        /// What it is.
        what: &'static str,
        /// What to do about it.
        step: &'static str,
    },
    /// The disk ends before what is on it.
    #[error("it is truncated: what is on it ends at byte {end}, the disk at byte {length}; copy it again")]
    Truncated {
        /// Where the last partition or file system ends, in bytes.
        end: u64,
        /// Size of the disk in bytes.
        length: u64,
    },
    /// A partition table that contradicts itself.
    #[error("{0}: copy it again, or repair a copy (sgdisk -e FILE)")]
    PartitionTable(&'static str),
    /// Neither a partition table nor a file system that is known here.
    #[error(
        "it has neither a partition table nor a file system that lab knows; lab imports cloud images of Debian, Ubuntu and \
         others with an ext4 root"
    )]
    NoFileSystem,
    /// No partition holds a system.
    #[error(
        "none of its file systems is a Linux system's root that lab reads (ext4, with usr/lib/os-release); it has {0}. \
         Take an image with an ext4 root, as Debian and Ubuntu make them"
    )]
    NoRoot(String),
    /// No kernel; what is there instead, with a comma in front, or nothing.
    #[error(
        "it has no kernel with an initrd in /boot (vmlinuz-VERSION, and initrd.img-VERSION or initramfs-VERSION.img){0}"
    )]
    NoKernel(String),
    /// What should be an initrd is none.
    #[error(
        "{0} in it is neither a cpio archive nor compressed as Linux knows it: no kernel could use it as its initrd"
    )]
    NoInitrd(String),
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
    #[error("{file} in it cannot be used: {source}")]
    Kernel {
        /// The kernel.
        file: String,
        /// Why.
        source: kernel::Error,
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

/// Makes the error of a file that could not be read or written.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}
