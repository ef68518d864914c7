//! Fragments of IPv4 packets that nodes send through the gateway, put together again (RFC 791). Datagrams longer
//! than the wire's packets are the only ones that nodes cut.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use smoltcp::wire::Ipv4Packet;

/// Most packets of one card that are put together at once; when there are more, the oldest is given up.
const MAX_PACKETS: usize = 16;
/// Most fragments of one packet.
const MAX_FRAGMENTS: usize = 128;
/// A packet that is not complete after so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);
const HEADER: usize = 20;
/// Longest payload of an IPv4 packet in bytes.
const MAX_PAYLOAD: usize = 65535 - HEADER;

/// Card, source, destination, protocol and identification.
type Key = (u64, Ipv4Addr, Ipv4Addr, u8, u16);

#[derive(Debug)]
struct Partial {
    since: Instant,
    /// Offset of each fragment, and its bytes.
    pieces: Vec<(usize, Vec<u8>)>,
    /// Length of the payload, once the last fragment is there.
    total: Option<usize>,
}

/// Packets of which some fragments are there.
#[derive(Debug, Default)]
pub struct Reassembly {
    partial: HashMap<Key, Partial>,
}

impl Reassembly {
    /// Take a fragment that came in at `port`: the whole packet, if this was its last missing one.
    pub fn add(&mut self, port: u64, fragment: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        self.partial.retain(|_, partial| now.saturating_duration_since(partial.since) < PATIENCE);
        let protocol = u8::from(fragment.next_header());
        let key = (port, fragment.src_addr(), fragment.dst_addr(), protocol, fragment.ident());
        let (start, payload) = (usize::from(fragment.frag_offset()), fragment.payload());
        let end = start.checked_add(payload.len()).filter(|end| *end <= MAX_PAYLOAD)?;
        if !self.partial.contains_key(&key) {
            let mine = || self.partial.iter().filter(|((of, ..), _)| *of == port);
            let oldest = mine().min_by_key(|(_, partial)| partial.since).map(|(key, _)| *key);
            if let Some(oldest) = oldest.filter(|_| mine().count() >= MAX_PACKETS) {
                self.partial.remove(&oldest);
            }
        }
        let partial = self.partial.entry(key).or_insert_with(|| Partial {
            since: now,
            pieces: Vec::new(),
            total: None,
        });
        let overlaps = partial.pieces.iter().any(|(at, bytes)| {
            start < at.saturating_add(bytes.len()) && *at < end.max(start.saturating_add(1))
        });
        let last = !fragment.more_frags();
        let contradicts = match partial.total {
            Some(total) => last || end > total,
            None => last && partial.pieces.iter().any(|(at, bytes)| at.saturating_add(bytes.len()) > end),
        };
        // Nobody sends such fragments who means well.
        if overlaps || contradicts || payload.is_empty() || partial.pieces.len() >= MAX_FRAGMENTS {
            self.partial.remove(&key);
            return None;
        }
        partial.pieces.push((start, payload.to_vec()));
        if last {
            partial.total = Some(end);
        }
        // Pieces do not overlap: together as long as the whole, they are the whole.
        let have = partial.pieces.iter().map(|(_, bytes)| bytes.len()).fold(0, usize::saturating_add);
        if partial.total != Some(have) {
            return None;
        }
        let mut pieces = self.partial.remove(&key)?.pieces;
        pieces.sort_by_key(|(at, _)| *at);
        let mut whole = fragment.as_ref().get(..HEADER)?.to_vec();
        for (_, bytes) in pieces {
            whole.extend(bytes);
        }
        let len = u16::try_from(whole.len()).ok()?;
        let mut packet = Ipv4Packet::new_unchecked(whole.as_mut_slice());
        packet.set_header_len(HEADER as u8);
        packet.set_total_len(len);
        packet.clear_flags();
        packet.set_frag_offset(0);
        packet.fill_checksum();
        Some(whole)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::{
        phy::ChecksumCapabilities,
        wire::{IpProtocol, Ipv4Repr},
    };

    use super::*;

    fn fragment(ident: u16, at: u16, payload: &[u8], more: bool) -> Vec<u8> {
        let repr = Ipv4Repr {
            src_addr: Ipv4Addr::new(10, 0, 0, 2),
            dst_addr: Ipv4Addr::new(192, 0, 2, 1),
            next_header: IpProtocol::Udp,
            payload_len: payload.len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; HEADER];
        bytes.extend(payload);
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        repr.emit(&mut packet, &ChecksumCapabilities::default());
        packet.set_dont_frag(false);
        packet.set_ident(ident);
        packet.set_more_frags(more);
        packet.set_frag_offset(at);
        bytes
    }

    fn add_of(table: &mut Reassembly, port: u64, bytes: &[u8]) -> Option<Vec<u8>> {
        table.add(port, &Ipv4Packet::new_checked(bytes).unwrap(), Instant::now())
    }

    fn add(table: &mut Reassembly, bytes: &[u8]) -> Option<Vec<u8>> {
        add_of(table, 1, bytes)
    }

    #[test]
    fn fragments_in_any_order_make_the_packet() {
        let data: Vec<u8> = (0..100).collect();
        let pieces = [
            fragment(1, 0, &data[..40], true),
            fragment(1, 40, &data[40..80], true),
            fragment(1, 80, &data[80..], false),
        ];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut table = Reassembly::default();
            assert_eq!(add(&mut table, &pieces[order[0]]), None);
            assert_eq!(add(&mut table, &fragment(2, 0, &data[..8], true)), None, "another packet's");
            assert_eq!(add(&mut table, &pieces[order[1]]), None);
            let whole = add(&mut table, &pieces[order[2]]).unwrap();
            let packet = Ipv4Packet::new_checked(whole.as_slice()).unwrap();
            assert!(packet.verify_checksum() && !packet.more_frags());
            assert_eq!(packet.payload(), data);
        }
    }

    #[test]
    fn overlaps_and_leftovers_are_given_up() {
        let mut table = Reassembly::default();
        add(&mut table, &fragment(1, 0, &[0; 40], true));
        assert_eq!(add(&mut table, &fragment(1, 32, &[0; 40], false)), None);
        assert!(table.partial.is_empty());
        for ident in 0..1000 {
            add(&mut table, &fragment(ident, 8, &[0; 8], true));
        }
        assert_eq!(table.partial.len(), MAX_PACKETS);
        // Another card's are its own affair.
        let mine = [fragment(1, 0, &[0; 8], true), fragment(1, 8, &[0; 8], false)];
        assert_eq!(add_of(&mut table, 2, &mine[0]), None);
        for ident in 0..1000 {
            add_of(&mut table, 1, &fragment(ident, 8, &[0; 8], true));
        }
        assert!(add_of(&mut table, 2, &mine[1]).is_some());
    }

    proptest! {
        #[test]
        fn random_fragments_never_panic(
            fragments in proptest::collection::vec((0..4u16, 0..8192u16, 0..100usize, any::<bool>()), 0..50)
        ) {
            let mut table = Reassembly::default();
            for (ident, at, len, more) in fragments {
                let bytes = fragment(ident, at.wrapping_mul(8), &vec![1; len], more);
                if let Some(whole) = add(&mut table, &bytes) {
                    prop_assert!(Ipv4Packet::new_checked(whole.as_slice()).is_ok());
                }
            }
        }
    }
}
