use std::io::Read;

use super::*;

/// The entries of an archive: path, mode, content.
fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut rest = archive;
    let mut found = Vec::new();
    loop {
        let mut reader = newc::Reader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        found.push((name, mode, bytes));
        rest = reader.finish().unwrap();
    }
}

#[test]
fn folders_come_before_what_is_in_them() {
    let mut builder = Builder::with_busybox(b"box".to_vec(), b"#!/bin/sh\n").unwrap();
    builder.file("/lib/a/b", 0o600, b"hello".to_vec()).unwrap();
    let entries = entries(&builder.finish().unwrap());
    let at = |name: &str| entries.iter().position(|entry| entry.0 == name).unwrap();
    assert!(at("lib") < at("lib/a") && at("lib/a") < at("lib/a/b"));
    assert_eq!(entries[at("lib/a/b")], ("lib/a/b".into(), 0o100_600, b"hello".to_vec()));
    assert_eq!(entries[at("lib/a")].1, 0o040_755);
    assert_eq!(entries[at("bin/sh")], ("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
    assert_eq!(entries[at("dev/console")].1, 0o020_600);
    assert_eq!(entries[at("init")].1, 0o100_755);
}

#[test]
fn credentials_are_for_root_alone() {
    let archive = node_cpio(&[
        ("/node/run/credentials/@initrd/system.hostname", 0o400, b"w1"),
        ("/node/run/lab/hosts", 0o644, b"x"),
    ])
    .unwrap();
    assert_eq!(archive.len() % 4, 0);
    let modes: Vec<(String, u32)> =
        entries(&archive).into_iter().map(|(name, mode, _)| (name, mode)).collect();
    let expected = [
        ("node", 0o040_755),
        ("node/run", 0o040_755),
        ("node/run/credentials", 0o040_700),
        ("node/run/credentials/@initrd", 0o040_700),
        ("node/run/credentials/@initrd/system.hostname", 0o100_400),
        ("node/run/lab", 0o040_755),
        ("node/run/lab/hosts", 0o100_644),
    ];
    assert_eq!(modes, expected.map(|(name, mode)| (name.to_owned(), mode)));
}

#[test]
fn paths_stay_inside() {
    for bad in ["", "/", "/../x", "/a/./b", "/a//b", "/a/\0"] {
        assert!(matches!(node_cpio(&[(bad, 0o644, b"")]), Err(Error::BadPath(_))), "{bad:?}");
    }
}

#[test]
fn an_empty_archive_is_a_trailer() {
    assert!(entries(&node_cpio(&[]).unwrap()).is_empty());
}
