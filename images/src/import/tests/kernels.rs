//! Which kernel, initrd and root are taken.

use super::*;

/// A whole-disk file system with these kernels, each with its initrd, and more files; which kernel is taken of it.
fn taken(releases: &[&str], more: &[(&str, &[u8])]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let made: Vec<_> = releases
        .iter()
        .map(|release| {
            (format!("boot/vmlinuz-{release}"), format!("boot/initrd.img-{release}"), elf(release))
        })
        .collect();
    let mut files = vec![OS];
    for (kernel, initrd, content) in &made {
        files.extend([(kernel.as_str(), content.as_slice()), (initrd.as_str(), INITRD)]);
    }
    files.extend(more);
    let kernel = try_import(&ext4(folder.path(), "disk", &files)).unwrap().read("kernel");
    releases.iter().find(|release| kernel == elf(release)).unwrap().to_string()
}

#[test]
fn the_newest_kernel_is_taken_that_is_not_for_special_use() {
    let releases = [
        "6.1.0-9-amd64",
        "6.1.0-10-amd64",
        "6.1.0-10-amd64.old",
        "6.12.0+debug",
        "6.12.0-rc3-amd64",
        "0-rescue-0123",
        "6.12.0-0.rc6.51.fc42.x86_64",
    ];
    assert_eq!(taken(&releases, &[]), "6.1.0-10-amd64");
    // They are better than nothing.
    assert_eq!(taken(&["6.12.0-rc3-amd64", "6.12.0-rc4-amd64"], &[]), "6.12.0-rc4-amd64");
}

#[test]
fn the_kernel_of_the_distributions_link_is_taken() {
    for link in ["vmlinuz", "boot/vmlinuz"] {
        let target: &[u8] = if link == "vmlinuz" { b"->boot/vmlinuz-6.1" } else { b"->vmlinuz-6.1" };
        assert_eq!(taken(&["6.1", "6.2"], &[(link, target)]), "6.1");
    }
    // It may lead to what has no initrd.
    assert_eq!(taken(&["6.1", "6.2"], &[("vmlinuz", b"->boot/vmlinuz-6.0")]), "6.2");
}

/// GRUB's configuration as grub-mkconfig 2.06 writes it, cut down, with this default.
fn grub_cfg(default: &str) -> Vec<u8> {
    format!(
        r#"if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
   set next_entry=
else
   set default="{default}"
fi
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-12ab' {{
	insmod ext2
	linux	/boot/vmlinuz-6.2 root=UUID=12ab ro  quiet
	initrd	/boot/initrd.img-6.2
}}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-12ab' {{
	menuentry 'Debian GNU/Linux, with Linux 6.3' --class debian $menuentry_id_option 'gnulinux-6.3-advanced-12ab' {{
		linux	/boot/vmlinuz-6.3 root=UUID=12ab ro  quiet
	}}
	menuentry 'Debian GNU/Linux, with Linux 6.1' --class debian $menuentry_id_option 'gnulinux-6.1-advanced-12ab' {{
		linux	/boot/vmlinuz-6.1 root=UUID=12ab ro  quiet
	}}
}}
"#
    )
    .into_bytes()
}

#[test]
fn grubs_default_is_taken() {
    let saved: (&str, &[u8]) =
        ("boot/grub/grubenv", b"# GRUB Environment Block\nsaved_entry=gnulinux-6.1-advanced-12ab\n####");
    for (default, expected) in [
        ("0", "6.2"),
        ("${saved_entry}", "6.1"),
        ("gnulinux-advanced-12ab>gnulinux-6.1-advanced-12ab", "6.1"),
        ("Debian GNU/Linux, with Linux 6.3", "6.3"),
        // Numbers are not counted: the newest.
        ("1>1", "6.3"),
        ("no such entry", "6.3"),
    ] {
        let more: [(&str, &[u8]); 2] = [("boot/grub/grub.cfg", &grub_cfg(default)), saved];
        assert_eq!(taken(&["6.1", "6.2", "6.3"], &more), expected, "{default}");
    }
    // Nothing was saved yet.
    let more: [(&str, &[u8]); 1] = [("boot/grub/grub.cfg", &grub_cfg("${saved_entry}"))];
    assert_eq!(taken(&["6.1", "6.2", "6.3"], &more), "6.2");
}

#[test]
fn the_saved_entry_of_the_boot_loader_specification_is_taken() {
    let cfg = b"set default=\"${saved_entry}\"\nblscfg\n";
    let env = b"# GRUB Environment Block\nsaved_entry=12ab-6.1.fc42\n######";
    let entry = b"title Fedora Linux (6.1)\nversion 6.1.fc42\nlinux /boot/vmlinuz-6.1.fc42\ninitrd /i\n";
    let more: [(&str, &[u8]); 3] = [
        ("boot/grub2/grub.cfg", cfg),
        ("boot/grub2/grubenv", env),
        ("boot/loader/entries/12ab-6.1.fc42.conf", entry),
    ];
    assert_eq!(taken(&["6.1.fc42", "6.2.fc42", "0-rescue-12ab"], &more), "6.1.fc42");
}

/// A disk with these file systems as its partitions, and their ids.
fn disk(folder: &Path, partitions: &[&[(&str, &[u8])]]) -> (PathBuf, Vec<String>) {
    let made: Vec<_> = (0..)
        .zip(partitions)
        .map(|(index, files)| fs::read(ext4(folder, &format!("part{index}"), files)).unwrap())
        .collect();
    let parts: Vec<_> = made.iter().map(|bytes| (LINUX_FS, bytes.as_slice())).collect();
    let path = folder.join("disk.raw");
    let ids = gpt_disk(&path, 512, &parts);
    (path, ids)
}

#[test]
fn a_boot_partition_of_its_own_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = elf("boot");
    let (disk, ids) = disk(
        folder.path(),
        &[
            &[("vmlinuz-6.8.0-31-generic", &kernel), ("initrd.img-6.8.0-31-generic", INITRD)],
            &[("etc/os-release", b"PRETTY_NAME=\"Ubuntu 24.04\"")],
        ],
    );
    let imported = try_import(&disk).unwrap();
    assert_eq!(imported.manifest.cmdline, format!("root=PARTUUID={} ro console=hvc0 quiet", ids[1]));
    assert_eq!(imported.read("kernel"), kernel);
}

#[test]
fn kernel_and_root_are_of_one_system() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (elf("first"), elf("second"));
    // Two systems, the second of which is newer: the first is taken, with its own kernel.
    let (one, ids) = disk(
        folder.path(),
        &[
            &[OS, ("boot/vmlinuz-6.1", &first), ("boot/initrd.img-6.1", INITRD)],
            &[OS, ("boot/vmlinuz-6.9", &second), ("boot/initrd.img-6.9", INITRD)],
        ],
    );
    let imported = try_import(&one).unwrap();
    assert!(imported.manifest.cmdline.contains(&ids[0]), "{}", imported.manifest.cmdline);
    assert_eq!(imported.read("kernel"), first);

    // A partition for /boot, which belongs to the second system by its modules.
    let folder = tempfile::tempdir().unwrap();
    let (two, ids) = disk(
        folder.path(),
        &[
            &[("vmlinuz-6.9", &second), ("initrd.img-6.9", INITRD)],
            &[OS, ("lib/modules/6.1/modules.dep", b"")],
            &[OS, ("usr/lib/modules/6.9/modules.dep", b"")],
        ],
    );
    let imported = try_import(&two).unwrap();
    assert!(imported.manifest.cmdline.contains(&ids[2]), "{}", imported.manifest.cmdline);

    // A newer kernel without modules is not of this system.
    let more: (&str, &[u8]) = ("usr/lib/modules/6.1/modules.dep", b"");
    assert_eq!(taken(&["6.1", "6.9"], &[more]), "6.1");
}
