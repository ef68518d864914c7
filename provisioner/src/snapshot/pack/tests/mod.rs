//! A made-up lab, exported and imported: `cut_off` on the way, and from `hostile` files.

mod cut_off;
mod hostile;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use lab_vmm::{config::DiskFormat, qcow2};

use super::{gather::gather, *};
use crate::{
    lab::Lab,
    labfile,
    paths::Paths,
    progress::{Progress, Task},
    snapshot,
    state::{LabState, NodeRecord},
};

const LABFILE: &str = "name = \"demo\"\nimage = \"tiny\"\n[node.a]\n[stack.own]\n\
                       [[step]]\nname = \"one\"\nscript = \"scripts/one.sh\"\n";
const STACK: &str = "description = \"own\"\n[[source]]\nname = \"here\"\ndescription = \"x\"\n\
                     [[step]]\nname = \"s\"\nkind = \"run\"\nscript = \"s.sh\"\n";

/// A lab with a snapshot, made up.
struct Made {
    dir: tempfile::TempDir,
    lab: Lab,
}

/// A file with data here and there, and a hole at its end.
fn sparse_file(path: &Path, seed: u8) {
    let file = File::create(path).unwrap();
    file.set_len((7 << 20) + 3).unwrap();
    for (place, length) in [(4096, 10_000), (3 << 20, 2 << 20)] {
        let mut state = u32::from(seed);
        let noise: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8 | 1
            })
            .collect();
        file.write_all_at(&noise, place).unwrap();
    }
}

impl Made {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let work = dir.path().join("work");
        fs::create_dir_all(work.join("scripts")).unwrap();
        fs::create_dir_all(work.join("stacks/own/files")).unwrap();
        for (path, text) in [
            ("lab.toml", LABFILE),
            ("lab.lock", "lab = \"1\"\n"),
            ("scripts/one.sh", "#!/bin/sh\necho one\n"),
            ("stacks/own/stack.toml", STACK),
            ("stacks/own/s.sh", "true\n"),
            ("stacks/own/files/extra", ""),
            ("unrelated", "not to be exported"),
        ] {
            fs::write(work.join(path), text).unwrap();
        }
        fs::set_permissions(work.join("scripts/one.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        let topology = labfile::load(&work.join("lab.toml")).unwrap();
        let paths = Paths::at(&dir.path().join("home"), &dir.path().join("run"));
        let lab = Lab::new(&paths, topology, Progress::new(true)).unwrap();
        lab.dirs.create().unwrap();
        lab.record().unwrap();
        for (path, text) in [("id_ed25519", "private"), ("id_ed25519.pub", "public"), ("known_hosts", "x")] {
            fs::write(lab.dirs.dir.join("ssh").join(path), text).unwrap();
        }
        let image = lab.pinned("tiny-0123");
        fs::create_dir_all(&image).unwrap();
        sparse_file(&image.join("root.img"), 1);
        fs::write(image.join("kernel"), "kernel").unwrap();
        let manifest = r#"{"version": 1, "name": "tiny", "description": "", "architecture": "x86_64",
            "source": "trixie", "definition": "ab", "created_unix_s": 1, "ssh": "tcp", "cmdline": "",
            "root_file": "root.img", "root_format": "raw", "root_bytes": 7340035, "files": {}}"#;
        fs::write(image.join("manifest.json"), manifest).unwrap();
        fs::create_dir_all(lab.dirs.dir.join("layers/aa")).unwrap();
        let layer = lab.dirs.dir.join("layers/aa/overlay.qcow2");
        qcow2::create_overlay(&layer, &image.join("root.img"), DiskFormat::Raw, 16 << 20).unwrap();
        let made = Self { dir, lab };
        let node = made.snapshot().join("a");
        fs::create_dir_all(&node).unwrap();
        sparse_file(&node.join("memory"), 2);
        for file in ["state", "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"] {
            fs::write(node.join(file), file).unwrap();
        }
        made.record(|_| {});
        made
    }

    fn snapshot(&self) -> PathBuf {
        self.lab.dirs.dir.join("snapshots/one")
    }

    /// Writes the snapshot's record, with a change.
    fn record(&self, change: impl FnOnce(&mut snapshot::Record)) {
        let node = snapshot::SavedNode {
            running: true,
            record: NodeRecord { image: "tiny-0123".into(), machine_id: "0".into() },
            steps: Default::default(),
            layers: vec!["aa".into()],
        };
        let mut record = snapshot::Record {
            format: snapshot::FORMAT,
            lab_version: "1".into(),
            created_s: 5,
            state: self.lab.state(),
            nodes: [("a".into(), node)].into(),
        };
        change(&mut record);
        crate::json_file::write(&self.snapshot().join("snapshot.json"), &record).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn export(&self, name: &str) -> PathBuf {
        let file = self.path(name);
        export(&self.lab, "one", &file, &task()).unwrap();
        file
    }

    /// Another LAB_HOME.
    fn paths(&self, name: &str) -> Paths {
        Paths::at(&self.path(name), &self.dir.path().join("run"))
    }

    /// Imports into another LAB_HOME.
    fn import(&self, home: &str, file: &Path) -> Result<Imported, Error> {
        let folder = self.path(&format!("{home}-work"));
        import(&self.paths(home), Reader::open(file)?, &folder, &task())
    }

    /// An import must fail, say this, and leave nothing that is a lab.
    fn refused(&self, file: &Path, says: &str) {
        let home = "refusing";
        let error = self.import(home, file).unwrap_err().to_string();
        assert!(error.contains(says), "{error:?} does not say {says:?}");
        assert!(error.contains(&file.display().to_string()), "{error:?} does not name the file");
        let labs = fs::read_dir(self.path(home).join("labs")).map_or(0, Iterator::count);
        assert_eq!(labs, 0, "{error}");
        assert!(!self.path("refusing-work").exists(), "{error}");
    }
}

fn task() -> Task {
    Progress::new(true).begin("demo", "test")
}

/// Same content, and as much room on the disk.
fn assert_same(one: &Path, other: &Path) {
    let (left, right) = (fs::metadata(one).unwrap(), fs::metadata(other).unwrap());
    assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{}", other.display());
    assert!(right.blocks() <= left.blocks(), "{}: {} blocks", other.display(), right.blocks());
    assert_eq!(right.mode() & 0o100, left.mode() & 0o100, "{}", other.display());
}

fn assert_imported(made: &Made, home: &str) {
    let (from, to) = (&made.lab.dirs.dir, made.path(home).join("labs/demo"));
    for file in [
        "images/tiny-0123/root.img",
        "images/tiny-0123/manifest.json",
        "layers/aa/overlay.qcow2",
        "snapshots/one/a/memory",
        "snapshots/one/a/state",
        "ssh/id_ed25519",
    ] {
        assert_same(&from.join(file), &to.join(file));
    }
    assert!(fs::metadata(to.join("snapshots/one/a/memory")).unwrap().blocks() < 3 << 11, "holes");
    assert!(!to.join("ssh/known_hosts").exists());
    let folder = made.path(&format!("{home}-work")).canonicalize().unwrap();
    for file in ["lab.toml", "lab.lock", "scripts/one.sh", "stacks/own/s.sh", "stacks/own/files/extra"] {
        assert_same(&made.path("work").join(file), &folder.join(file));
    }
    assert!(!folder.join("unrelated").exists());
    let state = LabState::read(&made.paths(home).lab("demo")).unwrap().unwrap();
    assert_eq!(state.topology, labfile::load(&folder.join("lab.toml")).unwrap());
    assert!(state.came_up);
    let lab = Lab::new(&made.paths(home), state.topology.clone(), Progress::new(true)).unwrap();
    assert_eq!(snapshot::state(&lab, "one").unwrap().topology, state.topology);
    assert_eq!(snapshot::list(&lab).unwrap()[0].nodes, ["a"]);
    assert_eq!(fs::read_dir(made.path(home).join("labs")).unwrap().count(), 1, "nothing is left");
}

/// Where each chunk of a file begins, and its end.
fn chunk_starts(file: &Path) -> Vec<u64> {
    let mut reader = Reader::open(file).unwrap();
    let mut starts = vec![reader.mark().position];
    while reader.chunk().unwrap().is_some() {
        starts.push(reader.mark().position);
    }
    starts
}

#[test]
fn a_snapshot_goes_round() {
    let made = Made::new();
    let file = made.export("file");
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600, "the key is in it");
    assert!(metadata.len() < 5 << 20, "{} bytes", metadata.len());
    let again = export(&made.lab, "one", &file, &task()).unwrap_err().to_string();
    assert!(again.contains("exists already"), "{again}");
    made.import("other", &file).unwrap();
    assert_imported(&made, "other");
    let error = made.import("other", &file).unwrap_err().to_string();
    assert!(error.contains("there is a lab `demo` already") && error.contains("lab.toml destroy"), "{error}");
}

#[test]
fn what_does_not_lie_with_the_labfile_is_named() {
    let made = Made::new();
    let labfile = made.path("work/lab.toml");
    fs::write(made.path("outside.sh"), "true\n").unwrap();
    fs::write(&labfile, LABFILE.replace("scripts/one.sh", "../outside.sh")).unwrap();
    let error = export(&made.lab, "one", &made.path("file"), &task()).unwrap_err().to_string();
    assert!(error.contains("uses ../outside.sh"), "{error}");
    assert!(!made.path("file").exists() && !made.path("file.part").exists());
}

#[test]
fn an_import_touches_nothing_that_is_there() {
    let made = Made::new();
    let file = made.export("file");
    let folder = made.path("third-work");
    fs::create_dir_all(&folder).unwrap();
    for (name, text) in [("notes", "mine"), ("lab.toml", "mine"), ("lab.toml", &*"x".repeat(LABFILE.len()))] {
        fs::write(folder.join(name), text).unwrap();
        let error = made.import("third", &file).unwrap_err();
        assert!(matches!(error, Error::Folder(_)), "{error}");
        assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), text);
        fs::remove_file(folder.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(made.path("work/lab.toml"), folder.join("lab.toml")).unwrap();
    assert!(matches!(made.import("third", &file), Err(Error::Folder(_))));
    fs::remove_file(folder.join("lab.toml")).unwrap();
    assert!(!made.path("third/labs/demo").exists());
    // What an `up` that got nowhere has left is in nobody's way, unless it is at work.
    let dirs = made.paths("third").lab("demo");
    dirs.create().unwrap();
    let held = crate::lock::try_lock(&dirs.lock()).unwrap().unwrap();
    assert!(matches!(made.import("third", &file), Err(Error::Busy(_))));
    drop(held);
    made.import("third", &file).unwrap();
    assert_imported(&made, "third");
}
