//! What an exported snapshot consists of, as it lies on the disk.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    super::{folder, layers, read},
    Error,
    format::CHUNK,
    sparse,
    table::{Entry, FOLDER, FORMAT, LABFILE, Table},
};
use crate::{files::hex, lab::Lab, labfile, lockfile};

/// Files up to this length are told apart by their digests.
const SMALL: u64 = 1 << 20;

/// Files to be exported.
pub struct Gathered {
    /// The table of contents.
    pub table: Table,
    /// Where each of its files is.
    pub sources: Vec<PathBuf>,
    /// What of them is data, in order.
    pub pieces: Vec<Piece>,
}

/// A piece of a file, which becomes a chunk.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Number of the file.
    pub file: u32,
    /// Place in it.
    pub offset: u64,
    /// Length.
    pub length: u32,
}

/// Finds all that snapshot `name` needs.
pub fn gather(lab: &Lab, name: &str) -> Result<Gathered, Error> {
    let record = read(lab, name)?;
    let dir = &lab.dirs.dir;
    let mut found: Vec<(String, PathBuf)> = beside_labfile(&lab.topology.labfile)?;
    for key in [lab.dirs.identity(), lab.dirs.identity().with_extension("pub")] {
        found.push((below(dir, &key)?, key));
    }
    for file in files_of(&lab.dirs.secrets())? {
        found.push((below(dir, &file)?, file));
    }
    let mut images: Vec<_> = record.nodes.values().map(|node| lab.pinned(&node.record.image)).collect();
    images.sort();
    images.dedup();
    for image in images {
        for file in files_of(&image)? {
            found.push((below(dir, &file)?, file));
        }
    }
    // Layers are known by their real paths.
    let real = dir.canonicalize().map_err(|source| Error::read(dir, source))?;
    for layer in layers::below(&lab.dirs, record.nodes.values().flat_map(|node| &node.layers))? {
        found.push((below(&real, &layer)?, layer));
    }
    let snapshot = folder(&lab.dirs, name);
    for node in record.nodes.keys() {
        for file in files_of(&snapshot.join(node))? {
            found.push((below(dir, &file)?, file));
        }
    }
    let file = snapshot.join("snapshot.json");
    found.push((below(dir, &file)?, file));
    let table = Table {
        format: FORMAT,
        lab_version: record.lab_version,
        lab: lab.topology.name.clone(),
        snapshot: Some(name.into()),
        created_s: record.created_s,
        data_bytes: 0,
        files: Vec::new(),
    };
    Gathered::of(table, found)
}

impl Gathered {
    /// What a table will list: files as they are called in it, and where they are.
    pub fn of(table: Table, files: Vec<(String, PathBuf)>) -> Result<Self, Error> {
        let mut all = Self { table, sources: Vec::new(), pieces: Vec::new() };
        for (path, source) in files {
            all.add(path, source)?;
        }
        match all.table.check() {
            Ok(()) => Ok(all),
            Err(what) => Err(Error::NotExported { name: all.table.lab.clone(), what }),
        }
    }

    pub(super) fn add(&mut self, path: String, source: PathBuf) -> Result<(), Error> {
        let io = |error| Error::read(&source, error);
        let file = File::open(&source).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        let length = metadata.len();
        let number = u32::try_from(self.sources.len()).unwrap_or(u32::MAX);
        let mut next = 0;
        for data in sparse::data(&file, length).map_err(io)? {
            self.table.data_bytes += data.end - data.start;
            let mut offset = next.max(data.start / u64::from(CHUNK) * u64::from(CHUNK));
            while offset < data.end {
                let length = u64::from(CHUNK).min(length - offset) as u32;
                self.pieces.push(Piece { file: number, offset, length });
                offset += u64::from(length);
            }
            next = next.max(offset);
        }
        let sha256 = match length {
            0..=SMALL => Some(hex(&Sha256::digest(fs::read(&source).map_err(io)?))),
            _ => None,
        };
        let mode = metadata.permissions().mode() & 0o777;
        self.table.files.push(Entry { path, length, mode, sha256 });
        self.sources.push(source);
        Ok(())
    }
}

/// The labfile and all that it needs beside it, as they are called there.
fn beside_labfile(labfile: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let folder = labfile.parent().unwrap_or(Path::new("/"));
    let mut found = vec![(format!("{FOLDER}/{LABFILE}"), labfile.to_path_buf())];
    let lock = lockfile::path(labfile);
    if lock.is_file() {
        found.push((format!("{FOLDER}/{}", lockfile::path(Path::new(LABFILE)).display()), lock));
    }
    for file in labfile::companions(labfile)? {
        let parts: Option<Vec<&str>> = file
            .components()
            .filter(|part| *part != Component::CurDir)
            .map(|part| match part {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        let Some(parts) = parts else {
            return Err(Error::Outside { labfile: labfile.into(), file });
        };
        let path = format!("{FOLDER}/{}", parts.join("/"));
        if !found.iter().any(|(known, _)| *known == path) {
            found.push((path, folder.join(file)));
        }
    }
    Ok(found)
}

/// The regular files in a folder, by name.
pub fn files_of(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let io = |source| Error::read(folder, source);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// The path of a file as seen from a folder above it.
fn below(folder: &Path, file: &Path) -> Result<String, Error> {
    let path = file.strip_prefix(folder).ok().and_then(Path::to_str);
    path.map(str::to_owned).ok_or_else(|| Error::NotExported {
        name: file.display().to_string(),
        what: format!("it does not lie below {}", folder.display()),
    })
}
