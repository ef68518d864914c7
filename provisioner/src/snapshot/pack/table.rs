//! The table of contents of a packed file, an exported snapshot or an offline bundle: which files it has. Whoever wrote it
//! may have meant harm: a table that was checked names nothing but files of one lab, or of a bundle, in their places.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::super::check_name;
use crate::paths::SECRETS;

/// Version of the format.
pub const FORMAT: u32 = 1;
/// Folder of the labfile and what it refers to, where it is known as [`LABFILE`].
pub const FOLDER: &str = "labfile";
/// The labfile's name in there.
pub const LABFILE: &str = "lab.toml";
/// Name of the lab's private key; that of the public one has `.pub` behind it.
const KEY: &str = "id_ed25519";
/// Folder of a bundle for files of the bundles that stacks use.
pub const BUNDLES: &str = "bundles";
/// Longest file: what file systems can have as a sparse one.
const LENGTH_MAX: u64 = 1 << 43;
/// Longest path, in bytes.
const PATH_MAX: usize = 1024;
/// Longest name of a file or folder, in bytes.
const NAME_MAX: usize = 255;

/// What a packed file holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of lab that it was made by.
    pub lab_version: String,
    /// Name of the lab.
    pub lab: String,
    /// Name of the snapshot; `None` for a bundle, which has what an `up` of the lab would fetch or build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// When it was made: seconds since 1970.
    pub created_s: u64,
    /// Space that all files take, at most, without their holes.
    pub data_bytes: u64,
    /// The files.
    pub files: Vec<Entry>,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place: in the lab's folder, in [`FOLDER`], or in a bundle.
    pub path: String,
    /// Its length in bytes, holes included.
    pub length: u64,
    /// Its permissions.
    pub mode: u32,
    /// SHA-256 of a small one, hexadecimal: it may change without its length doing so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl Table {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        for name in [Some(&self.lab), self.snapshot.as_ref()].into_iter().flatten() {
            check_name(name).map_err(|_| format!("`{}` is no name", name.escape_debug()))?;
        }
        let mut files = BTreeSet::new();
        let mut total: u64 = 0;
        for file in &self.files {
            let shown = file.path.escape_debug();
            if !self.is_place(&file.path) {
                return Err(format!("`{shown}` is no place for a file of a lab"));
            }
            if !files.insert(file.path.as_str()) {
                return Err(format!("`{shown}` is in it twice"));
            }
            total = total.saturating_add(file.length);
            if file.length > LENGTH_MAX {
                return Err(format!("`{shown}` is too long: {} bytes", file.length));
            }
        }
        if self.data_bytes > total {
            return Err("it takes more space than its files are long".into());
        }
        for file in &files {
            let above = file.match_indices('/').filter_map(|(end, _)| file.get(..end));
            if above.into_iter().any(|folder| files.contains(folder)) {
                return Err(format!("`{}` lies in a file", file.escape_debug()));
            }
        }
        let Some(snapshot) = &self.snapshot else { return Ok(()) };
        let needed = [
            format!("{FOLDER}/{LABFILE}"),
            format!("ssh/{KEY}"),
            format!("snapshots/{snapshot}/snapshot.json"),
        ];
        match needed.iter().find(|path| !files.contains(path.as_str())) {
            Some(path) => Err(format!("`{path}` is missing")),
            None => Ok(()),
        }
    }

    /// Whether a file of a lab, or of a bundle, can be there.
    fn is_place(&self, path: &str) -> bool {
        let parts: Vec<&str> = path.split('/').collect();
        let plain = |part: &&str| {
            !["", ".", ".."].contains(part) && part.len() <= NAME_MAX && !part.chars().any(char::is_control)
        };
        path.len() <= PATH_MAX
            && parts.iter().all(plain)
            && match (&self.snapshot, parts.as_slice()) {
                (_, ["images", folder, _]) => !folder.starts_with('.'),
                (_, ["layers", id, "overlay.qcow2"]) => !id.starts_with('.'),
                (None, ["layers", id, "layer.json"]) => !id.starts_with('.'),
                (None, [BUNDLES, file]) => !file.starts_with('.'),
                (None, _) => false,
                // What git would run by itself is no part of a lab.
                (_, [FOLDER, rest @ ..]) => {
                    !rest.is_empty() && !rest.iter().any(|part| part.eq_ignore_ascii_case(".git"))
                }
                (_, ["ssh", file]) => file.strip_suffix(".pub").unwrap_or(file) == KEY,
                (_, [SECRETS, file]) => !file.starts_with('.'),
                (Some(snapshot), ["snapshots", name, "snapshot.json"]) => name == snapshot,
                (Some(snapshot), ["snapshots", name, node, _]) => name == snapshot && !node.starts_with('.'),
                _ => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(paths: &[&str]) -> Table {
        let needed = ["labfile/lab.toml", "ssh/id_ed25519", "snapshots/one/snapshot.json"];
        let file = |path: &&str| Entry { path: path.to_string(), length: 4, mode: 0o600, sha256: None };
        Table {
            format: FORMAT,
            lab_version: "1".into(),
            lab: "demo".into(),
            snapshot: Some("one".into()),
            created_s: 1,
            data_bytes: 0,
            files: needed.iter().chain(paths).map(file).collect(),
        }
    }

    #[test]
    fn files_of_a_lab_have_their_places() {
        let good = [
            "labfile/stacks/own/a b.sh",
            "labfile/.hidden",
            "ssh/id_ed25519.pub",
            "secrets/kubernetes.join",
            "images/tiny-012345/root.img",
            "layers/abc/overlay.qcow2",
            "snapshots/one/a/memory",
        ];
        assert_eq!(table(&good).check(), Ok(()));
    }

    #[test]
    fn other_places_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "labfile",
            "labfile/",
            "labfile/.git/config",
            "labfile/stacks/x/.Git/config",
            "labfile/../x",
            "labfile/a/./b",
            "labfile//x",
            "labfile/a\nb",
            "labfile/a\0b",
            "lab.json",
            "lock",
            "nodes/a/node.json",
            "ssh/config",
            "ssh/id_ed25519.pub.pub",
            "secrets/.x",
            "secrets/a/b",
            "images/x",
            "images/../x",
            "images/a/b/c",
            "layers/a/other",
            "snapshots/two/snapshot.json",
            "snapshots/one/a/b/c",
            "snapshots/one",
            &format!("labfile/{}", "x".repeat(256)),
            &format!("labfile/{}", "x/".repeat(600) + "x"),
        ] {
            assert!(table(&[bad]).check().is_err(), "{bad:?}");
        }
        for bad in [&["labfile/a", "labfile/a"][..], &["labfile/a", "labfile/a/b"]] {
            assert!(table(bad).check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_bundle_has_images_and_layers_alone() {
        let bundle = |path: &str| {
            let mut table = table(&[path]);
            table.snapshot = None;
            table.files.drain(..3);
            table.check()
        };
        for good in
            ["images/tiny-0/root.img", "layers/k/layer.json", "layers/k/overlay.qcow2", "bundles/SHA256SUMS"]
        {
            assert_eq!(bundle(good), Ok(()), "{good}");
        }
        for bad in
            ["labfile/lab.toml", "ssh/id_ed25519", "secrets/x", "bundles/a/b", "bundles/.x", "layers/k/x"]
        {
            assert!(bundle(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_and_lengths_are_bounded() {
        let changed = |change: &dyn Fn(&mut Table)| {
            let mut table = table(&[]);
            change(&mut table);
            table.check()
        };
        assert!(changed(&|table| table.lab = "../x".into()).is_err());
        assert!(changed(&|table| table.snapshot = Some("..".into())).is_err());
        assert!(changed(&|table| table.files[0].length = u64::MAX).is_err());
        assert!(changed(&|table| table.data_bytes = u64::MAX).is_err());
        assert!(changed(&|table| table.files.truncate(1)).unwrap_err().contains("is missing"));
    }
}
