//! ICMP errors to nodes: what became of a packet on its way (RFC 792), by the rules for routers (RFC 1812 §4.3).

use std::{net::Ipv4Addr, time::Instant};

use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet};

use crate::lan::Lan;

/// Longest ICMP error in bytes, with its IP header (RFC 1812 §4.3.2.3).
const LONGEST: usize = 576;
/// Length of an IP header without options and of an ICMP error's header together, in bytes.
const HEADERS: usize = 28;
/// Most errors at once, and in each second, as of a Linux router (`icmp_msgs_burst`, `icmp_msgs_per_sec`).
const BURST: u64 = 50;
const PER_SECOND: u64 = 1000;

/// What an error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpError {
    /// ICMP type.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// MTU of the next hop in bytes where a packet was too long (RFC 1191), else 0.
    pub mtu: u16,
}

impl IcmpError {
    /// The packet's time to live has come to its end.
    pub const TIME_EXCEEDED: IcmpError = IcmpError { kind: 11, code: 0, mtu: 0 };

    /// The packet cannot be delivered.
    pub fn unreachable(reason: Icmpv4DstUnreachable) -> IcmpError {
        IcmpError { kind: 3, code: reason.into(), mtu: 0 }
    }

    /// The packet is longer than the next hop takes, and must not be cut.
    pub fn too_long(mtu: u16) -> IcmpError {
        IcmpError { kind: 3, code: Icmpv4DstUnreachable::FragRequired.into(), mtu }
    }
}

/// How many errors may be sent at the moment (RFC 1812 §4.3.2.8).
#[derive(Debug)]
pub struct Allowance {
    left: u64,
    since: Instant,
}

impl Allowance {
    /// All that there is at once.
    pub fn new(now: Instant) -> Allowance {
        Allowance { left: BURST, since: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = u64::try_from(now.saturating_duration_since(self.since).as_millis()).unwrap_or(u64::MAX);
        let more = passed.saturating_mul(PER_SECOND) / 1000;
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.since = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

impl Lan {
    /// Tell the sender of an IP packet that it could not be delivered.
    pub fn send_unreachable(&mut self, packet: &Ipv4Packet<&[u8]>, reason: Icmpv4DstUnreachable) {
        self.send_error(self.gateway(), IcmpError::unreachable(reason), packet.as_ref());
    }

    /// Tell a node what became of its packet, of which `packet` is at least the header and eight bytes. Where RFC 1812
    /// §4.3.2.7 wants no error sent, none is, nor where there were too many.
    pub fn send_error(&mut self, from: Ipv4Addr, error: IcmpError, packet: &[u8]) {
        let Some(guest) = self.may_be_told(packet) else { return };
        if !self.errors.take(self.now) {
            return;
        }
        let quoted = packet.get(..packet.len().min(LONGEST - HEADERS)).unwrap_or_default();
        let mut message = vec![0; 8];
        message.extend(quoted);
        let [high, low] = error.mtu.to_be_bytes();
        if let [kind, code, .., mtu_high, mtu_low] = message.get_mut(..8).unwrap_or_default() {
            (*kind, *code, *mtu_high, *mtu_low) = (error.kind, error.code, high, low);
        }
        Icmpv4Packet::new_unchecked(message.as_mut_slice()).fill_checksum();
        self.send_icmp_bytes(from, guest, &message);
    }

    /// The node to which an error about its packet may be sent.
    fn may_be_told(&self, packet: &[u8]) -> Option<Ipv4Addr> {
        let header = packet.get(..20)?;
        let ip = Ipv4Packet::new_unchecked(header);
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let whole_network = to.is_broadcast() || to.is_multicast() || Some(to) == self.cidr.broadcast();
        if !self.is_node(from) || whole_network || ip.frag_offset() != 0 {
            return None;
        }
        if ip.next_header() == IpProtocol::Icmp {
            let kind = Icmpv4Message::from(*packet.get(usize::from(ip.header_len()))?);
            if !matches!(kind, Icmpv4Message::EchoRequest | Icmpv4Message::EchoReply) {
                return None;
            }
        }
        Some(from)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use smoltcp::wire::Ipv4Cidr;

    use super::*;

    const NODE: [u8; 4] = [10, 0, 0, 2];

    fn lan() -> Lan {
        Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 24)).unwrap()
    }

    fn packet(from: [u8; 4], to: [u8; 4], protocol: u8, offset: u8, first: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, offset, 1, protocol, 0, 0];
        packet.extend([from, to].concat());
        packet.extend([first, 0, 0, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn nobody_is_told_who_must_not_be() {
        let lan = lan();
        let outside = [192, 0, 2, 1];
        let told = |bytes: Vec<u8>| lan.may_be_told(&bytes).is_some();
        assert!(told(packet(NODE, outside, 17, 0, 0)));
        assert!(told(packet(NODE, outside, 1, 0, 8)), "an echo request");
        assert!(!told(packet(NODE, outside, 1, 0, 3)), "an error");
        assert!(!told(packet(NODE, outside, 17, 1, 0)), "not the first fragment");
        assert!(!told(packet(NODE, [224, 0, 0, 1], 17, 0, 0)), "a group");
        assert!(!told(packet(NODE, [10, 0, 0, 255], 17, 0, 0)), "all nodes");
        assert!(!told(packet([10, 0, 0, 255], outside, 17, 0, 0)), "from all nodes");
        assert!(!told(packet([0; 4], outside, 17, 0, 0)), "from nobody");
    }

    #[test]
    fn there_are_not_too_many() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        let mut taken = |now| (0..200).filter(|_| allowance.take(now)).count();
        assert_eq!((taken(now), taken(now)), (50, 0));
        now += Duration::from_millis(7);
        assert_eq!(taken(now), 7);
        now += Duration::from_secs(3600);
        assert_eq!(taken(now), 50);
    }

    proptest! {
        #[test]
        fn random_packets_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            lan().send_error(Ipv4Addr::LOCALHOST, IcmpError::TIME_EXCEEDED, &bytes);
        }
    }
}
