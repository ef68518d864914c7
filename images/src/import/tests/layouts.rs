//! Partition tables and kinds of qcow2, as other tools make and see them.

use super::*;

/// Files of a whole system.
fn system(kernel: &[u8]) -> [(&str, &[u8]); 3] {
    [OS, ("boot/vmlinuz-6.1", kernel), ("boot/initramfs-6.1.img", INITRD)]
}

/// A file system with a whole system in it, 8 MiB.
fn root(folder: &Path) -> Vec<u8> {
    fs::read(ext4(folder, "root", &system(&elf("kernel")))).unwrap()
}

/// The name of a partition as util-linux tells it.
fn partx(disk: &Path, sector: &str, number: usize) -> String {
    let number = number.to_string();
    let arguments = ["--show", "-g", "-o", "UUID", "-n", &number, "-S", sector, text(disk)];
    run("partx", &arguments).trim().to_owned()
}

#[test]
fn a_disk_without_partitions_is_one_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let disk = ext4(folder.path(), "root", &system(&elf("kernel")));
    let cmdline = try_import(&disk).unwrap().manifest.cmdline;
    let uuid = run("blkid", &["-p", "-s", "UUID", "-o", "value", text(&disk)]);
    assert_eq!(cmdline, format!("root=UUID={} ro console=hvc0 quiet", uuid.trim()));
}

#[test]
fn sectors_of_4096_bytes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for sector in [512, 4096] {
        let disk = folder.path().join(format!("{sector}.raw"));
        let ids =
            gpt_disk(&disk, sector, &[(gpt::partition_types::EFI, b""), (LINUX_FS, &root(folder.path()))]);
        assert_eq!(partx(&disk, &sector.to_string(), 2), ids[1]);
        let manifest = try_import(&disk).unwrap().manifest;
        assert_eq!(manifest.cmdline, format!("root=PARTUUID={} ro console=hvc0 quiet", ids[1]));
        assert_eq!(manifest.root_sector_bytes, sector);
    }
}

/// A boot record with these entries: type, first sector, sectors.
fn record(signature: u32, entries: &[(u8, u32, u32)]) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[440..444].copy_from_slice(&signature.to_le_bytes());
    for (entry, (kind, start, sectors)) in bytes[446..510].chunks_exact_mut(16).zip(entries) {
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// A disk of 32 MiB with these bytes at these sectors.
fn dos_disk(path: &Path, pieces: &[(u64, &[u8])]) {
    let mut file = File::create(path).unwrap();
    file.set_len(32 << 20).unwrap();
    for (sector, bytes) in pieces {
        file.seek(SeekFrom::Start(sector * 512)).unwrap();
        file.write_all(bytes).unwrap();
    }
}

#[test]
fn dos_partitions_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    let root = root(folder.path());
    let size = (root.len() / 512) as u32;

    let master = record(0x0012_abcd, &[(0x0c, 2048, 2048), (0, 0, 0), (0x83, 4096, size)]);
    dos_disk(&disk, &[(0, &master), (4096, &root)]);
    assert_eq!(partx(&disk, "512", 3), "0012abcd-03");
    assert_eq!(
        try_import(&disk).unwrap().manifest.cmdline,
        "root=PARTUUID=0012abcd-03 ro console=hvc0 quiet"
    );

    // The second of two logical partitions. The second record is counted from the first, its partition from itself.
    let master = record(0xfedc_ba98, &[(0x82, 64, 64), (0x0f, 2048, 40960)]);
    let first = record(0, &[(0x83, 64, 64), (0x05, 4096, size + 64)]);
    let second = record(0, &[(0x83, 64, size)]);
    dos_disk(&disk, &[(0, &master), (2048, &first), (2048 + 4096, &second), (2048 + 4096 + 64, &root)]);
    assert_eq!(partx(&disk, "512", 6), "fedcba98-06");
    assert_eq!(
        try_import(&disk).unwrap().manifest.cmdline,
        "root=PARTUUID=fedcba98-06 ro console=hvc0 quiet"
    );

    // Records that lead in a circle end somewhere.
    let second = record(0, &[(0x83, 64, size), (0x05, 0, 4096)]);
    dos_disk(&disk, &[(0, &master), (2048, &first), (2048 + 4096, &second), (2048 + 4096 + 64, &root)]);
    try_import(&disk).unwrap();

    // Without a signature, partitions have no names, and file systems still do.
    let master = record(0, &[(0x83, 2048, size)]);
    dos_disk(&disk, &[(0, &master), (2048, &root)]);
    let cmdline = try_import(&disk).unwrap().manifest.cmdline;
    assert!(cmdline.starts_with("root=UUID="), "{cmdline}");

    let master = record(1, &[(0x83, 65_000, size)]);
    dos_disk(&disk, &[(0, &master)]);
    assert!(
        told(&disk)
            .contains("it is truncated: what is on it ends at byte 41668608, the disk at byte 33554432")
    );
}

#[test]
fn kinds_of_qcow2_are_read_and_not_kept_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, id) = debian(folder.path(), &[]);
    let cases: [&[&str]; 8] = [
        &[],
        &["-c"],
        &["-o", "compat=0.10"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=2M"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "refcount_bits=1"],
        &["-o", "preallocation=metadata"],
    ];
    for options in cases {
        let disk = folder.path().join("disk.qcow2");
        let arguments = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[text(&raw), text(&disk)]];
        run("qemu-img", &arguments.concat());
        let imported = try_import(&disk).unwrap();
        let manifest = &imported.manifest;
        assert_eq!(manifest.cmdline, format!("root=PARTUUID={id} ro console=hvc0 quiet"));
        assert_eq!((manifest.root_format, manifest.root_bytes), (DiskFormat::Qcow2, 32 << 20));
        assert_eq!(imported.read("kernel"), elf("new"));
        let root = imported.out.path().join(&manifest.root_file);
        assert!(run("qemu-img", &["compare", text(&raw), text(&root)]).contains("identical"), "{options:?}");
        let report = run("qemu-img", &["check", "--output=json", text(&root)]);
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["compressed-clusters"].as_u64().unwrap_or(0), 0, "{options:?}");
    }
}

#[test]
fn a_fixed_vhd_is_a_raw_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, id) = debian(folder.path(), &[]);
    let disk = folder.path().join("disk.vhd");
    let options = "subformat=fixed,force_size=on";
    run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, text(&raw), text(&disk)]);
    let manifest = try_import(&disk).unwrap().manifest;
    assert_eq!(manifest.cmdline, format!("root=PARTUUID={id} ro console=hvc0 quiet"));
    // Its footer is behind the disk.
    assert_eq!((manifest.root_format, manifest.root_bytes), (DiskFormat::Raw, (32 << 20) + 512));
}

#[test]
fn kinds_of_qcow2_that_are_not_read_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, _) = debian(folder.path(), &[]);
    let disk = folder.path().join("disk.qcow2");
    for (options, says) in [
        ("compression_type=zstd", "zstd compression"),
        ("extended_l2=on", "extended L2 entries"),
        ("data_file=data.raw", "keeps its data in another file"),
    ] {
        let options = options.replace("=data", &format!("={}/data", text(folder.path())));
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&disk)]);
        let error = told(&disk);
        assert!(error.contains(says) && error.contains("qemu-img"), "{options}: {error}");
    }
    let overlay = folder.path().join("overlay.qcow2");
    lab_vmm::qcow2::create_overlay(&overlay, &raw, DiskFormat::Raw, 64 << 20).unwrap();
    assert!(told(&overlay).starts_with("it has the backing file "));
}

#[test]
fn a_cut_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, _) = debian(folder.path(), &[]);
    let cut =
        |path: &Path, length: u64| File::options().write(true).open(path).unwrap().set_len(length).unwrap();
    for options in [&[][..], &["-c"]] {
        let disk = folder.path().join("disk.qcow2");
        let arguments = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[text(&raw), text(&disk)]];
        run("qemu-img", &arguments.concat());
        let whole = fs::metadata(&disk).unwrap().len();
        for length in [whole - (128 << 10), whole / 2, whole / 3] {
            cut(&disk, length);
            let error = told(&disk);
            assert!(error.contains("cut short"), "{options:?}, {length} of {whole}: {error}");
        }
    }
    for length in [6 << 20, 1 << 20, 20_000] {
        cut(&raw, length);
        let error = told(&raw);
        assert!(error.contains("it is truncated"), "{length}: {error}");
    }
    let bare = ext4(folder.path(), "bare", &system(&elf("kernel")));
    cut(&bare, (8 << 20) - 4096);
    assert!(told(&bare).contains("it is truncated: what is on it ends at byte 8388608"));
}
