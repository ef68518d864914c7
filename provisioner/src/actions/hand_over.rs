//! Files that a script finds in the node, and files that it leaves for others. They lie in a folder of the node's memory,
//! `$LAB_STEP`, only while the script runs. What one step gives and another takes is kept on this machine, in the lab's
//! folder `secrets/`, for this user alone: it may be a key.

use std::{io::Seek, path::PathBuf};

use super::{Error, script::Script};
use crate::{
    bundle::BundleFile,
    child,
    enclosed::{self, Enclosed},
    json_file,
    lab::Lab,
    progress::Task,
};

/// The folder in the node.
pub(super) const FOLDER: &str = "/run/lab-step";
/// How long one file may be on its way into or out of a node, in seconds, with KVM.
const LIMIT_S: u32 = 120;
/// Longest file that a step can give, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Files of a script.
#[derive(Debug, Clone, Default)]
pub struct Hands {
    /// Of the stack, or beside the labfile.
    pub files: Vec<Enclosed>,
    /// Of bundles.
    pub bundle: Vec<BundleFile>,
    /// The stack, whose steps give to each other.
    pub stack: String,
    /// What it leaves.
    pub gives: Vec<String>,
    /// What it finds.
    pub takes: Vec<String>,
}

impl Hands {
    fn are_empty(&self) -> bool {
        self.files.is_empty() && self.bundle.is_empty() && self.gives.is_empty() && self.takes.is_empty()
    }
}

/// Where a file is kept that a stack's step gave.
pub fn kept(lab: &Lab, stack: &str, name: &str) -> PathBuf {
    lab.dirs.secrets().join(format!("{stack}.{name}"))
}

/// Puts the script's files into the node's folder.
pub(super) fn before(lab: &Lab, script: &Script, task: &Task) -> Result<(), Error> {
    let hands = &script.hands;
    if hands.are_empty() {
        return Ok(());
    }
    let (channel, limit) = (lab.channel(&script.node.name), lab.limit(LIMIT_S));
    let passed = |what: &str, outcome: child::Outcome| match outcome.success() {
        true => Ok(()),
        false => Err(Error::HandOver {
            step: script.name.clone(),
            what: what.into(),
            reason: outcome.describe(limit),
            lost: crate::channel::lost(&outcome),
        }),
    };
    // What an earlier try left is not this one's.
    let fresh = format!("rm -rf {FOLDER} && mkdir -m 700 {FOLDER}");
    passed(FOLDER, channel.feed(&fresh, std::io::empty(), limit)?)?;
    if !hands.files.is_empty() {
        let what = "the files that it takes along";
        let archive = enclosed::pack(&hands.files).map_err(|error| Error::HandOver {
            step: script.name.clone(),
            what: what.into(),
            reason: error.to_string(),
            lost: false,
        })?;
        let unpack = format!("exec tar -C {FOLDER} -x -f -");
        passed(what, channel.feed(&unpack, archive.as_slice(), limit)?)?;
    }
    for file in &hands.bundle {
        task.detail(&format!("copying {}", file.name));
        passed(&file.name, channel.feed(&put(&file.name), file.open()?, limit)?)?;
    }
    for name in &hands.takes {
        let path = kept(lab, &hands.stack, name);
        let file = std::fs::File::open(&path).map_err(|source| Error::Io {
            action: "read what an earlier step gave,",
            path,
            source,
        })?;
        passed(name, channel.feed(&put(name), file, limit)?)?;
    }
    Ok(())
}

/// The files that a baked script finds, as one tar archive in a file of no name.
///
/// # Errors
/// A file of a bundle is not what the bundle says, or there is no room.
pub(super) fn archive(script: &Script) -> Result<Option<std::fs::File>, Error> {
    let hands = &script.hands;
    if hands.are_empty() {
        return Ok(None);
    }
    let what = "the files that it takes along";
    let failed = |error: std::io::Error| Error::HandOver {
        step: script.name.clone(),
        what: what.into(),
        reason: error.to_string(),
        lost: false,
    };
    let file = tempfile::tempfile_in("/var/tmp").map_err(failed)?;
    let mut archive = tar::Builder::new(&file);
    enclosed::append(&hands.files, &mut archive).map_err(failed)?;
    for bundled in &hands.bundle {
        let mut header = tar::Header::new_gnu();
        let content = bundled.open()?;
        header.set_size(content.metadata().map_err(failed)?.len());
        header.set_mode(0o600);
        archive.append_data(&mut header, &bundled.name, content).map_err(failed)?;
    }
    archive.into_inner().and_then(|mut file| file.rewind()).map_err(failed)?;
    Ok(Some(file))
}

/// Takes what the script leaves, and removes the node's folder.
pub(super) fn after(lab: &Lab, script: &Script, task: &Task) -> Result<(), Error> {
    let hands = &script.hands;
    if hands.are_empty() {
        return Ok(());
    }
    let channel = lab.channel(&script.node.name);
    let limit = lab.limit(LIMIT_S);
    for name in &hands.gives {
        task.detail(&format!("taking {name}"));
        let missing = |reason: String| Error::HandOver {
            step: script.name.clone(),
            what: name.clone(),
            reason,
            lost: false,
        };
        let bytes = channel
            .fetch(&format!("exec cat {FOLDER}/{name}"), MAX_BYTES, limit)?
            .ok_or_else(|| missing("the script has not left it in $LAB_STEP".into()))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(missing(format!("it is longer than {MAX_BYTES} bytes")));
        }
        json_file::write_bytes(&kept(lab, &hands.stack, name), &bytes)?;
    }
    channel.feed(&format!("rm -rf {FOLDER}"), std::io::empty(), limit)?;
    Ok(())
}

/// Names have been checked with the stack: nothing in them means something to a shell.
fn put(name: &str) -> String {
    format!("umask 077 && exec cat > {FOLDER}/{name}")
}
