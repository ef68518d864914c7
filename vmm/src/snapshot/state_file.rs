//! The file `state` of a snapshot.
//!
//! ```text
//!  0  "lab-vmm snapshot"
//! 16  version of the format, 32 bits, little-endian as all that follows
//! 20  CRC-32 of the body
//! 24  length of the body in bytes, 64 bits
//! 32  the body: JSON of `State`
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use super::{Error, State, io_error, unusable};

const MAGIC: &[u8; 16] = b"lab-vmm snapshot";
/// Version of the format: another one for every change of `State`.
const VERSION: u32 = 4;
/// The oldest that can be read: version 4 added the state of nested machines, which older snapshots have none of.
const OLDEST: u32 = 3;
const HEADER: usize = 32;
/// Longest body in bytes: 32 CPUs take 2 MiB, the checksums of 64 GiB another half.
const BODY_MAX: u64 = 64 << 20;

/// Write `state` to a new file.
pub fn write(path: &Path, state: &State) -> Result<(), Error> {
    let body = serde_json::to_vec(state).map_err(|error| io_error("write", path)(error.into()))?;
    let mut header = Vec::with_capacity(HEADER);
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend(crc32fast::hash(&body).to_le_bytes());
    header.extend((body.len() as u64).to_le_bytes());
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("create", path))?;
    file.write_all(&header).and_then(|()| file.write_all(&body)).map_err(io_error("write", path))
}

/// Read the state at `path`, checked for being whole.
pub fn read(path: &Path) -> Result<State, Error> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(BODY_MAX).read_to_end(&mut bytes))
        .map_err(io_error("read", path))?;
    parse(&bytes).map_err(|why| unusable(path, why))
}

fn parse(bytes: &[u8]) -> Result<State, String> {
    let field = |at: usize, length: usize| bytes.get(at..at + length).unwrap_or_default();
    let number = |at: usize, length: usize| {
        field(at, length).iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    if field(0, 16) != MAGIC {
        return Err("it does not begin as a snapshot does".into());
    }
    let version = number(16, 4);
    if !(u64::from(OLDEST)..=u64::from(VERSION)).contains(&version) {
        return Err(format!("its format has version {version}; this lab-vmm knows {OLDEST} to {VERSION}"));
    }
    let body = bytes.get(HEADER..).filter(|body| body.len() as u64 == number(24, 8));
    let Some(body) = body else {
        return Err(format!(
            "it is {} bytes long, and says of itself that {} follow on {HEADER}",
            bytes.len(),
            number(24, 8)
        ));
    };
    if u64::from(crc32fast::hash(body)) != number(20, 4) {
        return Err("its checksum is wrong: it is damaged".into());
    }
    serde_json::from_slice(body).map_err(|error| format!("this lab-vmm does not understand it: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Chips, ram::Sums};

    fn state() -> State {
        State {
            cpus: Vec::new(),
            memory_mib: 64,
            chips: Chips::default(),
            functions: Vec::new(),
            serial: Default::default(),
            notified: vec!["READY=1".into()],
            sums: Sums::default(),
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write(&path, &state()).unwrap();
        assert_eq!(read(&path).unwrap().notified, ["READY=1"]);
        let whole = std::fs::read(&path).unwrap();
        let mut other = whole.clone();
        other[16] = 99;
        let mut damaged = whole.clone();
        *damaged.last_mut().unwrap() ^= 1;
        let mut longer = whole.clone();
        longer.push(b' ');
        for (bytes, says) in [
            (&b""[..], "does not begin"),
            (&whole[..whole.len() - 1], "bytes long"),
            (&whole[..40], "bytes long"),
            (&whole[..20], "bytes long"),
            (&longer, "bytes long"),
            (&other, "version 99"),
            (&damaged, "damaged"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(read(&folder.path().join("none")).is_err());
    }
}
