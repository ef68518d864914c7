//! Images made here are QEMU's idea of good ones, and the other way round; bad ones are told as such.

use std::{
    fs,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;

/// Opens a disk that this test has let go. A program that another test starts has its file, and its lock, too, from its
/// fork to its exec.
pub(crate) fn when_free<T, E: std::fmt::Display>(open: impl Fn() -> Result<T, E>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(error) => {
                let in_use = error.to_string().contains("in use by another machine");
                assert!(in_use && Instant::now() < end, "{error}");
            }
        }
        std::thread::yield_now();
    }
}

/// Runs a tool of QEMU's and returns what it printed.
pub(super) fn qemu(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{tool} (package qemu-utils) is needed by this test: {e}"));
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn qemu_and_lab_see_who_has_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    create_empty(&image, 1 << 20).unwrap();
    let resize = || {
        let arguments = ["resize", "-q", "-f", "qcow2", text(&image), "+1M"];
        Command::new("qemu-img").args(arguments).output().unwrap()
    };
    let read = || Command::new("qemu-img").args(["check", "-q", text(&image)]).status().unwrap().success();

    let writer = open(&image, true).unwrap();
    let refused = resize();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("Is another process using the image"), "{said}");
    assert!(!read());
    // Frozen, it is read by both, and written by none.
    super::qemu_locks::keep_reading(&writer.file);
    rustix::fs::flock(&writer.file, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
    let reader = open(&image, false).unwrap();
    assert!(read() && !resize().status.success());
    drop((reader, writer));
    when_free(|| match resize() {
        done if done.status.success() => Ok(()),
        _ => Err(Error::InUse { path: image.clone() }),
    });

    // A program of QEMU's that writes, until its input ends.
    let mut io = Command::new("qemu-io");
    io.args(["-f", "qcow2", text(&image)]).stdin(std::process::Stdio::piped());
    let mut io = io.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut prompt = [0; 8];
    std::io::Read::read_exact(io.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    assert_eq!(&prompt, b"qemu-io>");
    for writable in [true, false] {
        assert!(matches!(open(&image, writable), Err(Error::InUse { .. })), "writable: {writable}");
    }
    drop(io.stdin.take());
    assert!(io.wait().unwrap().success());
    when_free(|| open(&image, true));
}

#[test]
fn made_images_are_sound_to_qemu() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("images")).unwrap();
    fs::create_dir_all(folder.path().join("labs/one")).unwrap();
    let base = folder.path().join("images/base.qcow2");
    let overlay = folder.path().join("labs/one/disk.qcow2");
    create_empty(&base, 10 << 30).unwrap();
    create_overlay(&overlay, &base, DiskFormat::Qcow2, 20 << 30).unwrap();
    for image in [&base, &overlay] {
        qemu("qemu-img", &["check", text(image)]);
    }
    let described: serde_json::Value =
        serde_json::from_str(&qemu("qemu-img", &["info", "--output=json", text(&overlay)])).unwrap();
    assert_eq!(described["virtual-size"], 20u64 << 30);
    assert_eq!(described["backing-filename"], "../../images/base.qcow2");
    assert_eq!(described["backing-filename-format"], "qcow2");

    let seen = info(&overlay).unwrap();
    assert_eq!(seen.size_bytes, 20 << 30);
    assert_eq!(seen.cluster_bytes, 64 << 10);
    let (backing, format) = seen.backing.unwrap();
    assert_eq!(fs::canonicalize(backing).unwrap(), fs::canonicalize(&base).unwrap());
    assert_eq!(format, Some(DiskFormat::Qcow2));

    // Both can be moved together.
    let moved = folder
        .path()
        .parent()
        .unwrap()
        .join(format!("{}-moved", folder.path().file_name().unwrap().to_str().unwrap()));
    fs::rename(folder.path(), &moved).unwrap();
    let opened = open(&moved.join("labs/one/disk.qcow2"), true).map(|chain| chain.access.size());
    fs::rename(&moved, folder.path()).unwrap();
    assert_eq!(opened.unwrap(), 20 << 30);
    // Nothing else is left beside them.
    assert_eq!(fs::read_dir(folder.path().join("labs/one")).unwrap().count(), 1);
}

#[test]
fn an_overlay_is_not_smaller_than_its_base_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.raw");
    fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
    let overlay = folder.path().join("disk.qcow2");
    let error = create_overlay(&overlay, &base, DiskFormat::Raw, 1 << 19).unwrap_err().to_string();
    assert!(error.contains("a disk of 524288 bytes is too small"), "{error}");
    assert!(!overlay.exists());
    create_overlay(&overlay, &base, DiskFormat::Raw, 1 << 20).unwrap();
    let before = fs::read(&overlay).unwrap();
    let error = create_empty(&overlay, 1 << 20).unwrap_err().to_string();
    assert!(error.contains("disk.qcow2: cannot make it"), "{error}");
    assert_eq!(fs::read(&overlay).unwrap(), before);
    let error = create_empty(&folder.path().join("odd.qcow2"), 1000).unwrap_err().to_string();
    assert!(error.contains("multiple of 512"), "{error}");
}

#[test]
fn a_writable_image_is_opened_once() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.qcow2");
    let overlay = folder.path().join("disk.qcow2");
    create_empty(&base, 1 << 20).unwrap();
    create_overlay(&overlay, &base, DiskFormat::Qcow2, 1 << 20).unwrap();
    let first = open(&overlay, true).unwrap();
    for (path, writable) in [(&overlay, true), (&overlay, false), (&base, true)] {
        let Err(error) = open(path, writable) else { panic!("{} was opened again", path.display()) };
        assert!(matches!(error, Error::InUse { .. }), "{error}");
    }
    open(&base, false).unwrap();
    drop(first);
    when_free(|| open(&overlay, true));
}

#[test]
fn bad_images_are_told_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let sound = folder.path().join("sound.qcow2");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", text(&sound), "64M"]);
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", text(&sound)]);
    let sound_bytes = fs::read(&sound).unwrap();
    let damage = |offset: u64, bytes: &[u8]| {
        let path = folder.path().join("bad.qcow2");
        fs::write(&path, &sound_bytes).unwrap();
        fs::File::options().write(true).open(&path).unwrap().write_all_at(bytes, offset).unwrap();
        path
    };
    let bad = folder.path().join("bad.qcow2");
    type Damage<'a> = Box<dyn Fn() + 'a>;
    let cases: [(&str, Damage<'_>); 13] = [
        ("does not begin as one does", Box::new(|| drop(damage(0, b"hello")))),
        ("version other than 2 and 3", Box::new(|| drop(damage(4, &[0, 0, 0, 9])))),
        ("cluster size or refcount width", Box::new(|| drop(damage(20, &[0, 0, 0, 60])))),
        ("L1 table is too small", Box::new(|| drop(damage(24, &[0, 0, 99, 0])))),
        ("it is encrypted", Box::new(|| drop(damage(32, &[0, 0, 0, 1])))),
        ("L1 table lies outside", Box::new(|| drop(damage(36, &[1, 0, 0, 0])))),
        ("L1 table lies outside", Box::new(|| drop(damage(40, &[0, 9])))),
        ("refcount table lies outside", Box::new(|| drop(damage(48, &[0, 9])))),
        ("marked as corrupt", Box::new(|| drop(damage(79, &[2])))),
        ("keeps its data in another file", Box::new(|| drop(damage(79, &[4])))),
        ("was not closed properly", Box::new(|| drop(damage(79, &[1])))),
        ("ends within its header", Box::new(|| fs::write(&bad, &sound_bytes[..50]).unwrap())),
        ("the file was cut short", Box::new(|| fs::write(&bad, &sound_bytes[..4 << 20]).unwrap())),
    ];
    for (expected, damage) in cases {
        damage();
        let Err(error) = open(&bad, true) else { panic!("opened in spite of: {expected}") };
        let error = error.to_string();
        assert!(error.contains(expected), "{error:?} instead of {expected:?}");
        assert!(error.contains("bad.qcow2"), "{error} does not name the file");
    }
    assert!(open(&sound, true).is_ok());
}

#[test]
fn a_chain_that_bites_its_tail_or_has_no_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.qcow2");
    qemu(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", text(&image), "1M"],
    );
    let Err(error) = open(&image, false) else { panic!("opened a circle") };
    assert!(error.to_string().contains("the chain is a circle"), "{error}");

    let image = folder.path().join("b.qcow2");
    create_overlay(&image, &folder.path().join("a.qcow2"), DiskFormat::Qcow2, 1 << 20).unwrap();
    // The extension that names the format becomes one of an unknown type.
    let bytes = fs::read(&image).unwrap();
    let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    fs::File::options().write(true).open(&image).unwrap().write_all_at(&[1; 4], at as u64).unwrap();
    let Err(error) = open(&image, false) else { panic!("guessed a format") };
    assert!(error.to_string().contains("does not say of which format"), "{error}");
}

/// What `qemu-img check` finds that is worse than space lost.
fn corruptions(path: &Path) -> u64 {
    let output = Command::new("qemu-img").args(["check", "--output=json", text(path)]).output().unwrap();
    let checked: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    checked.get("corruptions").map_or(0, |count| count.as_u64().unwrap())
}

/// A tiny disk of small clusters, so that tables are many: 512-byte clusters map 32 KiB by an L2 table.
fn small_clusters(path: &Path, refcount_bits: u32) {
    let options = format!("cluster_size=512,refcount_bits={refcount_bits}");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(path), "4M"]);
}

#[test]
fn tables_that_count_as_free_are_counted_again() {
    let folder = tempfile::tempdir().unwrap();
    for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
        let path = folder.path().join(format!("{refcount_bits}.qcow2"));
        small_clusters(&path, refcount_bits);
        let chain = open(&path, true).unwrap();
        for i in 0..40 {
            chain.access.write(&vec![i; 700], 100_000 * u64::from(i)).unwrap();
        }
        // As a SIGKILL would leave it.
        let killed = folder.path().join("killed.qcow2");
        fs::copy(&path, &killed).unwrap();
        assert!(corruptions(&killed) > 0, "with {refcount_bits} bits nothing is wrong: this tests nothing");
        drop(open(&killed, true).unwrap());
        assert_eq!(corruptions(&killed), 0, "with {refcount_bits} bits");
    }
}

/// A quarter of the usual cases, for what works with files.
fn fewer() -> ProptestConfig {
    let usual = ProptestConfig::default();
    ProptestConfig { cases: usual.cases.div_ceil(4), ..usual }
}

proptest! {
    #![proptest_config(fewer())]

    /// Writes and flushes, and a SIGKILL at some moment; then more writes. What was flushed stays what it was.
    #[test]
    fn what_was_flushed_survives_kills(
        operations in prop::collection::vec((0u64..2000, 1usize..6, any::<u8>(), 0u8..8), 1..60),
        kills in prop::collection::vec(0usize..60, 3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut path = folder.path().join("0.qcow2");
        small_clusters(&path, 16);
        let mut chain = open(&path, true).unwrap();
        // For each sector: what may be read there after a kill, the flushed value first.
        let mut sectors = vec![vec![0u8]; 2048];
        for (step, (sector, count, value, then)) in operations.into_iter().enumerate() {
            let sector = sector as usize;
            if then == 0 {
                chain.access.discard_to_zero(sector as u64 * 512, count as u64 * 512).unwrap();
            } else {
                chain.access.write(&vec![value; count * 512], sector as u64 * 512).unwrap();
            }
            for sector in &mut sectors[sector..sector + count] {
                sector.push(if then == 0 { 0 } else { value });
            }
            if then == 1 {
                chain.access.flush().unwrap();
                for sector in &mut sectors {
                    *sector = vec![*sector.last().unwrap()];
                }
            }
            if kills.contains(&step) {
                let killed = folder.path().join(format!("{}.qcow2", step + 1));
                fs::copy(&path, &killed).unwrap();
                chain = open(&killed, true).unwrap();
                path = killed;
                let mut data = vec![0; 512];
                for (index, sector) in sectors.iter_mut().enumerate() {
                    chain.access.read(&mut data, index as u64 * 512).unwrap();
                    prop_assert!(data.iter().all(|byte| *byte == data[0]), "sector {index} is torn");
                    prop_assert!(sector.contains(&data[0]), "sector {index}: {} is none of {sector:?}", data[0]);
                    *sector = vec![data[0]];
                }
            }
        }
        drop(chain);
        prop_assert_eq!(corruptions(&path), 0);
    }

    /// Bytes changed anywhere in a small image: it opens or it does not, and reading it does not matter either.
    #[test]
    fn damaged_images_do_not_matter(changes in prop::collection::vec((0usize..400_000, any::<u8>()), 1..20), cut in 0usize..800_000) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.qcow2");
        create_empty(&path, 4 << 20).unwrap();
        {
            let chain = open(&path, true).unwrap();
            chain.access.write(&vec![7u8; 100_000], 70_000).unwrap();
            chain.access.flush().unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        for (offset, value) in changes {
            // Most of it is empty; the header and the tables are what counts.
            let offset = match offset % 4 { 0 => offset % 112, 1 => 65536 + offset % 16, _ => offset };
            if let Some(byte) = bytes.get_mut(offset) {
                *byte = value;
            }
        }
        bytes.truncate(cut.max(1));
        fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        let _ = info(&path);
        if let Ok(chain) = open(&path, true) {
            let mut data = vec![0u8; 1 << 20];
            let _ = chain.access.read(&mut data, 0);
            let _ = chain.access.write(&data, 1 << 20);
            let _ = chain.access.flush();
        }
    }
}
