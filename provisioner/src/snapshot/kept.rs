//! What the first `up` of a lab came to is kept, so that a later one need not do it again: the snapshot `first-up` of the
//! running lab, with everything below it, in `LAB_HOME/kept/NAME`. It outlives `lab destroy`, and the next `up` starts
//! from there, if all that it depends on is as it was.
//!
//! The folder is built like a lab's and shares its files by hard links: nothing is copied in either direction.

use std::{collections::BTreeMap, fs, path::PathBuf};

use sha2::{Digest, Sha256};

use super::{Error, FIRST_UP, clear, folder, io, link, link_whole, restore::under_way, save};
use crate::{actions, files::hex, json_file, lab::Lab, paths::SECRETS, progress::Task};

/// Room on the disk that must be left when the memory of all nodes has been written, in bytes.
const SPARE: u64 = 1 << 30;

/// All that a lab depends on: what, and its digest or value.
type Key = BTreeMap<String, String>;

fn kept(lab: &Lab) -> PathBuf {
    lab.paths.home().join("kept").join(&lab.topology.name)
}

/// What keeps a kept snapshot from being used.
#[derive(Debug)]
pub enum Found {
    /// There is none.
    Nothing,
    /// It is of another lab: what differs.
    Differs(String),
    /// It is in the lab's folder now, as snapshot [`FIRST_UP`].
    There,
}

/// Whether something was kept of a lab of this name.
pub fn is_there(lab: &Lab) -> bool {
    kept(lab).join("key.json").exists()
}

/// Puts what was kept of this lab into its folder, which has nothing yet.
pub fn bring_back(lab: &Lab) -> Result<Found, Error> {
    let kept = kept(lab);
    let Some(then) = json_file::read::<Key>(&kept.join("key.json"))? else { return Ok(Found::Nothing) };
    let now = key(lab)?;
    if let Some(what) = difference(&then, &now) {
        return Ok(Found::Differs(what));
    }
    for part in ["images", "layers", "ssh", SECRETS, "snapshots"] {
        link(&kept.join(part), &lab.dirs.dir.join(part))?;
    }
    Ok(Found::There)
}

/// What was brought back did not come to run: the lab has nothing again.
pub fn take_back(lab: &Lab) -> Result<(), Error> {
    for part in ["lab.json", "nodes", "snapshots", "layers", "images"] {
        clear(&lab.dirs.dir.join(part))?;
    }
    clear(&under_way(&lab.dirs))?;
    Ok(lab.dirs.create()?)
}

/// Keeps the running lab as it is. False if there is no room for it.
pub fn keep(lab: &Lab, task: &Task) -> Result<bool, Error> {
    let memory: u64 = lab.topology.nodes.iter().map(|node| node.memory_mib << 20).sum();
    let room = rustix::fs::statvfs(&lab.dirs.dir).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    if room.is_ok_and(|room| room < memory.saturating_add(SPARE)) {
        return Ok(false);
    }
    // Of an `up` that was cut off before this one was kept.
    if folder(&lab.dirs, FIRST_UP).join("snapshot.json").exists() {
        super::forget(lab, FIRST_UP)?;
    }
    save::take(lab, FIRST_UP, true, task)?;
    let target = kept(lab);
    let partial = target.with_file_name(format!(".{}.part", lab.topology.name));
    clear(&partial)?;
    crate::paths::private_dir(&partial)?;
    link_whole(lab, FIRST_UP, &partial)?;
    json_file::write(&partial.join("key.json"), &key(lab)?)?;
    forget(lab)?;
    fs::rename(&partial, &target).map_err(io("make", &target))?;
    Ok(true)
}

/// Removes what is kept of this lab.
pub fn forget(lab: &Lab) -> Result<(), Error> {
    let kept = kept(lab);
    // Without a key it is nothing.
    clear(&kept.join("key.json"))?;
    clear(&kept)
}

/// All that the lab depends on, as things are now.
fn key(lab: &Lab) -> Result<Key, Error> {
    let mut key = Key::new();
    for item in actions::plan(lab).map_err(Box::new)?.items {
        if let Some(inputs) = item.action.inputs(lab) {
            let subject = item.node.as_deref().unwrap_or(&lab.topology.name);
            key.insert(format!("{subject}: {}", item.action.describe()), digest(&inputs));
        }
    }
    key.insert("the version of lab".into(), env!("CARGO_PKG_VERSION").into());
    Ok(key)
}

fn digest(text: &str) -> String {
    hex(&Sha256::digest(text)[..16])
}

/// What differs first, in words.
fn difference(then: &Key, now: &Key) -> Option<String> {
    let changed = now.iter().find(|(name, value)| then.get(*name).is_some_and(|before| before != *value));
    let added = now.keys().find(|name| !then.contains_key(*name));
    let removed = then.keys().find(|name| !now.contains_key(*name));
    changed
        .map(|(name, _)| format!("{name} has changed"))
        .or_else(|| added.map(|name| format!("{name} is new")))
        .or_else(|| removed.map(|name| format!("{name} is gone")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let key = |pairs: &[(&str, &str)]| -> Key {
            pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
        };
        let then = key(&[("a: boot", "1"), ("a: step/x", "2")]);
        assert_eq!(difference(&then, &then), None);
        for (now, says) in [
            (key(&[("a: boot", "9"), ("a: step/x", "2")]), "a: boot has changed"),
            (key(&[("a: boot", "1"), ("a: step/x", "2"), ("b: boot", "1")]), "b: boot is new"),
            (key(&[("a: boot", "1")]), "a: step/x is gone"),
        ] {
            assert_eq!(difference(&then, &now).as_deref(), Some(says));
        }
    }
}
