//! The header in front of every packet (virtio 1.3 §5.10.6). The virtio-vsock crate is not used: it knows packets
//! of at most two descriptors, and Linux sends longer ones (MSG_ZEROCOPY).

use vm_memory::ByteValued;

/// CID of the host (virtio 1.3 §5.10.4).
pub(super) const HOST: u64 = 2;
/// Length of [`Header`] in bytes.
pub(super) const HEADER: usize = size_of::<Header>();
/// The only type of socket here.
pub(super) const STREAM: u16 = 1;

/// Flag of [`operation::SHUTDOWN`]: the sender will not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Flag of [`operation::SHUTDOWN`]: the sender will not send any more.
pub(super) const NO_SEND: u32 = 2;

/// What a packet says.
pub(super) mod operation {
    /// Open a connection.
    pub const REQUEST: u16 = 1;
    /// It is open.
    pub const RESPONSE: u16 = 2;
    /// It is closed, or was refused.
    pub const RESET: u16 = 3;
    /// One or both directions end.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const DATA: u16 = 5;
    /// How much may be sent.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Tell how much may be sent.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`, in the byte order of the guest, which is ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub(super) struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    pub buffer: u32,
    pub forwarded: u32,
}

// SAFETY: numbers without gaps between them; every value is valid.
unsafe impl ByteValued for Header {}

impl Header {
    /// The answer "there is no such connection" to a packet.
    pub fn reset_for(packet: &Header) -> Self {
        Self {
            source_cid: packet.destination_cid,
            destination_cid: packet.source_cid,
            source_port: packet.destination_port,
            destination_port: packet.source_port,
            kind: packet.kind,
            operation: operation::RESET,
            ..Self::default()
        }
    }
}
