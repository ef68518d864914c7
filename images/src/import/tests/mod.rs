//! Images made by mke2fs and QEMU's tools, and what comes of their import.

mod kernels;
mod layouts;
mod refused;

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::symlink,
    path::PathBuf,
    process::Command,
};

use gpt::partition_types::{LINUX_FS, Type};

use super::*;
use crate::command;

/// What is an initrd by its first bytes.
const INITRD: &[u8] = b"070701 initrd of the image";
/// What makes a file system a root.
const OS: (&str, &[u8]) =
    ("usr/lib/os-release", b"ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n");

/// What `kernel::unpack` takes for a kernel, and by which it is told from others.
fn elf(name: &str) -> Vec<u8> {
    [b"\x7fELF\x02\x01\x01 kernel of \x3e\0 ", name.as_bytes()].concat()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let output = command::run(Command::new(program).env("PATH", path).args(arguments)).unwrap();
    String::from_utf8(output).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An ext4 file system with these files, made with further options; what begins with `->` is a symbolic link.
fn ext4_with(folder: &Path, name: &str, options: &[&str], files: &[(&str, &[u8])]) -> PathBuf {
    let tree = folder.join(format!("{name}.tree"));
    fs::create_dir_all(&tree).unwrap();
    for (path, bytes) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match bytes.strip_prefix(b"->") {
            Some(target) => symlink(std::str::from_utf8(target).unwrap(), path).unwrap(),
            None => fs::write(path, bytes).unwrap(),
        }
    }
    let image = folder.join(name);
    let arguments = ["-q", "-F", "-t", "ext4", "-d", text(&tree)];
    run("mke2fs", &[&arguments, options, &[text(&image), "8M"]].concat());
    image
}

fn ext4(folder: &Path, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    ext4_with(folder, name, &[], files)
}

/// A disk of 32 MiB with a GUID partition table, whose sectors have 512 or 4096 bytes, and these partitions; their ids.
fn gpt_disk(path: &Path, sector: u32, partitions: &[(Type, &[u8])]) -> Vec<String> {
    let size = match sector {
        512 => gpt::disk::LogicalBlockSize::Lb512,
        _ => gpt::disk::LogicalBlockSize::Lb4096,
    };
    let file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
    file.set_len(32 << 20).unwrap();
    let mbr = gpt::mbr::ProtectiveMBR::with_lb_size((32 << 20) / sector - 1);
    mbr.overwrite_lba0(&mut &file).unwrap();
    let config = gpt::GptConfig::new().writable(true).logical_block_size(size);
    let mut table = config.create_from_device(file, None).unwrap();
    let mut content = Vec::new();
    for (kind, bytes) in partitions {
        let length = bytes.len().max(1 << 20) as u64;
        let id = table.add_partition("part", length, kind.clone(), 0, None).unwrap();
        let partition = &table.partitions()[&id];
        let start = partition.first_lba * u64::from(sector);
        content.push((start, *bytes, partition.part_guid.hyphenated().to_string()));
    }
    let mut file = table.write().unwrap();
    for (start, bytes, _) in &content {
        file.seek(SeekFrom::Start(*start)).unwrap();
        file.write_all(bytes).unwrap();
    }
    content.into_iter().map(|(.., id)| id).collect()
}

/// A Debian-like image: a boot loader's partition, and one with everything; its path and the latter's id.
fn debian(folder: &Path, more: &[(&str, &[u8])]) -> (PathBuf, String) {
    let (old, new) = (elf("old"), elf("new"));
    let mut files: Vec<(&str, &[u8])> = vec![
        OS,
        ("usr/bin/cloud-init", b""),
        ("usr/sbin/sshd", b""),
        ("boot/vmlinuz-6.9.1-amd64", &old),
        ("boot/initrd.img-6.9.1-amd64", b"070701 old"),
        ("boot/vmlinuz-6.12.48+deb13-cloud-amd64", &new),
        ("boot/initrd.img-6.12.48+deb13-cloud-amd64", INITRD),
        ("boot/vmlinuz-6.13.1-no-initrd", &old),
    ];
    files.extend(more);
    let root = fs::read(ext4(folder, "root", &files)).unwrap();
    let disk = folder.join("disk.raw");
    let ids = gpt_disk(&disk, 512, &[(gpt::partition_types::BIOS, b"loader"), (LINUX_FS, &root)]);
    (disk, ids[1].clone())
}

/// What was imported.
struct Imported {
    manifest: Manifest,
    warnings: Vec<String>,
    out: tempfile::TempDir,
}

impl Imported {
    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.out.path().join(file)).unwrap()
    }
}

fn try_import(path: &Path) -> Result<Imported, Error> {
    let out = tempfile::tempdir().unwrap();
    let mut steps = 0;
    let (manifest, warnings) = import("cloud", path, out.path(), &mut |_| steps += 1)?;
    assert_eq!(steps, 3);
    Ok(Imported { manifest, warnings, out })
}

/// Why an image is refused.
fn told(path: &Path) -> String {
    match try_import(path) {
        Ok(imported) => panic!("imported: {}", imported.manifest.cmdline),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_raw_image_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, id) = debian(folder.path(), &[]);
    let imported = try_import(&disk).unwrap();
    let manifest = &imported.manifest;
    assert_eq!(manifest.cmdline, format!("root=PARTUUID={id} ro console=hvc0 quiet"));
    assert_eq!(manifest.description, "Debian GNU/Linux 13 (trixie)");
    assert_eq!((manifest.ssh, manifest.cloud_init), (SshTransport::Tcp, true));
    assert_eq!((manifest.root_format, manifest.root_bytes), (DiskFormat::Raw, 32 << 20));
    assert_eq!(manifest.root_sector_bytes, 512);
    assert_eq!(imported.read("kernel"), elf("new"));
    assert_eq!(imported.read("initrd"), INITRD);
    assert!(imported.read("root.img") == fs::read(&disk).unwrap());
    assert_eq!(imported.warnings, Vec::<String>::new());
}

#[test]
fn a_newer_systemd_is_reached_over_vsock() {
    let folder = tempfile::tempdir().unwrap();
    let generator: (&str, &[u8]) = ("usr/lib/systemd/system-generators/systemd-ssh-generator", b"");
    let (disk, _) = debian(folder.path(), &[generator]);
    assert_eq!(try_import(&disk).unwrap().manifest.ssh, SshTransport::Vsock);
}

#[test]
fn what_nodes_need_and_is_not_seen_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = elf("kernel");
    let mut files: Vec<(&str, &[u8])> =
        vec![OS, ("boot/vmlinuz-6.1", &kernel), ("boot/initrd.img-6.1", INITRD)];
    let bare = try_import(&ext4(folder.path(), "bare", &files)).unwrap().warnings;
    assert!(bare[0].contains("no cloud-init") && bare[1].contains("no SSH server"), "{bare:?}");
    files.extend([
        ("usr/bin/sshd", &b""[..]),
        ("usr/sbin", b"->bin"),
        ("usr/bin/cloud-init", b""),
        ("etc/cloud/cloud-init.disabled", b""),
    ]);
    let disabled = try_import(&ext4(folder.path(), "disabled", &files)).unwrap().warnings;
    assert!(disabled.len() == 1 && disabled[0].contains("is disabled"), "{disabled:?}");
}
