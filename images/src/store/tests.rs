use std::collections::BTreeMap;

use lab_vmm::config::DiskFormat;

use super::*;
use crate::manifest::SshTransport;

/// An image's files in a partial folder of the store, and their manifest.
fn made(store: &Store, name: &str, content: &str) -> (tempfile::TempDir, Manifest) {
    let out = store.partial().unwrap();
    let mut files = BTreeMap::new();
    for file in ["kernel", "initrd", "root.img"] {
        let path = out.path().join(file);
        fs::write(&path, format!("{file} {content}")).unwrap();
        files.insert(file.to_owned(), manifest::digest_file(&path).unwrap());
    }
    let manifest = Manifest {
        version: manifest::VERSION,
        name: name.into(),
        description: String::new(),
        architecture: "x86_64".into(),
        source: "trixie".into(),
        definition: content.into(),
        created_unix_s: 0,
        ssh: SshTransport::Tcp,
        clock_port: None,
        cloud_init: false,
        cmdline: String::new(),
        root_file: "root.img".into(),
        root_format: DiskFormat::Raw,
        root_bytes: 10,
        root_sector_bytes: 512,
        files,
        packages: Vec::new(),
    };
    (out, manifest)
}

fn publish(store: &Store, name: &str, content: &str) -> Image {
    let _lock = store.lock(&mut |_| {}).unwrap();
    let (out, manifest) = made(store, name, content);
    store.publish(out, &manifest).unwrap()
}

/// Everything in the store's folder.
fn entries(store: &Store) -> Vec<String> {
    let entries = fs::read_dir(&store.folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn an_image_appears_is_replaced_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("images"));
    assert!(store.list().unwrap().is_empty());
    assert_eq!(
        store.get("tiny").unwrap_err().to_string(),
        "there is no image tiny; build it: lab image build tiny"
    );
    let first = publish(&store, "tiny", "one");
    let pinned = folder.path().join("pinned");
    fs::hard_link(first.root(), &pinned).unwrap();
    let second = publish(&store, "tiny", "two");
    assert_ne!(first.manifest.digest(), second.manifest.digest());
    assert_eq!(fs::read(store.get("tiny").unwrap().root()).unwrap(), b"root.img two");
    assert_eq!(fs::read(&pinned).unwrap(), b"root.img one", "what was linked stays as it was");
    assert_eq!(entries(&store), [".lock", "tiny"]);
    assert!(second.space_bytes() > 0);
    store.remove("tiny").unwrap();
    assert!(matches!(store.remove("tiny"), Err(Error::NotFound(_))));
    assert_eq!(entries(&store), [".lock"]);
}

#[test]
fn what_a_killed_process_left_is_no_image_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path());
    publish(&store, "tiny", "one");
    let (out, _) = made(&store, "tiny", "two");
    let left = out.keep();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.get("tiny").unwrap().manifest.definition, "one");
    drop(store.lock(&mut |_| {}).unwrap());
    assert!(!left.exists());
    assert_eq!(entries(&store), [".lock", "tiny"]);
}

#[test]
fn damage_is_told_with_file_and_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path());
    let image = publish(&store, "tiny", "one");
    store.verify("tiny").unwrap();
    let kernel = image.kernel();
    let told = |error: Error| error.to_string();

    fs::write(&kernel, "kernel two").unwrap();
    assert!(store.get("tiny").is_ok(), "the size is the same");
    let text = told(store.verify("tiny").unwrap_err());
    let remedy = "build it anew: lab image build tiny --force";
    let expected = format!("the image tiny is damaged: {} does not have the digest", kernel.display());
    assert!(text.starts_with(&expected) && text.ends_with(remedy), "{text}");

    fs::write(&kernel, "ker").unwrap();
    let text = told(store.get("tiny").unwrap_err());
    assert!(text.contains("kernel has 3 bytes instead of 10") && text.ends_with(remedy), "{text}");

    fs::remove_file(&kernel).unwrap();
    let text = told(store.get("tiny").unwrap_err());
    assert!(text.contains("kernel cannot be read (No such file"), "{text}");

    fs::write(image.dir.join(MANIFEST), "{").unwrap();
    let text = told(store.get("tiny").unwrap_err());
    assert!(text.contains("manifest.json is no manifest"), "{text}");
    let listed = store.list().unwrap();
    assert!(listed.len() == 1 && listed[0].1.is_err());

    publish(&store, "tiny", "three");
    store.verify("tiny").unwrap();
}

#[test]
fn a_manifest_cannot_name_files_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path());
    let image = publish(&store, "tiny", "one");
    let path = image.dir.join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap().replace("\"root.img\"", "\"../tiny/root.img\"");
    fs::write(&path, text).unwrap();
    let error = store.get("tiny").unwrap_err().to_string();
    assert!(error.contains("is not in the manifest"), "{error}");
    assert!(matches!(store.get("../tiny"), Err(Error::BadName(_))));
    assert!(matches!(store.remove(".."), Err(Error::BadName(_))));
}

#[test]
fn only_one_process_writes() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path());
    let lock = store.lock(&mut |_| {}).unwrap();
    let other = store.clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        drop(other.lock(&mut |step| sender.send(step.to_owned()).unwrap()).unwrap());
    });
    let told = receiver.recv().unwrap();
    assert!(told.starts_with("waiting for another process"), "{told}");
    assert!(!waiting.is_finished());
    drop(lock);
    waiting.join().unwrap();
}
