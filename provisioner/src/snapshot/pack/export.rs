//! `lab snapshot export`: a snapshot with all that it needs becomes one file.
//!
//! It is written to `FILE.part`. What of such a file is whole, and of the same snapshot, is kept by the next try.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::{
    Error,
    format::{Chunk, Reader, Writer},
    gather::{Gathered, Piece, gather},
    mib,
};
use crate::{lab::Lab, lock, progress::Task};

/// zstd's own default.
const LEVEL: i32 = 3;
/// Pieces that are packed at the same time, by all processors.
const BATCH: usize = 32;

/// Writes snapshot `name` to a file that is not there yet.
pub fn export(lab: &Lab, name: &str, file: &Path, task: &Task) -> Result<(), Error> {
    if file.symlink_metadata().is_ok() {
        return Err(Error::Exists(file.into()));
    }
    task.detail("look for its files");
    write(&gather(lab, name)?, file, task)
}

/// Writes what was gathered.
pub(super) fn write(gathered: &Gathered, file: &Path, task: &Task) -> Result<(), Error> {
    let partial = partial(file);
    let io = |source| Error::Write { path: partial.clone(), source };
    let output = lock::try_lock(&partial).map_err(io)?.ok_or_else(|| Error::Busy(partial.clone()))?;
    // The lab's private key is in it.
    output.set_permissions(fs::Permissions::from_mode(0o600)).map_err(io)?;
    let table = serde_json::to_vec(&gathered.table).map_err(|error| io(error.into()))?;
    task.detail("check what is there of it");
    let mut writer = match kept(&partial, &output, gathered)? {
        Some(mark) => Writer::go_on(output.try_clone().map_err(io)?, mark),
        None => Writer::begin(output.try_clone().map_err(io)?, &table),
    }
    .map_err(io)?;
    let last = writer.mark().last;
    let done = gathered.pieces.partition_point(|piece| (piece.file, piece.offset) < last);
    let total: u64 = gathered.pieces.iter().map(|piece| u64::from(piece.length)).sum();
    let mut bytes: u64 = gathered.pieces.iter().take(done).map(|piece| u64::from(piece.length)).sum();
    for batch in gathered.pieces.get(done..).unwrap_or_default().chunks(BATCH) {
        for chunk in pack_all(gathered, batch) {
            if let Some(chunk) = chunk? {
                writer.write(&chunk).map_err(io)?;
            }
        }
        bytes += batch.iter().map(|piece| u64::from(piece.length)).sum::<u64>();
        task.detail(&format!("{} of {} MiB", mib(bytes), mib(total)));
    }
    task.detail("sync");
    writer.finish().map_err(io)?;
    if file.symlink_metadata().is_ok() {
        return Err(Error::Exists(file.into()));
    }
    fs::rename(&partial, file).map_err(io)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
}

/// The file while it is written.
fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

/// How much is whole of what an earlier export of the same files left.
fn kept(path: &Path, file: &File, gathered: &Gathered) -> Result<Option<super::format::Mark>, Error> {
    let file = file.try_clone().map_err(|source| Error::read(path, source))?;
    let mut reader = match Reader::unfinished(path, file) {
        Ok(reader) if *reader.table() == gathered.table => reader,
        Err(error @ Error::Io { .. }) => return Err(error),
        _ => return Ok(None),
    };
    loop {
        match reader.chunk() {
            Ok(Some(_)) => {}
            Err(error @ Error::Io { .. }) => return Err(error),
            // The end, or that of what is whole.
            Ok(None) | Err(_) => return Ok(Some(reader.mark())),
        }
    }
}

/// Packs pieces, by all processors, in their order; `None` is one of zeros alone.
fn pack_all(gathered: &Gathered, batch: &[Piece]) -> Vec<Result<Option<Chunk>, Error>> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let share = batch.len().div_ceil(workers).max(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = batch
            .chunks(share)
            .map(|pieces| scope.spawn(move || pieces.iter().map(|piece| pack(gathered, *piece)).collect()))
            .collect();
        let packed = threads.into_iter().map(|thread| {
            let failed = |_| vec![Err(Error::Packing)];
            thread.join().unwrap_or_else(failed)
        });
        packed.flat_map(|chunks: Vec<_>| chunks).collect()
    })
}

fn pack(gathered: &Gathered, piece: Piece) -> Result<Option<Chunk>, Error> {
    let Some(path) = gathered.sources.get(piece.file as usize) else { return Ok(None) };
    let mut bytes = vec![0; piece.length as usize];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut bytes, piece.offset));
    read.map_err(|source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Changed(path.clone()),
        _ => Error::read(path, source),
    })?;
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let packed = zstd::bulk::compress(&bytes, LEVEL).map_err(|_| Error::Packing)?;
    Ok(Some(Chunk { file: piece.file, offset: piece.offset, length: piece.length, packed }))
}
