//! Help for guests that did not negotiate offloads, while others on the same switch did: a checksum that is left to
//! the receiver is completed, a segment too large for the wire is dropped (TCP then finds a smaller size).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::HEADER;
use crate::virtio::segments::Pieces;

/// What a guest can do.
pub(super) struct Offload {
    checksum: bool,
    segments: [bool; 2],
}

impl Offload {
    pub fn new(features: u64) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        Self {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            segments: [has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6)],
        }
    }

    /// Makes a packet one that the guest can take; false if that cannot be.
    pub fn help(&self, packet: impl FnOnce() -> Pieces) -> bool {
        if self.checksum && self.segments == [true; 2] {
            return true;
        }
        let packet = packet();
        let mut header = [0; HEADER];
        packet.read(0, &mut header);
        // struct virtio_net_hdr_v1: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
        let [flags, segmentation, _, _, _, _, start_low, start_high, offset_low, offset_high, _, _] = header;
        let [v4, v6] = self.segments;
        match u32::from(segmentation) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => {}
            VIRTIO_NET_HDR_GSO_TCPV4 if v4 => {}
            VIRTIO_NET_HDR_GSO_TCPV6 if v6 => {}
            _ => return false,
        }
        if self.checksum || u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
            return true;
        }
        let start = HEADER + usize::from(u16::from_le_bytes([start_low, start_high]));
        let place = start + usize::from(u16::from_le_bytes([offset_low, offset_high]));
        let mut data = vec![0; packet.len().saturating_sub(start)];
        if place + 2 > packet.len() || packet.read(start, &mut data) < data.len() {
            return false;
        }
        // The pseudo header's sum is in the checksum's place already (virtio 1.3 §5.1.6.2).
        packet.write(place, &checksum(&data).to_be_bytes());
        packet.write(0, &[0, 0]);
        true
    }
}

/// Internet checksum (RFC 1071); zero becomes its other form, since UDP reads zero as "none".
fn checksum(data: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in data.chunks(2) {
        let high = u64::from(pair.first().copied().unwrap_or_default());
        let low = u64::from(pair.get(1).copied().unwrap_or_default());
        sum += high << 8 | low;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        other => other,
    }
}
