//! A packet as it crosses a card's socket: a virtio-net header (virtio 1.3 §5.1.6, `virtio_net_hdr_v1`) before an
//! Ethernet frame. Cards are not trusted: a header is checked against its frame before anyone else sees it.

use smoltcp::wire::EthernetAddress;

/// Length of the virtio-net header in bytes.
pub const HEADER_LEN: usize = 12;
/// Length of an Ethernet header in bytes.
pub const ETHERNET_LEN: usize = 14;
/// Longest packet in bytes: both headers, a VLAN tag, and the longest IP packet.
pub const MAX_PACKET: usize = HEADER_LEN + ETHERNET_LEN + 4 + 65535;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of ARP.
pub const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// Why a packet was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Too short for its headers, or longer than [`MAX_PACKET`].
    #[error("a packet of {0} bytes: it must have 26 to {MAX_PACKET}")]
    Length(usize),
    /// The checksum to be completed is not inside the frame.
    #[error("a checksum at {start}+{offset}, outside its frame of {len} bytes")]
    Checksum {
        /// csum_start.
        start: u16,
        /// csum_offset.
        offset: u16,
        /// Length of the frame.
        len: usize,
    },
    /// A segmentation type that was never offered.
    #[error("segmentation type {0:#x}, which is not offered")]
    GsoType(u8),
    /// Segmentation without a segment size, without a checksum to complete, or of another protocol than the frame's.
    #[error("a segmentation request that does not fit its frame")]
    Gso,
    /// Sent from a group address.
    #[error("a group address as its source")]
    Source,
}

fn u16_le(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at.saturating_add(2)) {
        Some(&[a, b]) => u16::from_le_bytes([a, b]),
        _ => 0,
    }
}

fn mac(bytes: &[u8], at: usize) -> EthernetAddress {
    match bytes.get(at..at.saturating_add(6)) {
        Some(&[a, b, c, d, e, f]) => EthernetAddress([a, b, c, d, e, f]),
        _ => EthernetAddress([0; 6]),
    }
}

/// A checked packet.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    packet: &'a [u8],
    /// Destination address.
    pub destination: EthernetAddress,
    /// Source address.
    pub source: EthernetAddress,
    /// Ethertype, as the frame says it (0x8100 if the frame is tagged).
    pub ethertype: u16,
}

impl<'a> Frame<'a> {
    /// Check a packet from a card, and clear those fields of its header that only a device may set
    /// (virtio 1.3 §5.1.6.2: all flags but NEEDS_CSUM; num_buffers).
    pub fn check(packet: &'a mut [u8]) -> Result<Frame<'a>, Invalid> {
        let total = packet.len();
        if !(HEADER_LEN + ETHERNET_LEN..=MAX_PACKET).contains(&total) {
            return Err(Invalid::Length(total));
        }
        let (header, frame) = packet.split_at_mut(HEADER_LEN);
        let &mut [ref mut flags, gso_type, .., ref mut buffers_low, ref mut buffers_high] = header else {
            return Err(Invalid::Length(total));
        };
        *flags &= NEEDS_CSUM;
        *buffers_low = 1;
        *buffers_high = 0;
        let needs_csum = *flags & NEEDS_CSUM != 0;
        let (gso_size, start, offset) = (u16_le(header, 4), u16_le(header, 6), u16_le(header, 8));
        if needs_csum {
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET_LEN || end > frame.len() {
                return Err(Invalid::Checksum { start, offset, len: frame.len() });
            }
        }
        let ethertype = u16_le(frame, 12).swap_bytes();
        let protocol = match gso_type & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(IPV4),
            GSO_TCPV6 => Some(IPV6),
            _ => return Err(Invalid::GsoType(gso_type)),
        };
        if let Some(protocol) = protocol {
            let tagged = ethertype == 0x8100;
            if gso_size == 0 || !needs_csum || (ethertype != protocol && !tagged) {
                return Err(Invalid::Gso);
            }
        }
        let source = mac(frame, 6);
        if !source.is_unicast() {
            return Err(Invalid::Source);
        }
        let destination = mac(frame, 0);
        Ok(Frame { packet, destination, source, ethertype })
    }

    /// The whole packet, virtio-net header first.
    pub fn packet(&self) -> &'a [u8] {
        self.packet
    }

    /// What the frame carries.
    pub fn payload(&self) -> &'a [u8] {
        self.packet.get(HEADER_LEN + ETHERNET_LEN..).unwrap_or_default()
    }
}

/// What the receiver of a packet of the gateway has left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Nothing: the packet is complete.
    None,
    /// Complete the TCP checksum (the pseudo header's sum is in its place), and cut the packet into segments if
    /// there is a segment size.
    Tcp {
        /// Payload bytes a segment; 0 if the packet is one segment.
        segment_size: u16,
        /// Length of the IP header and the TCP header together.
        headers: u16,
    },
}

/// Write both headers in front of an IPv4 (or ARP) packet that starts at byte 26 of `packet`.
pub fn write_headers(
    packet: &mut [u8],
    source: EthernetAddress,
    destination: EthernetAddress,
    ethertype: u16,
    offload: Offload,
) {
    let mut header = [0u8; HEADER_LEN + ETHERNET_LEN];
    if let Offload::Tcp { segment_size, headers } = offload {
        let csum_start = (ETHERNET_LEN + 20) as u16;
        let hdr_len = headers.saturating_add(ETHERNET_LEN as u16);
        header[0] = NEEDS_CSUM;
        header[1] = if segment_size == 0 { GSO_NONE } else { GSO_TCPV4 };
        header[2..4].copy_from_slice(&hdr_len.to_le_bytes());
        header[4..6].copy_from_slice(&segment_size.to_le_bytes());
        header[6..8].copy_from_slice(&csum_start.to_le_bytes());
        header[8..10].copy_from_slice(&16u16.to_le_bytes());
    }
    header[10] = 1;
    header[12..18].copy_from_slice(destination.as_bytes());
    header[18..24].copy_from_slice(source.as_bytes());
    header[24..26].copy_from_slice(&ethertype.to_be_bytes());
    if let Some(room) = packet.get_mut(..header.len()) {
        room.copy_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(header: [u8; HEADER_LEN], ethertype: u16, payload: usize) -> Vec<u8> {
        let mut packet = header.to_vec();
        packet.extend([0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1]);
        packet.extend(ethertype.to_be_bytes());
        packet.resize(packet.len() + payload, 0);
        packet
    }

    #[test]
    fn a_plain_frame_passes() {
        let mut bytes = packet([0; 12], IPV4, 46);
        let frame = Frame::check(&mut bytes).unwrap();
        assert_eq!(frame.ethertype, IPV4);
        assert_eq!(frame.source, EthernetAddress([0x52, 0x54, 0, 0, 0, 1]));
        assert_eq!(frame.payload().len(), 46);
        assert_eq!(frame.packet()[10], 1, "num_buffers is 1 for a receiver without mergeable buffers");
    }

    #[test]
    fn headers_that_lie_are_refused() {
        // Flags, type, header length, segment size, checksum start and offset.
        let cases: [([u8; 12], u16, usize, Invalid); 6] = [
            (
                [1, 0, 0, 0, 0, 0, 200, 0, 16, 0, 0, 0],
                IPV4,
                46,
                Invalid::Checksum { start: 200, offset: 16, len: 60 },
            ),
            (
                [1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0],
                IPV4,
                46,
                Invalid::Checksum { start: 65535, offset: 65535, len: 60 },
            ),
            ([0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], IPV4, 46, Invalid::GsoType(3)),
            ([1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], IPV4, 46, Invalid::Gso),
            ([0, 1, 0, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], IPV4, 46, Invalid::Gso),
            ([1, 1, 0, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], ARP, 46, Invalid::Gso),
        ];
        for (header, ethertype, payload, error) in cases {
            let mut bytes = packet(header, ethertype, payload);
            assert_eq!(Frame::check(&mut bytes).unwrap_err(), error);
        }
        assert_eq!(Frame::check(&mut [0; 25]).unwrap_err(), Invalid::Length(25));
    }

    #[test]
    fn the_gateways_headers_pass_the_check() {
        let mut bytes = vec![0; 26 + 40 + 3000];
        let (from, to) = (EthernetAddress([2, 0, 0, 0, 0, 1]), EthernetAddress([2, 0, 0, 0, 0, 2]));
        write_headers(&mut bytes, from, to, IPV4, Offload::Tcp { segment_size: 1460, headers: 40 });
        let frame = Frame::check(&mut bytes).unwrap();
        assert_eq!((frame.source, frame.destination, frame.ethertype), (from, to, IPV4));
    }

    proptest! {
        #[test]
        fn random_packets_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = Frame::check(&mut bytes) {
                let _ = frame.payload();
            }
        }
    }
}
