//! The bytes of an exported snapshot.
//!
//! ```text
//! header   magic (16), length of all (8; 0: not finished), length of the table (4), SHA-256 of the table (32)
//! table    JSON: `Table`
//! chunk…   number of its file (4), place in it (8), length there (4), length here (4), checksum (32), zstd
//! end      as a chunk of file 0xffffffff, its place the number of chunks, its lengths 0
//! ```
//!
//! Numbers are little-endian. A chunk's checksum is the SHA-256 of the checksum before it (the first's: the table's), its own
//! four numbers and its packed bytes: chunks can be neither exchanged, left out nor taken from elsewhere. Chunks come in
//! the order of files and places; what no chunk covers is a hole.

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Error,
    table::{FORMAT, Table},
};

const MAGIC: [u8; 16] = *b"lab snapshot\r\n\x1a\n";
const HEADER: u64 = 16 + 8 + 4 + 32;
/// Where the length of all stands.
const LENGTH_AT: u64 = 16;
const CHUNK_HEADER: u64 = 4 + 8 + 4 + 4 + 32;
/// Number of the file that the end is said to be of.
const END: u32 = u32::MAX;
/// Longest chunk, unpacked.
pub const CHUNK: u32 = 1 << 20;
/// Longest chunk, packed: zstd makes what cannot be packed a little longer.
const PACKED_MAX: u32 = CHUNK + (CHUNK >> 7) + 512;
/// Longest table.
const TABLE_MAX: u32 = 16 << 20;

/// A checksum.
pub type Sum = [u8; 32];

/// A chunk as it is in the file.
#[derive(Debug)]
pub struct Chunk {
    /// Number of its file in the table.
    pub file: u32,
    /// Its place in that file.
    pub offset: u64,
    /// Its length there.
    pub length: u32,
    /// Its packed bytes.
    pub packed: Vec<u8>,
}

/// How far chunks have been read or written: enough to go on there.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Mark {
    /// Bytes of the file up to there.
    pub position: u64,
    /// Chunks up to there.
    pub chunks: u64,
    /// The last one's checksum.
    pub sum: Sum,
    /// The last one's file, and the end of its place there.
    pub last: (u32, u64),
}

impl Mark {
    /// Behind a chunk, whose numbers and checksum are `numbers` and `sum`.
    fn after(&self, file: u32, end: u64, packed: u64, sum: Sum) -> Self {
        let position = self.position + CHUNK_HEADER + packed;
        Self { position, chunks: self.chunks + 1, sum, last: (file, end) }
    }
}

fn numbers(file: u32, offset: u64, length: u32, packed: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    let all = [&file.to_le_bytes()[..], &offset.to_le_bytes(), &length.to_le_bytes(), &packed.to_le_bytes()];
    bytes.iter_mut().zip(all.concat()).for_each(|(to, from)| *to = from);
    bytes
}

fn sum(before: &Sum, numbers: &[u8; 20], packed: &[u8]) -> Sum {
    Sha256::new().chain_update(before).chain_update(numbers).chain_update(packed).finalize().into()
}

/// Takes the first bytes off.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (first, rest) = bytes.split_first_chunk().unwrap_or((&[0; N], &[]));
    *bytes = rest;
    *first
}

/// Writes an exported snapshot.
pub struct Writer {
    file: File,
    mark: Mark,
}

impl Writer {
    /// Begins a file anew.
    pub fn begin(mut file: File, table: &[u8]) -> std::io::Result<Self> {
        let length = u32::try_from(table.len()).ok().filter(|length| *length <= TABLE_MAX);
        let length = length.ok_or_else(|| std::io::Error::other("it would have too many files"))?;
        let sum: Sum = Sha256::digest(table).into();
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&[&MAGIC[..], &[0; 8], &length.to_le_bytes(), &sum, table].concat())?;
        Ok(Self { file, mark: Mark { position: HEADER + u64::from(length), sum, ..Mark::default() } })
    }

    /// Goes on behind the mark; what comes after it is dropped.
    pub fn go_on(mut file: File, mark: Mark) -> std::io::Result<Self> {
        file.set_len(mark.position)?;
        file.seek(SeekFrom::Start(mark.position))?;
        Ok(Self { file, mark })
    }

    /// How far it is.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Adds a chunk.
    pub fn write(&mut self, chunk: &Chunk) -> std::io::Result<()> {
        let packed = u32::try_from(chunk.packed.len()).unwrap_or(u32::MAX);
        let numbers = numbers(chunk.file, chunk.offset, chunk.length, packed);
        let sum = sum(&self.mark.sum, &numbers, &chunk.packed);
        self.file.write_all(&[&numbers[..], &sum, &chunk.packed].concat())?;
        let end = chunk.offset.saturating_add(chunk.length.into());
        self.mark = self.mark.after(chunk.file, end, packed.into(), sum);
        Ok(())
    }

    /// Writes the end, and puts all of it on the disk.
    pub fn finish(mut self) -> std::io::Result<()> {
        let numbers = numbers(END, self.mark.chunks, 0, 0);
        let sum = sum(&self.mark.sum, &numbers, &[]);
        self.file.write_all(&[&numbers[..], &sum].concat())?;
        self.file.sync_all()?;
        // Only now it can be taken for a whole one.
        let length = self.mark.position + CHUNK_HEADER;
        self.file.write_all_at(&length.to_le_bytes(), LENGTH_AT)?;
        self.file.sync_all()
    }
}

/// Reads an exported snapshot; all that it gives has been checked against checksums and the table.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    /// Length of the file.
    length: u64,
    /// Length of the file when it was written; 0: it was not finished.
    whole: u64,
    table: Table,
    table_sum: Sum,
    mark: Mark,
}

impl Reader {
    /// Opens a file that must be whole.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::read(path, source))?;
        let reader = Self::unfinished(path, file)?;
        match reader.whole {
            0 => Err(Error::Unfinished(path.into())),
            whole if reader.length < whole => {
                Err(Error::Cut { path: path.into(), is: reader.length, of: whole })
            }
            whole if reader.length > whole => Err(reader.damaged("it goes on behind its end")),
            _ => Ok(reader),
        }
    }

    /// Opens a file that may end anywhere behind its table.
    pub fn unfinished(path: &Path, file: File) -> Result<Self, Error> {
        let read = |source| Error::read(path, source);
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(Error::Foreign(path.into()));
        }
        let mut reader = BufReader::with_capacity(1 << 20, file);
        reader.rewind().map_err(read)?;
        let mut header = [0; HEADER as usize];
        let short = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::Foreign(path.into()),
            _ => Error::read(path, source),
        };
        reader.read_exact(&mut header).map_err(short)?;
        let mut rest = header.as_slice();
        if take::<16>(&mut rest) != MAGIC {
            return Err(Error::Foreign(path.into()));
        }
        let whole = u64::from_le_bytes(take(&mut rest));
        let table_length = u32::from_le_bytes(take(&mut rest));
        let table_sum: Sum = take(&mut rest);
        let damaged = |at, what: &str| Error::Damaged { path: path.into(), at, what: what.into() };
        if table_length > TABLE_MAX {
            return Err(damaged(LENGTH_AT + 8, "its table of contents is too long"));
        }
        let position = HEADER + u64::from(table_length);
        if metadata.len() < position {
            let of = whole.max(position);
            return Err(Error::Cut { path: path.into(), is: metadata.len(), of });
        }
        let mut text = vec![0; table_length as usize];
        reader.read_exact(&mut text).map_err(read)?;
        if Sum::from(Sha256::digest(&text)) != table_sum {
            return Err(damaged(HEADER, "the checksum of its table of contents is wrong"));
        }
        let table = parse(path, &text)?;
        table.check().map_err(|what| Error::Refused { path: path.into(), what })?;
        let mark = Mark { position, sum: table_sum, ..Mark::default() };
        Ok(Self { path: path.into(), file: reader, length: metadata.len(), whole, table, table_sum, mark })
    }

    /// What is in it.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The table's checksum.
    pub fn table_sum(&self) -> Sum {
        self.table_sum
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far it is.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// Goes on behind a mark that it once gave.
    pub fn go_on(&mut self, mark: Mark) -> Result<(), Error> {
        self.file.seek(SeekFrom::Start(mark.position)).map_err(|source| Error::read(&self.path, source))?;
        self.mark = mark;
        Ok(())
    }

    /// The next chunk; `None` at the end.
    pub fn chunk(&mut self) -> Result<Option<Chunk>, Error> {
        let mut header = [0; CHUNK_HEADER as usize];
        self.read(&mut header)?;
        let mut rest = header.as_slice();
        let file = u32::from_le_bytes(take(&mut rest));
        let offset = u64::from_le_bytes(take(&mut rest));
        let length = u32::from_le_bytes(take(&mut rest));
        let packed_length = u32::from_le_bytes(take(&mut rest));
        let found: Sum = take(&mut rest);
        if packed_length > PACKED_MAX {
            return Err(self.damaged("a chunk is too long"));
        }
        let mut packed = vec![0; packed_length as usize];
        self.read(&mut packed)?;
        let numbers = numbers(file, offset, length, packed_length);
        if sum(&self.mark.sum, &numbers, &packed) != found {
            return Err(self.damaged("a checksum is wrong"));
        }
        if file == END {
            let good = offset == self.mark.chunks && length == 0 && packed_length == 0;
            return if good { Ok(None) } else { Err(self.damaged("its end is wrong")) };
        }
        let end = offset.checked_add(length.into());
        let within = self.table.files.get(file as usize).is_some_and(|entry| end <= Some(entry.length));
        let (Some(end), true, 1..=CHUNK) = (end, within, length) else {
            return Err(self.damaged("a chunk lies outside of its file"));
        };
        if (file, offset) < self.mark.last {
            return Err(self.damaged("chunks are out of order"));
        }
        self.mark = self.mark.after(file, end, packed_length.into(), found);
        Ok(Some(Chunk { file, offset, length, packed }))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.file.read_exact(bytes).map_err(|source| match source.kind() {
            std::io::ErrorKind::UnexpectedEof => self.damaged("a chunk goes on behind the end"),
            _ => Error::read(&self.path, source),
        })
    }

    /// The file is damaged behind what has been read.
    pub fn damaged(&self, what: &str) -> Error {
        Error::Damaged { path: self.path.clone(), at: self.mark.position, what: what.into() }
    }
}

fn parse(path: &Path, text: &[u8]) -> Result<Table, Error> {
    // The version alone first: what else is in the table depends on it.
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let wrong = |error: serde_json::Error| Error::Refused {
        path: path.into(),
        what: format!("its table of contents cannot be read ({error})"),
    };
    match serde_json::from_slice::<Version>(text).map_err(wrong)?.format {
        FORMAT => serde_json::from_slice(text).map_err(wrong),
        found => Err(Error::Format { path: path.into(), found }),
    }
}
