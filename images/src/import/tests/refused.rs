//! What cannot be imported, and in which words.

use super::*;

#[test]
fn what_is_no_disk_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let nothing = folder.path().join("nothing");
    fs::write(&nothing, vec![0; 1 << 20]).unwrap();
    assert!(told(&nothing).starts_with("it has neither a partition table nor a file system that lab knows"));
    fs::write(&nothing, b"").unwrap();
    assert!(told(&nothing).starts_with("it has neither a partition table nor a file system that lab knows"));
    assert!(told(&folder.path().join("absent")).starts_with("cannot open "));
    let no_root = ext4(folder.path(), "no-root", &[("hello", b"")]);
    let error = told(&no_root);
    assert!(
        error.contains("(ext4, with usr/lib/os-release); it has ext4 on the whole disk. Take"),
        "{error}"
    );
    let no_kernel = ext4(folder.path(), "no-kernel", &[OS, ("boot/vmlinuz-6.1", b"")]);
    assert!(told(&no_kernel).starts_with("it has no kernel with an initrd in /boot"));
}

#[test]
fn kernels_and_initrds_that_are_none_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let kernel = elf("kernel");
    for (name, kernel, initrd, says) in [
        ("arm", &arm, INITRD, "/boot/vmlinuz-6.1 in it cannot be used: the kernel is for ARM64"),
        ("initrd", &kernel, &b"\0\0\0\0\0\0"[..], "/boot/initrd.img-6.1 in it is neither a cpio archive nor"),
        ("empty", &kernel, b"", "/boot/initrd.img-6.1 in it is neither a cpio archive nor"),
    ] {
        let files: [(&str, &[u8]); 3] = [OS, ("boot/vmlinuz-6.1", kernel), ("boot/initrd.img-6.1", initrd)];
        let error = told(&ext4(folder.path(), name, &files));
        assert!(error.starts_with(says), "{error}");
    }
}

#[test]
fn other_formats_are_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, _) = debian(folder.path(), &[]);
    let file = folder.path().join("file");
    for (format, says) in [
        ("vmdk", "it is a VMDK image: convert it first (qemu-img convert -O qcow2"),
        ("vdi", "it is a VDI image: convert it first"),
        ("vhdx", "it is a VHDX image: convert it first"),
        ("vpc", "it is a VHD image: convert it first"),
        ("qed", "it is a QED image: convert it first"),
        ("parallels", "it is a Parallels image: convert it first"),
    ] {
        run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&file)]);
        let error = told(&file);
        assert!(error.starts_with(says), "{format}: {error}");
    }
    for (bytes, says) in [
        (&b"\xfd7zXZ\0rest"[..], "it is compressed by xz: unpack it first (unxz FILE)"),
        (b"\x1f\x8brest", "it is compressed by gzip"),
        (b"\x28\xb5\x2f\xfdrest", "it is compressed by zstd"),
        (b"BZh91AY", "it is compressed by bzip2"),
        (b"PK\x03\x04rest", "it is a zip archive"),
        (b"7z\xbc\xaf\x27\x1crest", "it is a 7z archive"),
        (b"<!DOCTYPE html>", "it is a web page"),
    ] {
        fs::write(&file, bytes).unwrap();
        assert!(told(&file).starts_with(says), "{says}");
    }
    for (member, says) in [("disk.raw", "it is a tar archive"), ("machine.ovf", "it is an OVA archive")] {
        fs::write(folder.path().join(member), b"content").unwrap();
        run("tar", &["-C", text(folder.path()), "-cf", text(&file), member]);
        assert!(told(&file).starts_with(says), "{says}");
    }
    let mut installer = vec![0; 64 << 10];
    installer[0x8001..0x8006].copy_from_slice(b"CD001");
    fs::write(&file, installer).unwrap();
    assert!(told(&file).starts_with("it is the image of a CD (ISO 9660), as installers are: take"));
}

#[test]
fn other_file_systems_are_called_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (at, magic, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (0x200, b"LABELONE", "an LVM physical volume"),
        (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
        (0x400, b"\x10\x20\xf5\xf2", "F2FS"),
        (0x22000, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS"),
        (0, b"hsqs", "squashfs"),
        (0x1000, b"\xfc\x4e\x2b\xa9", "Linux software RAID"),
    ] {
        let mut bytes = vec![0; 1 << 20];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        let disk = folder.path().join("disk.raw");
        drop(fs::remove_file(&disk));
        gpt_disk(&disk, 512, &[(gpt::partition_types::BIOS, b"loader"), (LINUX_FS, &bytes)]);
        let error = told(&disk);
        assert!(
            error.contains(&format!("it has nothing known in partition 1, {name} in partition 2. ")),
            "{error}"
        );
        fs::write(&disk, &bytes).unwrap();
        let error = told(&disk);
        assert!(error.contains(&format!("it has {name} on the whole disk. ")), "{error}");
    }
}

#[test]
fn what_is_not_known_of_ext4_is_called_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = elf("kernel");
    let files: [(&str, &[u8]); 3] = [OS, ("boot/vmlinuz-6.1", &kernel), ("boot/initrd.img-6.1", INITRD)];
    for (options, says) in [
        (&["-O", "inline_data"][..], "ext4 that lab cannot read for its features (inline_data)"),
        (&["-O", "mmp,ea_inode"], "ext4 that lab cannot read for its features (mmp, ea_inode)"),
        (&["-O", "meta_bg,^resize_inode"], "(meta_bg)"),
        (&["-O", "casefold"], "(casefold)"),
        (&["-O", "large_dir"], "(large_dir)"),
        (&["-O", "^filetype"], "(no filetype)"),
        (&["-O", "metadata_csum", "-I", "128"], "ext4 with checksums and inodes of 128 bytes"),
    ] {
        let error = told(&ext4_with(folder.path(), "bad", options, &files));
        assert!(error.contains(says), "{options:?}: {error}");
        fs::remove_file(folder.path().join("bad")).unwrap();
    }
    for options in [
        &["-O", "^metadata_csum", "-I", "128"][..],
        &["-O", "metadata_csum,64bit,bigalloc"],
        &["-O", "^has_journal,^extents,^64bit,^flex_bg,^metadata_csum"],
        &["-O", "orphan_file"],
        &["-O", "encrypt,verity"],
        &["-b", "1024"],
        &["-O", "metadata_csum_seed"],
    ] {
        let disk = ext4_with(folder.path(), "good", options, &files);
        assert_eq!(try_import(&disk).unwrap().read("kernel"), kernel, "{options:?}");
        fs::remove_file(disk).unwrap();
    }
}

#[test]
fn kernels_on_the_efi_partition_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let root = fs::read(ext4(folder.path(), "root", &[OS])).unwrap();
    for (path, says) in [
        ("EFI/Linux/debian-6.1.efi", "has EFI/Linux/debian-6.1.efi, a unified kernel image (UKI)"),
        ("loader/entries/12ab-6.1.conf", "systemd-boot starts (loader/entries/12ab-6.1.conf)"),
        ("EFI/BOOT/BOOTX64.EFI", "it has no kernel with an initrd in /boot"),
    ] {
        let mut efi = vec![0; 2 << 20];
        fatfs::format_volume(std::io::Cursor::new(&mut efi), fatfs::FormatVolumeOptions::new()).unwrap();
        let volume = fatfs::FileSystem::new(std::io::Cursor::new(&mut efi), fatfs::FsOptions::new()).unwrap();
        let mut dir = volume.root_dir();
        let mut parts: Vec<_> = path.split('/').collect();
        let file = parts.pop().unwrap();
        for part in parts {
            dir = dir.create_dir(part).unwrap();
        }
        dir.create_file(file).unwrap().write_all(b"MZ").unwrap();
        drop(dir);
        volume.unmount().unwrap();
        let disk = folder.path().join("disk.raw");
        drop(fs::remove_file(&disk));
        gpt_disk(&disk, 512, &[(gpt::partition_types::EFI, &efi), (LINUX_FS, &root)]);
        let error = told(&disk);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn damage_is_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, _) = debian(folder.path(), &[]);
    let good = fs::read(&disk).unwrap();
    let damaged = folder.path().join("damaged.raw");
    for length in [512, 2048, 20_000, 1 << 20, 3 << 20, 6 << 20] {
        fs::write(&damaged, &good[..length]).unwrap();
        let error = told(&damaged);
        assert_eq!(error.contains("it is truncated"), length >= 2048, "cut at {length}: {error}");
    }
    let packed = folder.path().join("disk.qcow2");
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", text(&disk), text(&packed)]);
    let packed = fs::read(packed).unwrap();
    let mut state = 7u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..100 {
        // The first partitions' tables are the interesting part, and of qcow2 everything.
        let (mut bytes, end, changes) =
            if round % 2 == 0 { (good.clone(), 3 << 20, 64) } else { (packed.clone(), packed.len(), 8) };
        for _ in 0..changes {
            bytes[next(end)] = next(256) as u8;
        }
        fs::write(&damaged, &bytes).unwrap();
        let out = tempfile::tempdir().unwrap();
        drop(import("cloud", &damaged, out.path(), &mut |_| {}));
    }
}
