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
const TYPE_SOA: u16 = 6;
const TYPE_PTR: u16 = 12;
const TYPE_OPT: u16 = 41;
const TYPE_ANY: u16 = 255;
const HEADER: usize = 12;
/// Bits of the first byte of flags.
const OPCODE: u8 = 0x78;
const RECURSION_DESIRED: u8 = 1;
/// A pointer to the question's name, behind the header.
const QUESTION_NAME: [u8; 2] = [0xc0, HEADER as u8];
/// Response codes.
const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NAME_ERROR: u8 = 3;
const NOT_IMPLEMENTED: u8 = 4;

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
        // NOTIFY and UPDATE, say, for which there is nobody here.
        if query.get(2).is_some_and(|flags| flags & OPCODE != 0) {
            return Verdict::Answer(respond(query, NOT_IMPLEMENTED, None, None));
        }
        match self.look_up(query, &packet) {
            Verdict::Answer(_) if edns_version(query).is_some_and(|version| version > 0) => {
                Verdict::Answer(bad_version(query))
            }
            verdict => verdict,
        }
    }

    fn look_up(&self, query: &[u8], packet: &DnsPacket<&[u8]>) -> Verdict {
        // What cannot be understood here may still mean something to a real resolver.
        let Ok((_, question)) = DnsQuestion::parse(packet.payload()) else { return Verdict::Relay };
        let Some(name) = text(packet, question.name) else { return Verdict::Relay };
        let kind = u16::from(question.type_);
        if let Some(ip) = reverse(&name) {
            if !self.cidr.contains_addr(&ip) {
                return Verdict::Relay;
            }
            let Some(label) = self.name_of(ip) else {
                return self.nothing(query, NAME_ERROR, false);
            };
            let name = wire_name(&format!("{label}.{}", self.domain));
            let wanted = kind == TYPE_PTR || kind == TYPE_ANY;
            return match wanted {
                true => Verdict::Answer(respond(query, NO_ERROR, Some((TYPE_PTR, &name)), None)),
                false => self.nothing(query, NO_ERROR, false),
            };
        }
        if name == self.domain {
            return self.nothing(query, NO_ERROR, true);
        }
        let inside = name.strip_suffix(self.domain).and_then(|front| front.strip_suffix('.'));
        match self.address_of(inside.unwrap_or(&name)) {
            Some(ip) => {
                let ip = ip.octets();
                match kind == TYPE_A || kind == TYPE_ANY {
                    true => Verdict::Answer(respond(query, NO_ERROR, Some((TYPE_A, &ip)), None)),
                    false => self.nothing(query, NO_ERROR, inside.is_some()),
                }
            }
            None if inside.is_some() => self.nothing(query, NAME_ERROR, true),
            None => Verdict::Relay,
        }
    }

    /// That there is nothing of the kind, or no such name, with the record that says for how long this may be remembered
    /// (RFC 2308 §3): of the lab's domain, if the name is `inside` of it, else of the name itself.
    fn nothing(&self, query: &[u8], code: u8, inside: bool) -> Verdict {
        let mut data = wire_name(&format!("{GATEWAY}.{}", self.domain));
        data.extend(wire_name(&format!("hostmaster.{}", self.domain)));
        // Serial number, refresh, retry, expire, and the time that counts.
        for number in [1, TTL, TTL, TTL, TTL] {
            data.extend(number.to_be_bytes());
        }
        let mut soa = if inside { wire_name(self.domain) } else { QUESTION_NAME.to_vec() };
        push_record(&mut soa, TYPE_SOA, &data);
        Verdict::Answer(respond(query, code, None, Some(&soa)))
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
    respond(query, SERVER_FAILURE, None, None)
}

/// That this is no version of EDNS that is known here: code 16, whose upper bits are in the OPT record (RFC 6891 §6.1.3).
fn bad_version(query: &[u8]) -> Vec<u8> {
    let mut response = respond(query, NO_ERROR, None, None);
    let upper_bits = response.len().saturating_sub(6);
    if let Some(byte) = response.get_mut(upper_bits) {
        *byte = 1;
    }
    response
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

pub(super) fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.') {
        wire.push(u8::try_from(label.len()).unwrap_or(63));
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

/// Adds the rest of a record to its name.
fn push_record(record: &mut Vec<u8>, kind: u16, data: &[u8]) {
    record.extend(kind.to_be_bytes());
    record.extend(1u16.to_be_bytes());
    record.extend(TTL.to_be_bytes());
    record.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
    record.extend(data);
}

/// A response to `query`: its question, one record about the name in it, and one about who says so.
fn respond(query: &[u8], code: u8, record: Option<(u16, &[u8])>, authority: Option<&[u8]>) -> Vec<u8> {
    let Some((header, payload)) = query.split_at_checked(HEADER) else { return Vec::new() };
    let (question, _) = payload.split_at_checked(question_len(payload)).unwrap_or_default();
    let mut response = header.to_vec();
    let kept = header.get(2).copied().unwrap_or_default() & (OPCODE | RECURSION_DESIRED);
    let edns = edns_version(query).is_some();
    let counts = [!question.is_empty(), record.is_some(), authority.is_some(), edns];
    // QR and AA; RA.
    if let Some(flags) = response.get_mut(2..4) {
        flags.copy_from_slice(&[0x84 | kept, 0x80 | code]);
    }
    for (count, room) in counts.iter().zip(response.chunks_exact_mut(2).skip(2)) {
        room.copy_from_slice(&[0, u8::from(*count)]);
    }
    response.extend(question);
    if let Some((kind, data)) = record {
        response.extend(QUESTION_NAME);
        push_record(&mut response, kind, data);
    }
    response.extend(authority.unwrap_or_default());
    if edns {
        // EDNS(0), RFC 6891: a resolver that sees none stops using it for the names outside, too.
        response.push(0);
        response.extend(TYPE_OPT.to_be_bytes());
        response.extend(1232u16.to_be_bytes());
        response.extend([0; 6]);
    }
    response
}

fn question_len(payload: &[u8]) -> usize {
    DnsQuestion::parse(payload).map_or(0, |(rest, _)| payload.len().saturating_sub(rest.len()))
}

/// The version of the OPT record that follows the question, as it does in the queries of resolvers.
fn edns_version(query: &[u8]) -> Option<u8> {
    let (header, payload) = query.split_at_checked(HEADER)?;
    let rest = payload.get(question_len(payload)..)?;
    let alone = header.get(6..10) == Some(&[0; 4]) && header.get(10..12) != Some(&[0; 2]);
    match rest {
        [0, high, low, _, _, _, version, ..] if alone && u16::from_be_bytes([*high, *low]) == TYPE_OPT => {
            Some(*version)
        }
        _ => None,
    }
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

    fn answer(query: &[u8]) -> Option<Vec<u8>> {
        let hosts = hosts();
        match (Zone { domain: "class.lab", hosts: &hosts, cidr: cidr() }).decide(query) {
            Verdict::Answer(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Response code, and the data of the one record.
    fn ask(name: &str, kind: u16) -> Option<(u8, Option<Vec<u8>>)> {
        let bytes = answer(&query(name, kind, true))?;
        let packet = DnsPacket::new_checked(bytes.as_slice()).unwrap();
        assert_eq!(packet.transaction_id(), 0xabcd);
        assert_eq!(packet.additional_record_count(), 1);
        let (rest, _) = DnsQuestion::parse(packet.payload()).unwrap();
        let found = packet.answer_record_count() == 1;
        assert_eq!(packet.authority_record_count(), u16::from(!found), "how long nothing may be remembered");
        let data = found.then(|| {
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
    fn nothing_may_be_remembered_for_a_while() {
        let mut soa = wire_name("class.lab");
        soa.extend([0, 6, 0, 1, 0, 0, 0, 30, 0, 61]);
        soa.extend([wire_name("gateway.class.lab"), wire_name("hostmaster.class.lab")].concat());
        soa.extend([0, 0, 0, 1]);
        soa.extend([0, 0, 0, 30].repeat(4));
        for name in ["w9.class.lab", "class.lab", "w1.class.lab"] {
            let query = query(name, 28, false);
            assert_eq!(answer(&query).unwrap().get(query.len()..), Some(soa.as_slice()), "{name}");
        }
        // A name without a domain, and one of an address, are zones of their own.
        for name in ["w1", "99.0.0.10.in-addr.arpa"] {
            let query = query(name, 28, false);
            assert_eq!(
                answer(&query).unwrap().get(query.len()..query.len() + 4),
                Some(&[0xc0, 12, 0, 6][..])
            );
        }
    }

    #[test]
    fn what_is_no_query_is_refused_as_what_it_is() {
        for (opcode, name) in [(4, "notify"), (5, "update")] {
            let mut query = query("class.lab", 6, false);
            query[2] = opcode << 3;
            let response = answer(&query).unwrap();
            assert_eq!(response[2..4], [0x84 | opcode << 3, 0x80 | NOT_IMPLEMENTED], "{name}");
        }
    }

    #[test]
    fn an_unknown_version_of_edns_is_told() {
        let mut query = query("w1", TYPE_A, true);
        let version = query.len() - 5;
        query[version] = 1;
        let response = answer(&query).unwrap();
        let packet = DnsPacket::new_checked(response.as_slice()).unwrap();
        assert_eq!((u8::from(packet.rcode()), packet.answer_record_count()), (0, 0));
        assert_eq!(
            response[response.len() - 11..],
            [0, 0, 41, 4, 0xd0, 1, 0, 0, 0, 0, 0],
            "BADVERS, version 0"
        );
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
