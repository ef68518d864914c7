//! What a distribution's cloud image finds of itself: a small FAT disk named CIDATA with its name and keys, which
//! cloud-init reads at each boot (cloud-init's documentation, data source NoCloud). The network comes by DHCP, which is
//! what cloud-init asks for by itself.

use std::io::{self, Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde_json::json;

/// Name of the disk's file in a node's folder.
pub const FILE: &str = "cloud-init.img";
/// Size of the disk in bytes.
const SIZE: usize = 1 << 20;
/// The volume's name, which cloud-init looks for.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// What a node is told.
pub struct Seed<'a> {
    /// Its name.
    pub name: &'a str,
    /// What tells this machine from all others: with another, cloud-init begins anew.
    pub instance: &'a str,
    /// The line of the key that opens it.
    pub authorized_key: &'a str,
    /// Its own private key, in OpenSSH's form.
    pub host_key: &'a str,
    /// The line of its public half.
    pub host_key_public: &'a str,
}

/// Makes the disk.
pub fn disk(seed: &Seed) -> io::Result<Vec<u8>> {
    // JSON is YAML, and needs no care with quotes.
    let user_data = json!({
        "hostname": seed.name,
        "disable_root": false,
        "ssh_pwauth": false,
        "ssh_authorized_keys": [seed.authorized_key],
        "ssh_keys": { "ed25519_private": seed.host_key, "ed25519_public": seed.host_key_public },
    });
    let meta_data = json!({ "instance-id": seed.instance, "local-hostname": seed.name });
    let mut bytes = vec![0; SIZE];
    fatfs::format_volume(Cursor::new(&mut bytes), FormatVolumeOptions::new().volume_label(LABEL))?;
    {
        let volume = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new())?;
        let root = volume.root_dir();
        root.create_file("user-data")?.write_all(format!("#cloud-config\n{user_data}\n").as_bytes())?;
        root.create_file("meta-data")?.write_all(format!("{meta_data}\n").as_bytes())?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_disk_holds_what_cloud_init_reads() {
        let seed = Seed {
            name: "master",
            instance: "0123",
            authorized_key: "ssh-ed25519 AAAA",
            host_key: "-----BEGIN OPENSSH PRIVATE KEY-----\nxyz\n",
            host_key_public: "ssh-ed25519 BBBB",
        };
        let bytes = disk(&seed).unwrap();
        let volume = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        let read = |name: &str| {
            let mut text = String::new();
            volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let user_data = read("user-data");
        let value: serde_json::Value =
            serde_json::from_str(user_data.strip_prefix("#cloud-config\n").unwrap()).unwrap();
        assert_eq!(value["ssh_authorized_keys"][0], "ssh-ed25519 AAAA");
        assert_eq!(value["ssh_keys"]["ed25519_private"], "-----BEGIN OPENSSH PRIVATE KEY-----\nxyz\n");
        assert!(read("meta-data").contains("\"instance-id\":\"0123\""));
    }
}
