//! What is known of an image in the store: its file `manifest.json`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use lab_vmm::config::DiskFormat;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::archive::Package;

/// Version of the manifest's format.
pub const VERSION: u32 = 1;

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// Its name.
    pub name: String,
    /// One line on what it is.
    pub description: String,
    /// Architecture, as the kernel names it: `x86_64`.
    pub architecture: String,
    /// Debian suite, or the file that the image was imported from.
    pub source: String,
    /// Digest of the definition (SHA-256, hexadecimal); of the imported file's path and time for an imported image.
    pub definition: String,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// How nodes are reached by SSH.
    pub ssh: SshTransport,
    /// AF_VSOCK port on which a node that stood still is told the time: it writes a line when it is ready to read,
    /// reads seconds since 1970 with a fraction, steps its clock forward, and writes another. Without, SSH is used.
    #[serde(default)]
    pub clock_port: Option<u32>,
    /// Whether nodes get their identity from a cloud-init seed disk rather than from the second initrd.
    #[serde(default)]
    pub cloud_init: bool,
    /// Kernel command line: root file system, console, and what makes the boot quick.
    pub cmdline: String,
    /// Name of the root disk's file beside the manifest.
    pub root_file: String,
    /// Its format.
    pub root_format: DiskFormat,
    /// Size of the disk as the guest sees it, in bytes.
    pub root_bytes: u64,
    /// Size of the sectors that its partition table counts in, in bytes: 512, or 4096. The guest is told the same, since
    /// it would not find its partitions otherwise.
    #[serde(default = "sector_bytes")]
    pub root_sector_bytes: u32,
    /// Every file beside the manifest: `kernel`, `initrd` and the root disk.
    pub files: BTreeMap<String, FileDigest>,
    /// Packages and their versions, those of the kernel and the initramfs included.
    #[serde(default)]
    pub packages: Vec<Package>,
}

fn sector_bytes() -> u32 {
    512
}

/// Size and digest of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// How nodes are reached by SSH.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SshTransport {
    /// AF_VSOCK, port 22: the guest needs no working network.
    Vsock,
    /// TCP port 22 through the lab's network.
    Tcp,
}

impl Manifest {
    /// Digest of all outputs and settings (SHA-256, hexadecimal); when it was made and from where does not count.
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(format!("{}\n{:?}\n{}\n", self.cmdline, self.ssh, self.cloud_init));
        for (name, file) in &self.files {
            digest.update(format!("{name} {} {}\n", file.bytes, file.sha256));
        }
        hex(&digest.finalize())
    }
}

/// Refuse what cannot be an image's name: it names a folder.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let mut characters = name.chars();
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let first = characters.next().is_some_and(good);
    if first && name.len() <= 64 && characters.all(|c| good(c) || c == '-' || c == '.') {
        return Ok(());
    }
    Err(format!("{name:?} is no name of an image: lower-case letters, digits, - and ., at most 64"))
}

/// Size and digest of a file's content.
pub(crate) fn digest_file(path: &Path) -> io::Result<FileDigest> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        digest.update(buffer.get(..length).unwrap_or_default());
        bytes += length as u64;
    }
    Ok(FileDigest { bytes, sha256: hex(&digest.finalize()) })
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest as the store writes it.
    const TEXT: &str = r#"{"version": 1, "name": "tiny", "description": "", "architecture": "x86_64",
        "source": "trixie", "definition": "ab", "created_unix_s": 1, "ssh": "tcp", "cmdline": "root=/dev/vda",
        "root_file": "root.img", "root_format": "raw", "root_bytes": 4096,
        "files": {"kernel": {"bytes": 3, "sha256": "00"}}}"#;

    #[test]
    fn a_manifest_survives_writing_and_reading() {
        let manifest: Manifest = serde_json::from_str(TEXT).unwrap();
        assert_eq!((manifest.ssh, manifest.root_format), (SshTransport::Tcp, DiskFormat::Raw));
        assert!(!manifest.cloud_init);
        assert_eq!(manifest.root_sector_bytes, 512);
        let again: Manifest = serde_json::from_slice(&serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(again, manifest);
    }

    #[test]
    fn the_digest_follows_the_outputs_only() {
        let manifest: Manifest = serde_json::from_str(TEXT).unwrap();
        let later = Manifest { created_unix_s: 2, ..manifest.clone() };
        assert_eq!(manifest.digest(), later.digest());
        let other: Manifest = serde_json::from_str(&TEXT.replace("\"00\"", "\"01\"")).unwrap();
        assert_ne!(manifest.digest(), other.digest());
    }

    #[test]
    fn names_are_names_of_folders() {
        for good in ["tiny", "debian-13", "ubuntu-24.04"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".x", "-x", "a/b", "..", "A", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_sha_256() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let digest = digest_file(file.path()).unwrap();
        assert_eq!(digest.bytes, 3);
        assert_eq!(digest.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
