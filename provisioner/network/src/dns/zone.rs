//! What the lab's own names mean: `NAME` and `NAME.LAB.lab` for nodes, `gateway`, and the names of the lab's
//! addresses (RFC 1035).

use std::net::Ipv4Addr;

use smoltcp::wire::{DnsPacket, DnsQuestion, Ipv4Cidr};

use crate::hosts::Hosts;

/// The gateway's name.
const GATEWAY: &str = "gateway";
/// Seconds for which an answer may be remembered: short, as nodes come and go.
const TTL: u32 = 30;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_OPT: u16 = 41;
const TYPE_ANY: u16 = 255;
const HEADER: usize = 12;
/// Response codes.
const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NAME_ERROR: u8 = 3;

/// What the lab's names are made from.
#[derive(Debug, Clone, Copy)]
pub struct Zone<'a> {
    /// `LAB.lab`, in lower case.
    pub domain: &'a str,
    /// The nodes.
    pub hosts: &'a Hosts,
    /// The gateway's address, with the subnet's prefix.
    pub cidr: Ipv4Cidr,
}

/// What to do with a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// This is the answer.
    Answer(Vec<u8>),
    /// It is about a name outside the lab.
    Relay,
    /// It is no query.
    Drop,
}

impl Zone<'_> {
    /// Decide about a query.
    pub fn decide(&self, query: &[u8]) -> Verdict {
        let Ok(packet) = DnsPacket::new_checked(query) else { return Verdict::Drop };
        let is_response = query.get(2).is_some_and(|flags| flags & 0x80 != 0);
        if is_response || packet.question_count() == 0 {
            return Verdict::Drop;
        }
        // What cannot be understood here may still mean something to a real resolver.
        let Ok((_, question)) = DnsQuestion::parse(packet.payload()) else { return Verdict::Relay };
        let Some(name) = text(&packet, question.name) else { return Verdict::Relay };
        let kind = u16::from(question.type_);
        if let Some(ip) = reverse(&name) {
            if !self.cidr.contains_addr(&ip) {
                return Verdict::Relay;
            }
            let Some(label) = self.name_of(ip) else {
                return Verdict::Answer(respond(query, NAME_ERROR, None));
            };
            let name = wire_name(&format!("{label}.{}", self.domain));
            let wanted = kind == TYPE_PTR || kind == TYPE_ANY;
            let record = wanted.then_some((TYPE_PTR, name.as_slice()));
            return Verdict::Answer(respond(query, NO_ERROR, record));
        }
        if name == self.domain {
            return Verdict::Answer(respond(query, NO_ERROR, None));
        }
        let inside = name.strip_suffix(self.domain).and_then(|front| front.strip_suffix('.'));
        match self.address_of(inside.unwrap_or(&name)) {
            Some(ip) => {
                let ip = ip.octets();
                let wanted = kind == TYPE_A || kind == TYPE_ANY;
                Verdict::Answer(respond(query, NO_ERROR, wanted.then_some((TYPE_A, &ip))))
            }
            None if inside.is_some() => Verdict::Answer(respond(query, NAME_ERROR, None)),
            None => Verdict::Relay,
        }
    }

    fn address_of(&self, label: &str) -> Option<Ipv4Addr> {
        match self.hosts.by_name(label) {
            Some(host) => Some(host.ip),
            None => (label == GATEWAY).then_some(self.cidr.address()),
        }
    }

    fn name_of(&self, ip: Ipv4Addr) -> Option<String> {
        match self.hosts.by_ip(ip) {
            Some(host) => Some(host.name.to_ascii_lowercase()),
            None => (ip == self.cidr.address()).then(|| GATEWAY.to_owned()),
        }
    }
}

/// The answer to a query that nobody could answer.
pub fn failure(query: &[u8]) -> Vec<u8> {
    respond(query, SERVER_FAILURE, None)
}

/// A name in lower case, its labels joined by dots; none if it is malformed or is not made of ASCII.
fn text(packet: &DnsPacket<&[u8]>, name: &[u8]) -> Option<String> {
    let mut text = String::new();
    for label in packet.parse_name(name) {
        let label = std::str::from_utf8(label.ok()?).ok().filter(|label| label.is_ascii())?;
        if label.contains('.') || text.len() > 255 {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(&label.to_ascii_lowercase());
    }
    Some(text)
}

/// The address that a name under `in-addr.arpa` is about.
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let [d, c, b, a]: [u8; 4] = name
        .strip_suffix(".in-addr.arpa")?
        .split('.')
        .map(|octet| octet.parse().ok())
        .collect::<Option<Vec<u8>>>()?
        .try_into()
        .ok()?;
    Some(Ipv4Addr::new(a, b, c, d))
}

fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.') {
        wire.push(u8::try_from(label.len()).unwrap_or(63));
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

/// A response to `query`: its question, and one record about the name in it.
fn respond(query: &[u8], code: u8, record: Option<(u16, &[u8])>) -> Vec<u8> {
    let (Some(header), Some(payload)) = (query.get(..HEADER), query.get(HEADER..)) else { return Vec::new() };
    let question_len =
        DnsQuestion::parse(payload).map_or(0, |(rest, _)| payload.len().saturating_sub(rest.len()));
    let (question, rest) = payload.split_at_checked(question_len).unwrap_or_default();
    let mut response = header.to_vec();
    let recursion_desired = header.get(2).copied().unwrap_or_default() & 1;
    let counts =
        [u8::from(question_len > 0), u8::from(record.is_some()), 0, u8::from(asks_with_edns(header, rest))];
    // QR and AA; RA.
    if let Some(flags) = response.get_mut(2..4) {
        flags.copy_from_slice(&[0x84 | recursion_desired, 0x80 | code]);
    }
    for (count, room) in counts.iter().zip(response.chunks_exact_mut(2).skip(2)) {
        room.copy_from_slice(&[0, *count]);
    }
    response.extend(question);
    if let Some((kind, data)) = record {
        // The name is the question's, at offset 12.
        response.extend([0xc0, HEADER as u8]);
        response.extend(kind.to_be_bytes());
        response.extend(1u16.to_be_bytes());
        response.extend(TTL.to_be_bytes());
        response.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        response.extend(data);
    }
    if counts[3] == 1 {
        // EDNS(0), RFC 6891: a resolver that sees none stops using it for the names outside, too.
        response.push(0);
        response.extend(TYPE_OPT.to_be_bytes());
        response.extend(1232u16.to_be_bytes());
        response.extend([0; 6]);
    }
    response
}

/// Whether an OPT record follows the question, as it does in the queries of resolvers.
fn asks_with_edns(header: &[u8], rest: &[u8]) -> bool {
    header.get(6..10) == Some(&[0; 4])
        && header.get(10..12) != Some(&[0; 2])
        && matches!(rest, [0, high, low, ..] if u16::from_be_bytes([*high, *low]) == TYPE_OPT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{DnsRecord, DnsRecordData};

    use super::*;
    use crate::{config::Host, lan::Lan};

    fn hosts() -> Hosts {
        let lan = Lan::new(cidr()).unwrap();
        let host = |name: &str, n| Host {
            name: name.into(),
            mac: format!("52:54:00:00:00:{n:02x}"),
            ip: Ipv4Addr::new(10, 0, 0, n),
        };
        Hosts::new(vec![host("master", 10), host("w1", 11)], &lan).unwrap()
    }

    fn cidr() -> Ipv4Cidr {
        Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 24)
    }

    fn query(name: &str, kind: u16, edns: bool) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
        query.extend(wire_name(name));
        query.extend(kind.to_be_bytes());
        query.extend([0, 1]);
        if edns {
            query.extend([0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0]);
        }
        query
    }

    /// Response code, and the data of the one record.
    fn ask(name: &str, kind: u16) -> Option<(u8, Option<Vec<u8>>)> {
        let hosts = hosts();
        let zone = Zone { domain: "class.lab", hosts: &hosts, cidr: cidr() };
        let Verdict::Answer(bytes) = zone.decide(&query(name, kind, true)) else { return None };
        let packet = DnsPacket::new_checked(bytes.as_slice()).unwrap();
        assert_eq!(packet.transaction_id(), 0xabcd);
        assert_eq!(packet.additional_record_count(), 1);
        let (rest, _) = DnsQuestion::parse(packet.payload()).unwrap();
        let data = (packet.answer_record_count() == 1).then(|| {
            let (_, record) = DnsRecord::parse(rest).unwrap();
            match record.data {
                DnsRecordData::A(ip) => ip.octets().to_vec(),
                DnsRecordData::Aaaa(ip) => ip.octets().to_vec(),
                DnsRecordData::Other(_, data) | DnsRecordData::Cname(data) => data.to_vec(),
            }
        });
        Some((u8::from(packet.rcode()), data))
    }

    #[test]
    fn the_labs_names_are_answered_and_all_others_are_not() {
        let w1 = Some((NO_ERROR, Some(vec![10, 0, 0, 11])));
        assert_eq!(ask("w1", TYPE_A), w1);
        assert_eq!(ask("W1.Class.LAB", TYPE_A), w1);
        assert_eq!(ask("gateway", TYPE_A), Some((NO_ERROR, Some(vec![10, 0, 0, 1]))));
        assert_eq!(ask("w1", 28), Some((NO_ERROR, None)), "no IPv6 address, but the name exists");
        assert_eq!(ask("class.lab", TYPE_A), Some((NO_ERROR, None)));
        assert_eq!(ask("w9.class.lab", TYPE_A), Some((NAME_ERROR, None)));
        assert_eq!(ask("w9", TYPE_A), None);
        assert_eq!(ask("xclass.lab", TYPE_A), None);
        assert_eq!(ask("deb.debian.org", TYPE_A), None);
    }

    #[test]
    fn the_labs_addresses_have_names() {
        let name = Some((NO_ERROR, Some(wire_name("master.class.lab"))));
        assert_eq!(ask("10.0.0.10.in-addr.arpa", TYPE_PTR), name);
        assert_eq!(ask("99.0.0.10.in-addr.arpa", TYPE_PTR), Some((NAME_ERROR, None)));
        assert_eq!(ask("10.1.0.10.in-addr.arpa", TYPE_PTR), None);
    }

    #[test]
    fn a_failure_repeats_the_question() {
        let query = query("example.org", TYPE_A, false);
        let response = failure(&query);
        assert_eq!(response.len(), query.len());
        assert_eq!(response.get(2..4), Some(&[0x85, 0x82][..]));
    }

    proptest! {
        #[test]
        fn random_queries_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let hosts = hosts();
            Zone { domain: "class.lab", hosts: &hosts, cidr: cidr() }.decide(&bytes);
            failure(&bytes);
        }
    }
}
