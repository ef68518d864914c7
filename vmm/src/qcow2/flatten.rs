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
    let copied = (|| {
        let mut offset = 0;
        while offset < size {
            let (kind, length) = kind(&from.access, offset, STEP.min(size - offset), count)?;
            match kind {
                Kind::Nothing => {}
                Kind::Zeroes => to.access.write_zeroes(offset, length)?,
                Kind::Data => {
                    let data = buffer.get_mut(..length as usize).unwrap_or_default();
                    from.access.read(&mut *data, offset)?;
                    to.access.write(&*data, offset)?;
                }
            }
            offset += length;
        }
        to.access.flush()?;
        to.file.sync_all()
    })();
    copied.map_err(|source| Error::Io { path: target.to_owned(), action: "copy to it", source })
}

/// What the topmost `count` images have from `offset` on, and for how many bytes.
fn kind(
    top: &FormatAccess<ImageFile>,
    mut offset: u64,
    mut length: u64,
    count: usize,
) -> io::Result<(Kind, u64)> {
    let wanted = length;
    let mut access = top;
    for _ in 0..count {
        let (mapping, found) = access.get_shallow_mapping(offset, length)?;
        length = found.min(length);
        match mapping {
            ShallowMapping::Indirect { layer, offset: there, .. } => {
                access = layer;
                offset = there;
            }
            ShallowMapping::Zero { explicit: true, .. } => return Ok((Kind::Zeroes, length)),
            // Behind the end of one that is smaller than those above it.
            ShallowMapping::Eof { .. } => return Ok((Kind::Nothing, wanted)),
            ShallowMapping::Zero { .. } => return Ok((Kind::Nothing, length)),
            _ => return Ok((Kind::Data, length)),
        }
    }
    Ok((Kind::Nothing, length))
}
