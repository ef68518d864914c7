//! Guest memory as a snapshot has it: a sparse file, one range of RAM behind the other, with a checksum for each piece of
//! 2 MiB. Where there are more than a few pages of zeroes, the file has a hole.

use std::{
    fs::File,
    hash::Hasher,
    io,
    num::NonZero,
    os::{fd::AsRawFd, unix::fs::FileExt},
    slice,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::{layout::MIB, memory};

/// Unit in bytes of what is checked, and mapped from a file or not.
const PIECE: usize = 2 << 20;
const PAGE: usize = 4096;
/// Bytes of zeroes that are written all the same, where two writes would take longer than one.
const GAP_MAX: usize = 4 * PAGE;
/// Threads that read or write memory side by side: more are not faster than the disk.
const WORKERS_MAX: usize = 4;
/// Bytes of an entry of `/proc/self/pagemap`.
const PAGEMAP_ENTRY: usize = 8;
/// Bits of an entry: the page is in memory, or in swap (Linux, admin-guide/mm/pagemap.rst).
const PAGEMAP_THERE: u64 = 1 << 63 | 1 << 62;

/// Index of each piece that is not all zeroes, and XXH64 of its pages that are not, each behind its number.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums(Vec<(u32, u64)>);

impl Sums {
    /// Pieces that are not all zeroes.
    pub fn pieces(&self) -> usize {
        self.0.len()
    }
}

/// Why memory cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The host refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// There is no room.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The file is of another size.
    #[error("it is {found} bytes long, not {expected}")]
    Length {
        /// What it is.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// The file is damaged.
    #[error("its checksum is wrong between {from} and {to} MiB: it is damaged")]
    Damaged {
        /// Beginning of the piece in MiB.
        from: usize,
        /// Its end.
        to: usize,
    },
}

/// The memory of a machine.
pub struct GuestRam {
    /// As devices and KVM use it.
    pub memory: GuestMemoryMmap,
    /// The pieces that are mapped from a snapshot: what the guest has not touched of them is there, not here.
    mapped: Vec<bool>,
}

/// A piece: its address in this process, and its length in bytes.
type Piece = (*mut u8, usize);

impl GuestRam {
    /// Memory that nobody has touched.
    pub fn new(mib: u64) -> Result<Self, memory::Error> {
        Self::untouched(mib, true)
    }

    fn untouched(mib: u64, huge: bool) -> Result<Self, memory::Error> {
        let memory = memory::map(mib, huge)?;
        let mapped = vec![false; pieces(&memory).count()];
        Ok(Self { memory, mapped })
    }

    /// Write what has been touched to `file`, which is empty. Nobody else uses the memory meanwhile: the machine is
    /// paused.
    pub fn save(&self, file: &File) -> io::Result<Sums> {
        let pagemap = File::open("/proc/self/pagemap")?;
        file.set_len(length(&self.memory))?;
        let mapped = |index| self.mapped.get(index) == Some(&true);
        let sums = self.each_piece(|index, piece| save_piece(file, &pagemap, index, piece, mapped(index)))?;
        let sums = sums.into_iter().enumerate();
        Ok(Sums(sums.filter_map(|(index, sum)| Some((index as u32, sum?))).collect()))
    }

    /// Take what [`save`](Self::save) wrote; all of it is read once, to be checked. It is mapped privately, and shared
    /// with all others who do so until it is written to; or, with `prefetch`, it is read into memory of the machine's own,
    /// where the guest finds it in large pages, without a fault for each small one.
    pub fn load(file: &File, mib: u64, sums: &Sums, prefetch: bool) -> Result<Self, LoadError> {
        // Copies are to take little: what they touch beside the file comes in small pages.
        let mut ram = Self::untouched(mib, prefetch)?;
        let (found, expected) = (file.metadata()?.len(), length(&ram.memory));
        if found != expected {
            return Err(LoadError::Length { found, expected });
        }
        let loaded = ram.each_piece(|index, piece| {
            let Ok(known) = sums.0.binary_search_by_key(&(index as u32), |(piece, _)| *piece) else {
                return Ok(false);
            };
            let sum = load_piece(file, index, piece, prefetch)?;
            if sum != sums.0.get(known).map(|(_, sum)| *sum) {
                let from = index * PIECE / MIB as usize;
                return Err(LoadError::Damaged { from, to: from + piece.1 / MIB as usize });
            }
            Ok(true)
        })?;
        if !prefetch {
            ram.mapped = loaded;
        }
        Ok(ram)
    }

    /// Does something with every piece, several at once; gives the results in the order of the pieces. Of failures, that
    /// of the first piece counts.
    fn each_piece<T: Send, E: Send>(
        &self,
        work: impl Fn(usize, Piece) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let next = AtomicUsize::new(0);
        let worker = || {
            let (mut done, mut passed) = (Vec::new(), 0);
            let mut all = pieces(&self.memory).enumerate();
            while let Some((index, piece)) = all.nth(next.fetch_add(1, Ordering::Relaxed) - passed) {
                passed = index + 1;
                done.push((index, work(index, piece)));
            }
            done
        };
        let others = thread::available_parallelism().map_or(1, NonZero::get).min(WORKERS_MAX) - 1;
        let mut done = thread::scope(|scope| {
            // Without a thread for it, this one does it all.
            let spawn = |number| {
                thread::Builder::new().name(format!("memory{number}")).spawn_scoped(scope, worker).ok()
            };
            let others: Vec<_> = (0..others).filter_map(spawn).collect();
            let mut done = worker();
            for other in others {
                match other.join() {
                    Ok(more) => done.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            done
        });
        done.sort_unstable_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, result)| result).collect()
    }
}

/// Writes what has been touched of a piece that nobody changes now, and is not zero; its checksum, if there is any.
fn save_piece(
    file: &File,
    pagemap: &File,
    index: usize,
    piece: Piece,
    mapped: bool,
) -> io::Result<Option<u64>> {
    let there = if mapped { vec![true; piece.1 / PAGE] } else { touched(pagemap, piece)? };
    if !there.contains(&true) {
        return Ok(None);
    }
    // SAFETY: the piece is mapped as long as its memory is, which the caller has; no CPU and no device changes it now, as
    // the contract of this function says.
    let data = unsafe { slice::from_raw_parts(piece.0, piece.1) };
    let mut sum = Sum::default();
    let mut run = 0..0;
    for (number, (page, there)) in data.chunks(PAGE).zip(there).enumerate() {
        if !there || !sum.add(number, page) {
            continue;
        }
        let at = number * PAGE;
        if run.is_empty() || run.end + GAP_MAX < at {
            write(file, index, data, run)?;
            run = at..at;
        }
        run.end = at + PAGE;
    }
    write(file, index, data, run)?;
    Ok(sum.finish())
}

/// Reads or maps a piece that nobody uses yet; the checksum of what is there now.
fn load_piece(file: &File, index: usize, piece: Piece, prefetch: bool) -> io::Result<Option<u64>> {
    let mut buffer = Vec::new();
    let data = if prefetch {
        // SAFETY: the piece is mapped as long as its memory is, which the caller has, and nobody else uses it yet.
        unsafe { slice::from_raw_parts_mut(piece.0, piece.1) }
    } else {
        map(piece, file, index)?;
        // Read, not touched: a page fault for each page would take longer.
        buffer.resize(piece.1, 0);
        &mut buffer
    };
    file.read_exact_at(data, (index * PIECE) as u64)?;
    let mut sum = Sum::default();
    data.chunks(PAGE).enumerate().for_each(|(number, page)| {
        sum.add(number, page);
    });
    Ok(sum.finish())
}

/// Map piece `index` of a file in the place of the piece.
fn map(piece: Piece, file: &File, index: usize) -> io::Result<()> {
    // SAFETY: replaces pages of a mapping of guest memory, which nobody uses yet, by others of the same size and access;
    // whoever unmaps the others unmaps them, too.
    let mapped = unsafe {
        libc::mmap(
            piece.0.cast(),
            piece.1,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            (index * PIECE) as libc::off_t,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    memory::keep_out_of_core_dumps(piece.0, piece.1);
    Ok(())
}

/// Bytes of RAM.
fn length(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// All pieces, in the order of the file. A range of RAM that another follows is a multiple of a piece.
fn pieces(memory: &GuestMemoryMmap) -> impl Iterator<Item = Piece> + '_ {
    memory.iter().flat_map(|region| {
        let size = region.len() as usize;
        (0..size).step_by(PIECE).map(move |at| (region.as_ptr().wrapping_add(at), PIECE.min(size - at)))
    })
}

/// Which pages of a piece were ever touched.
fn touched(pagemap: &File, piece: Piece) -> io::Result<Vec<bool>> {
    let mut entries = vec![0; piece.1 / PAGE * PAGEMAP_ENTRY];
    pagemap.read_exact_at(&mut entries, (piece.0 as usize / PAGE * PAGEMAP_ENTRY) as u64)?;
    let bits = |entry: &[u8]| entry.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    Ok(entries.chunks(PAGEMAP_ENTRY).map(|entry| bits(entry) & PAGEMAP_THERE != 0).collect())
}

/// Write a run of pages of piece `index`, whose content is `data`.
fn write(file: &File, index: usize, data: &[u8], run: std::ops::Range<usize>) -> io::Result<()> {
    let at = (index * PIECE + run.start) as u64;
    file.write_all_at(data.get(run).unwrap_or_default(), at)
}

/// The checksum of a piece in the making.
#[derive(Default)]
struct Sum {
    hash: XxHash64,
    any: bool,
}

impl Sum {
    /// Take in page `number`; false if it is all zeroes, and does not count.
    fn add(&mut self, number: usize, page: &[u8]) -> bool {
        // Compares with itself, shifted: as fast as memory is.
        let zero = page.first() == Some(&0) && page.get(1..) == page.get(..page.len() - 1);
        if !zero {
            self.hash.write(&(number as u32).to_le_bytes());
            self.hash.write(page);
            self.any = true;
        }
        !zero
    }

    fn finish(self) -> Option<u64> {
        self.any.then(|| self.hash.finish())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    fn byte(ram: &GuestRam, at: u64) -> u8 {
        ram.memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn memory_comes_back_and_untouched_pages_take_no_room() {
        // The last piece is half a one.
        let ram = GuestRam::new(65).unwrap();
        for (at, value) in [(5u64, 1u8), (4096 * 3, 2), (4096 * 4, 3), (65 * MIB - 1, 4)] {
            ram.memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        // Touched, and zero: as good as untouched.
        ram.memory.write_obj(0u8, GuestAddress(20 * MIB)).unwrap();
        let first = file();
        let sums = ram.save(&first).unwrap();
        assert_eq!(sums.0.iter().map(|(piece, _)| *piece).collect::<Vec<_>>(), [0, 32]);
        let metadata = first.metadata().unwrap();
        assert_eq!(metadata.len(), 65 * MIB);
        assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 <= 8 * PAGE as u64);

        let own = GuestRam::load(&first, 65, &sums, true).unwrap();
        let restored = GuestRam::load(&first, 65, &sums, false).unwrap();
        for (at, value) in [(5, 1), (6, 0), (4096 * 3, 2), (4096 * 4, 3), (20 * MIB, 0), (65 * MIB - 1, 4)] {
            assert_eq!((byte(&restored, at), byte(&own, at)), (value, value), "at {at:#x}");
        }
        // What the restored machine changes is its own, and is in its own snapshots, with what it has not touched.
        restored.memory.write_obj(7u8, GuestAddress(5)).unwrap();
        restored.memory.write_obj(8u8, GuestAddress(20 * MIB)).unwrap();
        restored.memory.write_obj(0u8, GuestAddress(4096 * 4)).unwrap();
        assert_eq!(byte(&GuestRam::load(&first, 65, &sums, false).unwrap(), 5), 1);
        let second = file();
        let sums = restored.save(&second).unwrap();
        let again = GuestRam::load(&second, 65, &sums, false).unwrap();
        for (at, value) in [(5, 7), (4096 * 3, 2), (4096 * 4, 0), (20 * MIB, 8), (65 * MIB - 1, 4)] {
            assert_eq!(byte(&again, at), value, "at {at:#x}");
        }
    }

    #[test]
    fn memory_of_its_own_is_saved_as_it_is() {
        let ram = GuestRam::new(64).unwrap();
        ram.memory.write_obj(3u8, GuestAddress(9 * MIB)).unwrap();
        let (first, second) = (file(), file());
        let sums = ram.save(&first).unwrap();
        let own = GuestRam::load(&first, 64, &sums, true).unwrap();
        own.memory.write_obj(4u8, GuestAddress(40 * MIB)).unwrap();
        let sums = own.save(&second).unwrap();
        let again = GuestRam::load(&second, 64, &sums, true).unwrap();
        assert_eq!([9, 40, 41].map(|mib| byte(&again, mib * MIB)), [3, 4, 0]);
        // Whole pages of zeroes, which were read, too, take no room.
        assert!(std::os::unix::fs::MetadataExt::blocks(&second.metadata().unwrap()) * 512 <= 4 * PAGE as u64);
    }

    #[test]
    fn damage_is_seen() {
        let ram = GuestRam::new(64).unwrap();
        ram.memory.write_slice(&[9; 3 * PAGE], GuestAddress(6 * MIB)).unwrap();
        let saved = file();
        let sums = ram.save(&saved).unwrap();
        saved.write_all_at(&[8], 6 * MIB + 5000).unwrap();
        for prefetch in [false, true] {
            let told = GuestRam::load(&saved, 64, &sums, prefetch).err().unwrap().to_string();
            assert_eq!(told, "its checksum is wrong between 6 and 8 MiB: it is damaged");
        }
        // A page that has become zero, or has moved.
        saved.write_all_at(&[9], 6 * MIB + 5000).unwrap();
        assert!(GuestRam::load(&saved, 64, &sums, false).is_ok());
        saved.write_all_at(&[0; PAGE], 6 * MIB).unwrap();
        saved.write_all_at(&[9; PAGE], 6 * MIB + 3 * PAGE as u64).unwrap();
        assert!(GuestRam::load(&saved, 64, &sums, false).is_err());
        saved.set_len(63 * MIB).unwrap();
        assert!(matches!(GuestRam::load(&saved, 64, &sums, false), Err(LoadError::Length { .. })));
    }
}
