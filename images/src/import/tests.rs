use std::{io::Write, process::Command};

use super::*;
use crate::command;

/// What `kernel::unpack` takes for a kernel.
const KERNEL: &[u8] = b"\x7fELF\x02\x01\x01 kernel of \x3e\0 image";

/// An ext4 file system with these files.
fn ext4(folder: &Path, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let tree = folder.join(format!("{name}.tree"));
    for (path, bytes) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let image = folder.join(name);
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", path).args(["-q", "-F", "-t", "ext4", "-d"]).args([&tree, &image]).arg("8M");
    command::run(&mut mke2fs).unwrap();
    image
}

/// A disk with a GUID partition table and these partitions.
fn gpt_disk(path: &Path, partitions: &[(&str, gpt::partition_types::Type, &[u8])]) -> Vec<String> {
    let file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
    file.set_len(32 << 20).unwrap();
    let mbr = gpt::mbr::ProtectiveMBR::with_lb_size((32 << 11) - 1);
    mbr.overwrite_lba0(&mut &file).unwrap();
    let config = gpt::GptConfig::new().writable(true);
    let mut table = config.create_from_device(file, None).unwrap();
    let mut content = Vec::new();
    for (name, kind, bytes) in partitions {
        let id = table.add_partition(name, bytes.len().max(1 << 20) as u64, kind.clone(), 0, None).unwrap();
        let partition = &table.partitions()[&id];
        content.push((partition.first_lba * 512, *bytes, partition.part_guid.hyphenated().to_string()));
    }
    let mut file = table.write().unwrap();
    for (start, bytes, _) in &content {
        io::Seek::seek(&mut file, io::SeekFrom::Start(*start)).unwrap();
        file.write_all(bytes).unwrap();
    }
    content.into_iter().map(|(.., id)| id).collect()
}

/// A Debian-like image: a boot loader's partition, and one with everything.
fn debian(folder: &Path, more: &[(&str, &[u8])]) -> (PathBuf, String) {
    let mut files: Vec<(&str, &[u8])> = vec![
        ("usr/lib/os-release", b"ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n"),
        ("boot/vmlinuz-6.9.1-amd64", b"\x7fELF an older one"),
        ("boot/initrd.img-6.9.1-amd64", b"old"),
        ("boot/vmlinuz-6.12.48+deb13-cloud-amd64", KERNEL),
        ("boot/initrd.img-6.12.48+deb13-cloud-amd64", b"initrd"),
        ("boot/vmlinuz-6.13.1-no-initrd", b"\x7fELF without initrd"),
    ];
    files.extend(more);
    let root = fs::read(ext4(folder, "root", &files)).unwrap();
    let disk = folder.join("disk.raw");
    let parts = [
        ("bios", gpt::partition_types::BIOS, &b"loader"[..]),
        ("root", gpt::partition_types::LINUX_FS, &root),
    ];
    let ids = gpt_disk(&disk, &parts);
    (disk, ids[1].clone())
}

fn run(path: &Path) -> Result<(Manifest, tempfile::TempDir), Error> {
    let out = tempfile::tempdir().unwrap();
    let mut steps = 0;
    let manifest = import("cloud", path, out.path(), &mut |_| steps += 1)?;
    assert_eq!(steps, 3);
    Ok((manifest, out))
}

#[test]
fn a_raw_image_gives_its_newest_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, id) = debian(folder.path(), &[]);
    let (manifest, out) = run(&disk).unwrap();
    assert_eq!(manifest.cmdline, format!("root=PARTUUID={id} ro console=hvc0 quiet"));
    assert_eq!(manifest.description, "Debian GNU/Linux 13 (trixie)");
    assert_eq!((manifest.ssh, manifest.cloud_init), (SshTransport::Tcp, true));
    assert_eq!((manifest.root_format, manifest.root_bytes), (DiskFormat::Raw, 32 << 20));
    assert_eq!(fs::read(out.path().join("kernel")).unwrap(), KERNEL);
    assert_eq!(fs::read(out.path().join("initrd")).unwrap(), b"initrd");
    assert!(fs::read(out.path().join("root.img")).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn a_newer_systemd_is_reached_over_vsock() {
    let folder = tempfile::tempdir().unwrap();
    let generator: (&str, &[u8]) = ("usr/lib/systemd/system-generators/systemd-ssh-generator", b"");
    let (disk, _) = debian(folder.path(), &[generator]);
    assert_eq!(run(&disk).unwrap().0.ssh, SshTransport::Vsock);
}

#[test]
fn a_boot_partition_of_its_own_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let files: [(&str, &[u8]); 2] =
        [("vmlinuz-6.8.0-31-generic", KERNEL), ("initrd.img-6.8.0-31-generic", b"i")];
    let boot = fs::read(ext4(folder.path(), "boot", &files)).unwrap();
    let root = fs::read(ext4(folder.path(), "root", &[("etc/os-release", b"PRETTY_NAME=\"Ubuntu 24.04\"")]))
        .unwrap();
    let disk = folder.path().join("disk.raw");
    let kind = gpt::partition_types::LINUX_FS;
    let ids = gpt_disk(&disk, &[("boot", kind.clone(), &boot), ("root", kind, &root)]);
    let (manifest, out) = run(&disk).unwrap();
    assert_eq!(manifest.cmdline, format!("root=PARTUUID={} ro console=hvc0 quiet", ids[1]));
    assert_eq!(fs::read(out.path().join("kernel")).unwrap(), KERNEL);
}

#[test]
fn a_disk_without_partitions_is_one_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let files: [(&str, &[u8]); 3] =
        [("etc/os-release", b""), ("boot/vmlinuz-6.1", KERNEL), ("boot/initramfs-6.1.img", b"i")];
    let disk = ext4(folder.path(), "root", &files);
    let (manifest, _) = run(&disk).unwrap();
    assert!(manifest.cmdline.starts_with("root=UUID="), "{}", manifest.cmdline);
}

#[test]
fn a_qcow2_image_is_read_and_kept_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, id) = debian(folder.path(), &[]);
    let disk = folder.path().join("disk.qcow2");
    lab_vmm::qcow2::create_empty(&disk, 32 << 20).unwrap();
    write_qcow2(&disk, &fs::read(raw).unwrap());
    let (manifest, out) = run(&disk).unwrap();
    assert_eq!(manifest.cmdline, format!("root=PARTUUID={id} ro console=hvc0 quiet"));
    assert_eq!((manifest.root_format, manifest.root_bytes), (DiskFormat::Qcow2, 32 << 20));
    assert_eq!(manifest.root_file, "root.qcow2");
    assert_eq!(fs::read(out.path().join("kernel")).unwrap(), KERNEL);
}

/// Write a disk's content into an empty qcow2 image.
fn write_qcow2(path: &Path, content: &[u8]) {
    use imago::{FormatAccess, StorageOpenOptions, file::File as ImageFile, qcow2::Qcow2};
    let file = File::options().read(true).write(true).open(path).unwrap();
    let storage = ImageFile::from_open_file(file, StorageOpenOptions::new().write(true)).unwrap();
    let image = FormatAccess::new(Qcow2::<ImageFile>::open_image(storage, true).unwrap());
    image.write(content, 0).unwrap();
    image.flush().unwrap();
    image.sync().unwrap();
}

#[test]
fn what_cannot_be_imported_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let told = |path: &Path| run(path).unwrap_err().to_string();
    let nothing = folder.path().join("nothing");
    fs::write(&nothing, vec![0; 1 << 20]).unwrap();
    assert!(told(&nothing).starts_with("it has neither a GUID partition table nor an ext4 file system"));
    fs::write(&nothing, b"").unwrap();
    assert!(told(&nothing).starts_with("it has neither a GUID partition table nor an ext4 file system"));
    assert!(told(&folder.path().join("absent")).starts_with("cannot open "));
    let no_root = ext4(folder.path(), "no-root", &[("hello", b"")]);
    assert!(told(&no_root).starts_with("none of its file systems is a Linux system's root"));
    let no_kernel = ext4(folder.path(), "no-kernel", &[("etc/os-release", b""), ("boot/vmlinuz-6.1", b"")]);
    assert!(told(&no_kernel).starts_with("it has no kernel with an initrd in /boot"));
    let overlay = folder.path().join("overlay.qcow2");
    lab_vmm::qcow2::create_overlay(&overlay, &no_root, DiskFormat::Raw, 8 << 20).unwrap();
    assert!(told(&overlay).starts_with("it has the backing file "));
}

#[test]
fn damage_is_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, _) = debian(folder.path(), &[]);
    let good = fs::read(&disk).unwrap();
    let damaged = folder.path().join("damaged.raw");
    for length in [512, 2048, 20_000, 1 << 20, 3 << 20, 6 << 20] {
        fs::write(&damaged, &good[..length]).unwrap();
        let error = run(&damaged).unwrap_err().to_string();
        assert_eq!(error.contains("it is truncated"), length >= 20_000, "cut at {length}: {error}");
    }
    let mut state = 7u64;
    for _ in 0..50 {
        let mut bytes = good.clone();
        for _ in 0..64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // The first partitions' tables are the interesting part.
            let at = (state >> 33) as usize % (3 << 20);
            bytes[at] = (state >> 20) as u8;
        }
        fs::write(&damaged, &bytes).unwrap();
        let _ = run_without_steps(&damaged);
    }
}

fn run_without_steps(path: &Path) -> Result<Manifest, Error> {
    let out = tempfile::tempdir().unwrap();
    import("cloud", path, out.path(), &mut |_| {})
}
