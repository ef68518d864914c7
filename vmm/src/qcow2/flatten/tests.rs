//! What QEMU's tools say of flattened images.

use std::fs;

use super::{
    super::{
        check, create_empty, open,
        tests::{qemu, text},
    },
    *,
};
use crate::config::DiskFormat;

#[test]
fn a_flattened_chain_is_the_same_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = |index: usize| folder.path().join(format!("{index}.qcow2"));
    let base = folder.path().join("root.img");
    fs::write(&base, vec![9; 1 << 20]).unwrap();
    let io = |file: &Path, what: &str| qemu("qemu-io", &["-f", "qcow2", "-c", what, text(file)]);
    create_overlay(&path(0), &base, DiskFormat::Raw, 4 << 20).unwrap();
    for index in 1..6 {
        create_overlay(&path(index), &path(index - 1), DiskFormat::Qcow2, 4 << 20).unwrap();
        io(&path(index), &format!("write -P {index} {}k 192k", index * 64));
    }
    // A hole over data, of the image and of a layer.
    io(&path(3), "write -z 0 128k");
    io(&path(5), "write -P 77 3M 4k");
    let _held = open(&path(5), true).unwrap(); // by a machine that stands still
    for (count, backing) in [(1, Some(path(4))), (3, Some(path(2))), (6, Some(base.clone()))] {
        let flat = folder.path().join(format!("flat{count}.qcow2"));
        flatten(&path(5), count, &flat).unwrap();
        qemu("qemu-img", &["check", text(&flat)]);
        let compared = qemu("qemu-img", &["compare", "-U", text(&path(5)), text(&flat)]);
        assert!(compared.contains("identical"), "{compared}");
        let found = info(&flat).unwrap().backing.map(|(path, _)| fs::canonicalize(path).unwrap());
        assert_eq!(found, backing.map(|path| fs::canonicalize(path).unwrap()));
        // What is below is not copied: 1 MiB of the image would show.
        assert!(fs::metadata(&flat).unwrap().len() < 1 << 20, "{count}");
    }
    // Without an image at the bottom.
    create_empty(&path(10), 1 << 20).unwrap();
    create_overlay(&path(11), &path(10), DiskFormat::Qcow2, 1 << 20).unwrap();
    io(&path(10), "write -P 1 0 64k");
    io(&path(11), "write -P 2 128k 64k");
    let flat = folder.path().join("flat.qcow2");
    flatten(&path(11), 2, &flat).unwrap();
    assert_eq!(info(&flat).unwrap().backing, None);
    assert!(qemu("qemu-img", &["compare", text(&path(11)), text(&flat)]).contains("identical"));
    // Above one that ends before it does.
    create_overlay(&path(12), &path(11), DiskFormat::Qcow2, 4 << 20).unwrap();
    io(&path(12), "write -P 3 2112k 64k");
    let flat = folder.path().join("larger.qcow2");
    flatten(&path(12), 3, &flat).unwrap();
    assert!(qemu("qemu-img", &["compare", text(&path(12)), text(&flat)]).contains("identical"));
}

#[test]
fn a_flattened_image_is_not_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let raw: Vec<u8> = (0..3u32 << 20).map(|at| (at >> 9) as u8).collect();
    fs::write(path("raw"), &raw).unwrap();
    for options in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
    ] {
        let (packed, flat) = (path(&format!("{options}.packed")), path(&format!("{options}.flat")));
        let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        qemu("qemu-img", &[&arguments[..], &[text(&path("raw")), text(&packed)]].concat());
        check(&packed).unwrap();
        flatten(&packed, 1, &flat).unwrap();
        let compressed = |image: &Path| {
            let report = qemu("qemu-img", &["check", "--output=json", text(image)]);
            serde_json::from_str::<serde_json::Value>(&report).unwrap()["compressed-clusters"].as_u64()
        };
        assert!(compressed(&packed) > Some(0), "{options}");
        assert!(compressed(&flat).unwrap_or(0) == 0, "{options}");
        let chain = open(&flat, false).unwrap();
        let mut read = vec![0; raw.len()];
        chain.access.read(&mut read[..], 0).unwrap();
        assert!(read == raw, "{options}");
        // Whatever the refcounts say of a file that was cut.
        let whole = fs::metadata(&packed).unwrap().len();
        fs::File::options().write(true).open(&packed).unwrap().set_len(whole / 2).unwrap();
        assert!(check(&packed).is_err(), "{options}");
    }
}
