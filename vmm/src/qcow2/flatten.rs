//! Making one overlay of many, so that chains do not grow without end.

use std::{io, path::Path};

use imago::{FormatAccess, ShallowMapping, file::File as ImageFile};

use super::{Error, chain, create_empty, create_overlay, info};

/// Copied at a time, in bytes.
const STEP: u64 = 1 << 20;

/// What an image has at a place.
enum Kind {
    /// Nothing: what is below it shows.
    Nothing,
    Zeroes,
    Data,
}

/// Makes `target`, which is not there yet: an image that is the same disk as `path`, with what `path` and the images below
/// it have, `count` in all, and the next one below as its backing file. Nobody may write to `path` meanwhile; that it is
/// locked does not matter.
pub fn flatten(path: &Path, count: usize, target: &Path) -> Result<(), Error> {
    let size = info(path)?.size_bytes;
    let mut below = Some((path.to_owned(), None));
    for _ in 0..count {
        below = match below {
            Some((path, _)) => info(&path)?.backing,
            None => None,
        };
    }
    match below {
        Some((base, Some(format))) => create_overlay(target, &base, format, size)?,
        Some((_, None)) => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "it does not say of which format an image below it is".into(),
            });
        }
        None => create_empty(target, size)?,
    }
    let from = chain::open_paused(path)?;
    let to = chain::open(target, true)?;
    let mut buffer = vec![0; STEP as usize];
    let read_error = |source| Error::Io { path: path.to_owned(), action: "read what is in it", source };
    let write_error = |source| Error::Io { path: target.to_owned(), action: "copy to it", source };
    let mut offset = 0;
    while offset < size {
        let (kind, length) = kind(&from.access, offset, size - offset, count).map_err(read_error)?;
        let end = offset.saturating_add(length);
        match kind {
            Kind::Nothing => {}
            Kind::Zeroes => to.access.write_zeroes(offset, length).map_err(write_error)?,
            Kind::Data => {
                for start in (offset..end).step_by(STEP as usize) {
                    let data = buffer.get_mut(..STEP.min(end - start) as usize).unwrap_or_default();
                    from.access.read(&mut *data, start).map_err(read_error)?;
                    to.access.write(&*data, start).map_err(write_error)?;
                }
            }
        }
        offset = end;
    }
    to.access.flush().map_err(write_error)?;
    to.file.sync_all().map_err(write_error)
}

/// What the topmost `count` images have from `offset` on, and for how many bytes.
fn kind(
    top: &FormatAccess<ImageFile>,
    mut offset: u64,
    mut length: u64,
    count: usize,
) -> io::Result<(Kind, u64)> {
    let mut access = top;
    for _ in 0..count {
        let (mapping, found) = access.get_shallow_mapping(offset, length)?;
        // Behind the end of one that is smaller than those above it: as far as those go.
        if matches!(mapping, ShallowMapping::Eof { .. }) {
            return Ok((Kind::Nothing, length));
        }
        length = found.min(length);
        match mapping {
            ShallowMapping::Indirect { layer, offset: there, .. } => {
                access = layer;
                offset = there;
            }
            ShallowMapping::Zero { explicit: true, .. } => return Ok((Kind::Zeroes, length)),
            ShallowMapping::Zero { .. } => return Ok((Kind::Nothing, length)),
            _ => return Ok((Kind::Data, length)),
        }
    }
    Ok((Kind::Nothing, length))
}

#[cfg(test)]
mod tests;
