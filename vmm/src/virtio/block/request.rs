//! Block requests as the guest lays them out (virtio 1.3 §5.2.6), checked.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{MAX_ZEROES, SECTOR};
use crate::virtio::{queue::Chain, segments::Segments};

/// What the disk allows.
pub(super) struct Limits {
    /// Its size in sectors.
    pub sectors: u64,
    /// Whether it may not be written.
    pub read_only: bool,
}

/// A request that can be carried out.
pub(super) struct Request<'m> {
    /// What to do.
    pub transfer: Transfer<'m>,
    /// Where the status byte goes.
    pub status: Segments<'m>,
}

/// A request that is answered without being carried out.
pub(super) struct Refused<'m> {
    /// VIRTIO_BLK_S_IOERR or VIRTIO_BLK_S_UNSUPP.
    pub code: u32,
    /// Where the status byte goes.
    pub status: Segments<'m>,
}

/// What to do. Offsets and lengths are bytes, multiples of 512 and within the disk.
pub(super) enum Transfer<'m> {
    /// VIRTIO_BLK_T_IN
    Read { offset: u64, data: Segments<'m> },
    /// VIRTIO_BLK_T_OUT
    Write { offset: u64, data: Segments<'m> },
    /// VIRTIO_BLK_T_FLUSH
    Flush,
    /// VIRTIO_BLK_T_DISCARD
    Discard { offset: u64, length: u64 },
    /// VIRTIO_BLK_T_WRITE_ZEROES
    Zeroes { offset: u64, length: u64, unmap: bool },
    /// VIRTIO_BLK_T_GET_ID
    Serial { data: Segments<'m> },
}

impl Transfer<'_> {
    /// What it does, for "cannot …".
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } | Self::Serial { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::Zeroes { .. } => "write zeroes",
        }
    }

    /// Whether it changes the disk.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::Zeroes { .. })
    }

    /// How much work it is, in bytes of data; without end for what has no data of its own.
    pub fn size(&self) -> usize {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } | Self::Serial { data } => data.len(),
            Self::Flush | Self::Discard { .. } | Self::Zeroes { .. } => usize::MAX,
        }
    }
}

/// Reads a chain: a header of type, reserved word and sector, then data, then a status byte. An error is a chain
/// without room for header or status, which cannot be answered.
pub(super) fn parse<'m>(
    mut chain: Chain<'m>,
    limits: &Limits,
) -> Result<Result<Request<'m>, Refused<'m>>, &'static str> {
    let Some(header) = chain.readable.take_object::<[u32; 4]>() else {
        return Err("a block request without a header");
    };
    let [kind, _, sector_low, sector_high] = header.map(u32::from_le);
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let Some(data_length) = chain.writable.len().checked_sub(1) else {
        return Err("a block request without room for its status");
    };
    let data = chain.writable.take(data_length);
    let status = chain.writable;
    Ok(match transfer(kind, sector, chain.readable, data, limits) {
        Ok(transfer) => Ok(Request { transfer, status }),
        Err(code) => Err(Refused { code, status }),
    })
}

fn transfer<'m>(
    kind: u32,
    sector: u64,
    mut readable: Segments<'m>,
    writable: Segments<'m>,
    limits: &Limits,
) -> Result<Transfer<'m>, u32> {
    let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if writes && limits.read_only {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            Ok(Transfer::Read { offset: range(sector, writable.len() as u64, limits)?, data: writable })
        }
        VIRTIO_BLK_T_OUT => {
            Ok(Transfer::Write { offset: range(sector, readable.len() as u64, limits)?, data: readable })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Transfer::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Transfer::Serial { data: writable }),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            // One struct virtio_blk_discard_write_zeroes: sector, number of sectors, flags.
            let [low, high, sectors, flags] =
                readable.take_object::<[u32; 4]>().ok_or(VIRTIO_BLK_S_IOERR)?.map(u32::from_le);
            let sector = u64::from(high) << 32 | u64::from(low);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && kind == VIRTIO_BLK_T_DISCARD) {
                return Err(VIRTIO_BLK_S_UNSUPP);
            }
            if !readable.is_empty() || sectors > MAX_ZEROES {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            let length = u64::from(sectors) * SECTOR;
            let offset = range(sector, length, limits)?;
            if kind == VIRTIO_BLK_T_DISCARD {
                Ok(Transfer::Discard { offset, length })
            } else {
                Ok(Transfer::Zeroes { offset, length, unmap })
            }
        }
        _ => Err(VIRTIO_BLK_S_UNSUPP),
    }
}

/// Offset in bytes of `length` bytes from `sector` on, if they are whole sectors of the disk.
fn range(sector: u64, length: u64, limits: &Limits) -> Result<u64, u32> {
    if !length.is_multiple_of(SECTOR) {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let end = sector.checked_add(length / SECTOR).ok_or(VIRTIO_BLK_S_IOERR)?;
    if end > limits.sectors {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    sector.checked_mul(SECTOR).ok_or(VIRTIO_BLK_S_IOERR)
}
