//! Packed files: a snapshot with all that it needs, its lab's key and its labfile, for another machine or another LAB_HOME;
//! or a bundle with all that an `up` of a lab would fetch or build, for a machine without a network.
//!
//! - `table`: what is in such a file; `format`: its bytes
//! - `gather`, `sparse`: what belongs to a snapshot, and where it has data
//! - `export`: the file is written; `unpack`: it is read; `import`: what was read becomes a lab
//! - `bundle`: both ways for bundles
//!
//! Both directions go on where they were cut off, and nothing has its name before it is whole.

pub mod bundle;
mod export;
mod format;
mod gather;
mod import;
mod sparse;
mod table;
#[cfg(test)]
mod tests;
mod unpack;

use std::path::{Path, PathBuf};

pub use export::export;
pub use format::Reader;
pub use import::{Imported, import};

/// Why a snapshot can't be exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is there.
    #[error("{0} exists already: name another file, or remove it")]
    Exists(PathBuf),
    /// Somebody else writes there.
    #[error("another lab command is writing {0}: wait for its end, then try again")]
    Busy(PathBuf),
    /// No file of ours.
    #[error("{0} was written neither by `lab snapshot export` nor by `lab bundle build`")]
    Foreign(PathBuf),
    /// The one, not the other.
    #[error("{0} is a bundle, not a snapshot: `lab up --offline {0}` uses it")]
    IsBundle(PathBuf),
    /// The other, not the one.
    #[error("{0} is a snapshot, not a bundle: `lab snapshot import {0}` makes a lab of it")]
    IsSnapshot(PathBuf),
    /// A bundle of a lab's has to be complete.
    #[error("the layer of `{0}` is not there: it was removed just now, so run this again")]
    NoLayer(String),
    /// An image.
    #[error(transparent)]
    Image(#[from] lab_images::store::Error),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] crate::layer::Error),
    /// What the lab needs can't be found out.
    #[error("{0}")]
    Action(Box<crate::actions::Error>),
    /// A file of ours that was never finished.
    #[error("{0} was cut off while it was written: run that again, it goes on where it was")]
    Unfinished(PathBuf),
    /// A file that is too short.
    #[error("{path} is cut off after {} of {} MiB: copy it again", mib(*is), mib(*of))]
    Cut {
        /// The file.
        path: PathBuf,
        /// Its length.
        is: u64,
        /// What it should be.
        of: u64,
    },
    /// A file that has changed.
    #[error("{path} is damaged at byte {at} ({what}): copy it again, or make it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What was found.
        what: String,
    },
    /// A file that lab does not write.
    #[error("{path} is not used, since {what}: lab did not write it as it is")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is in it.
        what: String,
    },
    /// Made by another version.
    #[error("{path} has format {found}; this version of lab knows format {}", table::FORMAT)]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A snapshot that is not as lab makes them.
    #[error("{name} cannot be exported: {what}")]
    NotExported {
        /// The snapshot, or a file of it.
        name: String,
        /// Why.
        what: String,
    },
    /// A script that would not come along.
    #[error("{labfile} uses {file}, which does not lie in its folder: move it there, then export again")]
    Outside {
        /// The labfile.
        labfile: PathBuf,
        /// The script.
        file: PathBuf,
    },
    /// A file is another one than a moment ago.
    #[error("{0} has changed while it was exported: run it again")]
    Changed(PathBuf),
    /// zstd failed.
    #[error("the data cannot be packed: is there memory left?")]
    Packing,
    /// There is a lab of this name.
    #[error("there is a lab `{lab}` already: {remedy}, then import again")]
    LabExists {
        /// The lab.
        lab: String,
        /// What to do.
        remedy: String,
    },
    /// Files would be mixed.
    #[error("{0} is there, and no empty folder: name another folder for the labfile")]
    Folder(PathBuf),
    /// No room.
    #[error("there is no room for {} MiB in {path}: make room, then import again", mib(*bytes))]
    Room {
        /// Where.
        path: PathBuf,
        /// What is missing of it.
        bytes: u64,
    },
    /// A disk full, most often.
    #[error("cannot write {path}: {source}; run it again after that is put right, it goes on where it was")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The host refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// On what.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The labfile is wrong, or gone.
    #[error("{0}")]
    Labfile(#[from] crate::labfile::Diagnostics),
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] super::Error),
    /// A folder of lab's.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] crate::json_file::Error),
}

impl Error {
    fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.into(), source }
    }
}

/// Bytes in MiB, as they are told.
fn mib(bytes: u64) -> String {
    match bytes {
        0..10_485_760 => format!("{:.1}", bytes as f64 / f64::from(1 << 20)),
        _ => (bytes >> 20).to_string(),
    }
}
