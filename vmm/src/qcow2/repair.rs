//! Refcounts after a writer was killed. imago writes the pointer to a new table at once and its refcount with the next
//! flush; a process that is killed in between leaves a table in a cluster that counts as free, and the next writer
//! would put other data there. So whoever opens an image for writing first counts what is in use.

use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::Path};

use super::{
    Error,
    header::{Header, OFFSET, entries, read_up_to},
};

/// Gives every cluster in use that has a refcount of zero one of 1. Returns how many there were.
pub(super) fn repair(path: &Path, file: &File, header: &Header) -> Result<u64, Error> {
    let read_error = |source| Error::Io { path: path.to_owned(), action: "read it", source };
    let table = header.refcount_table(file).map_err(read_error)?;
    let table: Vec<u64> = entries(&table).map(|entry| entry & OFFSET).collect();
    let mut blocks: HashMap<u64, Block> = HashMap::new();
    let mut repaired = 0;
    header.each_cluster(path, file, |offset| {
        let cluster = offset / header.cluster_size();
        let counts_in_block = (header.cluster_size() * 8) >> header.refcount_order;
        let (index, within) = (cluster / counts_in_block, cluster % counts_in_block);
        let block = match blocks.entry(index) {
            std::collections::hash_map::Entry::Occupied(block) => block.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let offset = usize::try_from(index).ok().and_then(|index| table.get(index)).copied();
                let Some(offset) = offset.filter(|offset| *offset != 0) else {
                    return Err(Error::Damaged {
                        path: path.to_owned(),
                        what:
                            "its refcounts do not cover all of it; repair a copy with `qemu-img check -r all`"
                                .to_owned(),
                    });
                };
                let counts = read_up_to(file, offset, header.cluster_size()).map_err(read_error)?;
                place.insert(Block { offset, counts, changed: false })
            }
        };
        repaired += u64::from(block.count(within, header.refcount_order));
        Ok(())
    })?;
    for block in blocks.values().filter(|block| block.changed) {
        file.write_all_at(&block.counts, block.offset).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "repair it",
            source,
        })?;
    }
    Ok(repaired)
}

/// A block of refcounts.
struct Block {
    offset: u64,
    counts: Vec<u8>,
    changed: bool,
}

impl Block {
    /// Makes the count at `index` one if it is zero; whether it was.
    fn count(&mut self, index: u64, order: u32) -> bool {
        let bit = index << order;
        let Ok(first) = usize::try_from(bit / 8) else { return false };
        // Less than a byte: the lowest bits come first. More: the highest byte comes first.
        let (bytes, mask, one) = if order < 3 {
            let shift = bit % 8;
            (1, (((1u16 << (1 << order)) - 1) << shift) as u8, 1u8 << shift)
        } else {
            (1usize << (order - 3), 0xff, 1)
        };
        let Some(count) = self.counts.get_mut(first..first.saturating_add(bytes)) else { return false };
        if count.iter().any(|byte| byte & mask != 0) {
            return false;
        }
        if let Some(last) = count.last_mut() {
            *last |= one;
        }
        self.changed = true;
        true
    }
}
