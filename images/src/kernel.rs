//! Kernels: the ELF inside a compressed bzImage, so that no guest has to unpack it at each boot.

use std::io::Read;

use lab_vmm::boot::foreign;

/// Largest kernel that is unpacked, in bytes; Debian's is 57 MB.
const MAX_UNPACKED: usize = 512 << 20;
/// Uncompressed size of every block but the last in LZ4's legacy format, in bytes.
const LZ4_BLOCK: usize = 8 << 20;
/// Size of the setup code's sectors, in bytes.
const SECTOR: usize = 512;

/// Why a kernel could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither an ELF file nor a bzImage.
    #[error("not a kernel: neither an ELF file nor a bzImage (x86 boot protocol 2.08 or later)")]
    NotAKernel,
    /// For another processor, or for UEFI.
    #[error("the kernel {0}")]
    Foreign(String),
    /// The file ends before what its header announces.
    #[error(
        "the kernel is truncated: its payload ends at byte {end}, the file at byte {length}; copy it again"
    )]
    Truncated {
        /// Where the payload should end, in bytes.
        end: u64,
        /// Length of the file in bytes.
        length: usize,
    },
    /// A compression that is not known here.
    #[error(
        "the kernel's payload is compressed in an unknown way (it begins {0:02x?}); known are gzip, xz, lz4 and zstd"
    )]
    UnknownCompression(Vec<u8>),
    /// The payload does not unpack.
    #[error("the kernel's {format} payload is corrupt: {reason}; copy it again")]
    Corrupt {
        /// Name of the compression.
        format: &'static str,
        /// What the decompressor said.
        reason: String,
    },
    /// The payload unpacks to more than is sensible.
    #[error("the kernel unpacks to more than {} MiB", MAX_UNPACKED >> 20)]
    TooLarge,
    /// The unpacked payload is no ELF file.
    #[error("the kernel's payload is not an ELF file")]
    PayloadNotElf,
}

/// Unpack the ELF kernel (vmlinux) out of a bzImage; an ELF file is passed through.
///
/// The payload is found by the boot protocol's `payload_offset` and `payload_length` (Documentation/arch/x86/boot.rst)
/// and may be compressed by gzip, xz, lz4 or zstd, or not at all. The kernel's relocations follow the ELF image in the
/// payload and are kept.
pub fn unpack(kernel: &[u8]) -> Result<Vec<u8>, Error> {
    check_machine(kernel)?;
    if is_elf(kernel) {
        return Ok(kernel.to_vec());
    }
    let payload = payload(kernel)?;
    let unpacked = match payload {
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        [0x1f, 0x8b, ..] => gunzip(payload)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let (body, size) = announced(payload)?;
            let reader = lzma_rust2::XzReader::new(body, false);
            read_exactly(reader, size, "xz")?
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            let (body, size) = announced(payload)?;
            unlz4(body, size)?
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let (body, size) = announced(payload)?;
            let reader = ruzstd::decoding::StreamingDecoder::new(body)
                .map_err(|error| Error::Corrupt { format: "zstd", reason: error.to_string() })?;
            read_exactly(reader, size, "zstd")?
        }
        _ => return Err(Error::UnknownCompression(payload.iter().take(6).copied().collect())),
    };
    if !is_elf(&unpacked) {
        return Err(Error::PayloadNotElf);
    }
    check_machine(&unpacked)?;
    Ok(unpacked)
}

/// Refuse what is told apart by its first bytes from a kernel for x86-64.
fn check_machine(kernel: &[u8]) -> Result<(), Error> {
    let head = kernel.get(..foreign::HEAD).unwrap_or(kernel);
    foreign::name(head).map_or(Ok(()), |name| Err(Error::Foreign(name)))
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// The compressed payload of a bzImage.
fn payload(kernel: &[u8]) -> Result<&[u8], Error> {
    let u32_at = |offset: usize| {
        let bytes = kernel.get(offset..offset.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if kernel.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Error::NotAKernel);
    }
    let version = kernel.get(0x206..0x208).map(|v| u16::from_le_bytes([v[0], v[1]]));
    if version.is_none_or(|version| version < 0x208) {
        return Err(Error::NotAKernel);
    }
    // Zero setup sectors mean four (boot protocol, `setup_sects`).
    let sectors = match kernel.get(0x1f1).copied().unwrap_or(0) {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let (Some(offset), Some(length)) = (u32_at(0x248), u32_at(0x24c)) else {
        return Err(Error::NotAKernel);
    };
    if length == 0 {
        return Err(Error::NotAKernel);
    }
    let start = ((sectors + 1) * SECTOR) as u64 + u64::from(offset);
    let end = start + u64::from(length);
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    range
        .and_then(|(start, end)| kernel.get(start..end))
        .ok_or(Error::Truncated { end, length: kernel.len() })
}

/// Split off the size of the unpacked payload, which the kernel's build appends (`size_append`), 4 bytes, little endian.
fn announced(payload: &[u8]) -> Result<(&[u8], usize), Error> {
    let (body, size) = payload.split_last_chunk::<4>().ok_or(Error::NotAKernel)?;
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_UNPACKED { Err(Error::TooLarge) } else { Ok((body, size)) }
}

/// Read exactly `size` bytes; neither less nor more may come.
fn read_exactly(reader: impl Read, size: usize, format: &'static str) -> Result<Vec<u8>, Error> {
    let mut unpacked = Vec::with_capacity(size);
    let read = reader.take(size as u64 + 1).read_to_end(&mut unpacked);
    read.map_err(|error| Error::Corrupt { format, reason: error.to_string() })?;
    check_size(unpacked, size, format)
}

fn check_size(unpacked: Vec<u8>, size: usize, format: &'static str) -> Result<Vec<u8>, Error> {
    if unpacked.len() == size {
        return Ok(unpacked);
    }
    let amount = if unpacked.len() < size { unpacked.len().to_string() } else { format!("more than {size}") };
    Err(Error::Corrupt { format, reason: format!("it unpacks to {amount} bytes, {size} are announced") })
}

/// gzip carries its size itself (and its checksum, which flate2 compares).
fn gunzip(payload: &[u8]) -> Result<Vec<u8>, Error> {
    let mut unpacked = Vec::new();
    let reader = flate2::read::GzDecoder::new(payload);
    reader
        .take(MAX_UNPACKED as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|error| Error::Corrupt { format: "gzip", reason: error.to_string() })?;
    if unpacked.len() > MAX_UNPACKED { Err(Error::TooLarge) } else { Ok(unpacked) }
}

/// LZ4's legacy format: a magic number, then blocks, each behind its compressed length (LZ4 frame format, "Legacy
/// frame").
fn unlz4(payload: &[u8], size: usize) -> Result<Vec<u8>, Error> {
    let corrupt = |reason: String| Error::Corrupt { format: "lz4", reason };
    let mut rest = payload.get(4..).unwrap_or_default();
    let mut unpacked = Vec::with_capacity(size);
    let mut block = vec![0; LZ4_BLOCK.min(size)];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some((compressed, after)) = after.split_at_checked(length) else {
            return Err(corrupt(format!("a block of {length} bytes is cut off after {}", after.len())));
        };
        let written = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|error| corrupt(error.to_string()))?;
        unpacked.extend_from_slice(block.get(..written).unwrap_or_default());
        if unpacked.len() > size {
            break;
        }
        rest = after;
    }
    check_size(unpacked, size, "lz4")
}

#[cfg(test)]
mod tests;
