//! The way of a node's packets beyond the host, and what routers say of them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/routers.rs"]
mod routers;

use std::{net::Ipv4Addr, os::fd::OwnedFd};

use common::{GATEWAY, Lab, gateway_mac, icmp_of, ip, mac};
use routers::{FIRST, NOWHERE, SECOND, TARGET};
use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, TcpPacket},
};

/// What a node hears of a packet.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// An ICMP error: whose, type, code, MTU.
    Error(Ipv4Addr, u8, u8, u16),
    Reply,
    Reset,
    Datagram(usize),
}

/// A node that sends packets of which it says all.
struct Node {
    card: OwnedFd,
    number: u16,
}

impl Node {
    /// Send a packet, and wait for what comes of it.
    fn hears(&mut self, to: Ipv4Addr, protocol: IpProtocol, ttl: u8, df: bool, payload: &[u8]) -> Heard {
        let sent = self.send(to, protocol, ttl, df, payload);
        self.next(&sent)
    }

    fn send(&mut self, to: Ipv4Addr, protocol: IpProtocol, ttl: u8, df: bool, payload: &[u8]) -> Vec<u8> {
        let mut bytes = common::ipv4(10, to, protocol, payload);
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        self.number += 1;
        packet.set_ident(self.number);
        packet.set_hop_limit(ttl);
        packet.set_dont_frag(df);
        packet.fill_checksum();
        common::send(&self.card, &common::packet(gateway_mac(), mac(10), 0x800, &bytes));
        bytes
    }

    /// The next that is heard, of that packet.
    fn next(&mut self, sent: &[u8]) -> Heard {
        loop {
            let got = common::receive(&self.card, common::LIMIT).expect("an answer");
            if let Some((from, message)) = icmp_of(&got) {
                let kind = u8::from(message.msg_type());
                if kind == 0 {
                    return Heard::Reply;
                }
                let bytes = message.into_inner();
                assert!(Icmpv4Packet::new_checked(bytes).unwrap().verify_checksum());
                let quoted = &bytes[8..];
                assert!(quoted.len() >= 28 && quoted == &sent[..quoted.len()], "{quoted:?} of {sent:?}");
                return Heard::Error(from, kind, bytes[1], u16::from_be_bytes([bytes[6], bytes[7]]));
            }
            let Ok(packet) = Ipv4Packet::new_checked(&got[26..]) else { continue };
            match packet.next_header() {
                IpProtocol::Tcp if TcpPacket::new_checked(packet.payload()).unwrap().rst() => {
                    return Heard::Reset;
                }
                IpProtocol::Udp => return Heard::Datagram(packet.payload().len() - 8),
                _ => {}
            }
        }
    }

    fn udp(&mut self, to: Ipv4Addr, ttl: u8, df: bool, len: usize) -> Heard {
        let total = (len as u16 + 8).to_be_bytes();
        let mut datagram = [[0x9c, 0x40], 33434u16.to_be_bytes(), total, [0, 0]].concat();
        datagram.resize(len + 8, b'x');
        self.hears(to, IpProtocol::Udp, ttl, df, &datagram)
    }

    fn echo(&mut self, to: Ipv4Addr, ttl: u8, number: u16) -> Heard {
        self.hears(to, IpProtocol::Icmp, ttl, false, &echo_request(number))
    }

    /// A SYN from always the same port, with always the same sequence number.
    fn syn(&mut self, to: Ipv4Addr, ttl: u8) -> Heard {
        let mut bytes = [7u16.to_be_bytes(), 9u16.to_be_bytes(), [0, 0], [0, 100]].concat();
        bytes.extend([0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
        self.hears(to, IpProtocol::Tcp, ttl, true, &bytes)
    }
}

fn echo_request(number: u16) -> Vec<u8> {
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: number, data: b"where?" };
    let mut bytes = vec![0; request.buffer_len()];
    let mut message = Icmpv4Packet::new_unchecked(bytes.as_mut_slice());
    request.emit(&mut message, &ChecksumCapabilities::default());
    bytes
}

fn time_exceeded(from: Ipv4Addr) -> Heard {
    Heard::Error(from, 11, 0, 0)
}

#[test]
fn each_router_on_the_way_is_seen() {
    if !routers::are_here("each_router_on_the_way_is_seen") {
        return;
    }
    let lab = Lab::start();
    let mut node = Node { card: lab.card("n10"), number: 0 };
    for (ttl, hop) in [(1, GATEWAY), (2, FIRST), (3, SECOND)] {
        assert_eq!(node.udp(TARGET, ttl, false, 12), time_exceeded(hop), "UDP, {ttl}");
        assert_eq!(node.echo(TARGET, ttl, ttl.into()), time_exceeded(hop), "ICMP, {ttl}");
        assert_eq!(node.syn(TARGET, ttl), time_exceeded(hop), "TCP, {ttl}");
    }
    assert_eq!(node.udp(TARGET, 4, false, 12), Heard::Error(TARGET, 3, 3, 0), "nobody listens");
    assert_eq!(node.echo(TARGET, 4, 4), Heard::Reply);
    assert_eq!(node.syn(TARGET, 4), Heard::Reset);
    lab.wait_for("the end of the TCP flows", |status| status.flows == 2);
}

#[test]
fn answers_to_many_probes_at_once_are_told_apart() {
    if !routers::are_here("answers_to_many_probes_at_once_are_told_apart") {
        return;
    }
    let lab = Lab::start();
    let mut node = Node { card: lab.card("n10"), number: 0 };
    for ttl in 2..5 {
        node.send(TARGET, IpProtocol::Icmp, ttl, false, &echo_request(ttl.into()));
    }
    let mut heard = Vec::new();
    while heard.len() < 3 {
        let got = common::receive(&node.card, common::LIMIT).expect("an answer");
        let Some((from, message)) = icmp_of(&got) else { continue };
        let bytes = message.into_inner();
        let number = if bytes[0] == 0 { bytes[7] } else { bytes[8 + 20 + 7] };
        heard.push((number, from, bytes[0]));
    }
    heard.sort_unstable();
    assert_eq!(heard, [(2, FIRST, 11), (3, SECOND, 11), (4, TARGET, 0)]);
}

#[test]
fn what_cannot_be_delivered_is_told_by_who_knows() {
    if !routers::are_here("what_cannot_be_delivered_is_told_by_who_knows") {
        return;
    }
    let lab = Lab::start();
    let mut node = Node { card: lab.card("n10"), number: 0 };
    let unreachable = Heard::Error(SECOND, 3, 1, 0);
    assert_eq!(node.udp(NOWHERE, 64, false, 12), unreachable);
    assert_eq!(node.echo(NOWHERE, 64, 1), unreachable);
    assert_eq!(node.syn(NOWHERE, 64), unreachable);
    assert_eq!(node.next(&[]), Heard::Reset, "for those who take errors lightly");
    lab.wait_for("the end of the TCP flow", |status| status.flows == 2);
}

#[test]
fn what_is_too_long_is_cut_or_told() {
    if !routers::are_here("what_is_too_long_is_cut_or_told") {
        return;
    }
    let lab = Lab::start();
    let mut node = Node { card: lab.card("n10"), number: 0 };
    let nobody_listens = Heard::Error(TARGET, 3, 3, 0);
    assert_eq!(node.udp(TARGET, 64, false, 1400), nobody_listens, "cut by the first router");
    assert_eq!(node.udp(TARGET, 64, true, 1400), Heard::Error(FIRST, 3, 4, 1300));
    assert_eq!(node.udp(TARGET, 64, true, 1400), Heard::Error(GATEWAY, 3, 4, 1300), "the host knows by now");
    assert_eq!(node.udp(TARGET, 64, true, 1200), nobody_listens);
    assert_eq!(node.udp(TARGET, 64, false, 1400), nobody_listens);
}

#[test]
fn the_gateway_is_no_hop_for_what_is_meant_for_it() {
    let lab = Lab::start();
    let mut node = Node { card: lab.card("n10"), number: 0 };
    assert_eq!(node.echo(GATEWAY, 1, 1), Heard::Reply);
    assert_eq!(node.udp(GATEWAY, 1, false, 12), Heard::Error(GATEWAY, 3, 3, 0));
    assert_eq!(node.echo(common::OUTSIDE, 0, 2), time_exceeded(GATEWAY));
    // Neither about an ICMP error nor about what is for many.
    let error = [11, 0, 0xf4, 0xff, 0, 0, 0, 0, 0x45, 0, 0, 28];
    for (to, protocol) in [(common::OUTSIDE, IpProtocol::Icmp), (ip(255), IpProtocol::Unknown(99))] {
        let mut bytes = common::ipv4(10, to, protocol, &error);
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        packet.set_hop_limit(1);
        packet.fill_checksum();
        common::send(&node.card, &common::packet(gateway_mac(), mac(10), 0x800, &bytes));
    }
    assert_eq!(node.echo(GATEWAY, 1, 3), Heard::Reply);
}
