//! Many long datagrams at once, as file servers and media send them: none is lost on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "what is skipped is told")]

mod common;
#[path = "common/process.rs"]
mod process;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    time::Instant,
};

use common::{GATEWAY, LIMIT, Lab, OUTSIDE, gateway_mac, ip, mac};
use lab_net::{
    config::{Forward, Protocol},
    fragment::Reassembly,
};
use rustix::process::Signal;
use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, IpProtocol, Ipv4Packet, UdpPacket};

const COUNT: usize = 50;
const LENGTH: usize = 8 << 10;

/// A datagram with its number.
fn datagram(n: usize) -> Vec<u8> {
    vec![n as u8; LENGTH]
}

/// Answer, as node n10, if a packet asks for its address.
fn answer_arp(card: &OwnedFd, packet: &[u8]) {
    let Ok(arp) = ArpPacket::new_checked(&packet[26..]).and_then(|arp| ArpRepr::parse(&arp)) else { return };
    let ArpRepr::EthernetIpv4 { target_protocol_addr, .. } = arp else { return };
    if packet[24..26] == [8, 6] && target_protocol_addr == ip(10) {
        say_arp(card, gateway_mac(), ArpOperation::Reply);
    }
}

fn say_arp(card: &OwnedFd, to: EthernetAddress, operation: ArpOperation) {
    let answer = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: mac(10),
        source_protocol_addr: ip(10),
        target_hardware_addr: to,
        target_protocol_addr: GATEWAY,
    };
    let mut bytes = [0; 28];
    answer.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    common::send(card, &common::packet(to, mac(10), 0x806, &bytes));
}

/// Take datagrams from n10's card until there are [`COUNT`], each of which must come once.
fn take_all(card: &OwnedFd) {
    let (mut table, mut got) = (Reassembly::default(), Vec::new());
    while got.len() < COUNT {
        let packet = common::receive(card, LIMIT);
        let packet = packet.unwrap_or_else(|| panic!("{} of {COUNT} datagrams came: {got:?}", got.len()));
        if packet[24..26] != [8, 0] {
            answer_arp(card, &packet);
            continue;
        }
        let Some(whole) = table.add(0, &Ipv4Packet::new_checked(&packet[26..]).unwrap(), Instant::now())
        else {
            continue;
        };
        let datagram = UdpPacket::new_checked(&whole[20..]).unwrap();
        assert_eq!(datagram.payload().len(), LENGTH);
        got.push(datagram.payload()[0]);
    }
    got.sort_unstable();
    assert_eq!(got, (0..COUNT as u8).collect::<Vec<_>>());
}

/// Send a datagram of n10's port 5000 in fragments.
fn send_fragments(card: &OwnedFd, to: Ipv4Addr, port: u16, ident: u16, payload: &[u8]) {
    let total = (payload.len() as u16 + 8).to_be_bytes();
    let datagram = [&[0x13, 0x88][..], &port.to_be_bytes(), &total, &[0, 0], payload].concat();
    let count = datagram.len().div_ceil(1480);
    for (n, piece) in datagram.chunks(1480).enumerate() {
        let mut bytes = common::ipv4(10, to, IpProtocol::Udp, piece);
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        packet.set_ident(ident);
        packet.set_dont_frag(false);
        packet.set_more_frags(n + 1 < count);
        packet.set_frag_offset(n as u16 * 1480);
        packet.fill_checksum();
        common::send(card, &common::packet(gateway_mac(), mac(10), 0x800, &bytes));
    }
}

/// Whether a socket gets room for so many datagrams that nobody takes.
fn there_is_room(test: &str) -> bool {
    let allowed = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap();
    let enough = allowed.trim().parse::<usize>().unwrap() >= 1 << 20 || rustix::process::geteuid().is_root();
    if !enough {
        eprintln!("SKIPPED: {test}: net.core.rmem_max is {}, and only root gets more", allowed.trim());
    }
    enough
}

#[test]
fn through_a_forward_while_the_network_has_other_things_to_do() {
    if !there_is_room("through_a_forward_while_the_network_has_other_things_to_do") {
        return;
    }
    let dir = process::folder();
    let process = process::start(dir.path());
    let host_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (bind, guest_ip, protocol) = (Ipv4Addr::LOCALHOST, ip(10), Protocol::Udp);
    let forward = Forward { bind, host_port, guest_ip, guest_port: 9, protocol };
    let reply = process::ask(&process.config, lab_net::control::Action::AddForward { forward });
    assert_eq!(reply, lab_net::control::Reply::Done);
    let card = common::card(&process.config.socket, "n10");
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    process.signal(Signal::STOP);
    for n in 0..COUNT {
        client.send_to(&datagram(n), ("127.0.0.1", host_port)).unwrap();
    }
    process.signal(Signal::CONT);
    // Nobody knows the node's address yet.
    take_all(&card);
}

#[test]
fn to_the_outside_and_back() {
    if !there_is_room("to_the_outside_and_back") {
        return;
    }
    let lab = Lab::start();
    let card = lab.card("n10");
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    lab_net::nat::datagrams::make_room(&server);
    let port = server.local_addr().unwrap().port();
    for n in 0..COUNT {
        send_fragments(&card, OUTSIDE, port, n as u16, &datagram(n));
    }
    let mut buffer = vec![0; LENGTH + 1];
    let mut peer: Option<SocketAddr> = None;
    for n in 0..COUNT {
        let (len, from) = server.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{n} came: {e}"));
        assert_eq!(buffer[..len], datagram(n));
        peer = Some(from);
    }
    for n in 0..COUNT {
        server.send_to(&datagram(n), peer.unwrap()).unwrap();
    }
    take_all(&card);
}

#[test]
fn of_nodes_that_send_at_the_same_time() {
    let lab = Lab::start();
    let cards = ["n10", "n11"].map(|name| lab.card(name));
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let port = server.local_addr().unwrap().port();
    // One of them begins many datagrams and ends none.
    let begun = common::ipv4(10, OUTSIDE, IpProtocol::Udp, &[0; 1480]);
    let begin = |ident| {
        let mut bytes = begun.clone();
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        packet.set_ident(ident);
        packet.set_dont_frag(false);
        packet.set_more_frags(true);
        packet.fill_checksum();
        common::send(&cards[1], &common::packet(gateway_mac(), mac(11), 0x800, &bytes));
    };
    let pieces = |from: usize, to: usize| {
        let datagram = [&[0x13, 0x88][..], &port.to_be_bytes(), &8008u16.to_be_bytes(), &[0, 0], &[7; 8000]];
        let datagram = datagram.concat();
        let mut bytes = common::ipv4(10, OUTSIDE, IpProtocol::Udp, &datagram[from..to]);
        let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
        packet.set_ident(7);
        packet.set_dont_frag(false);
        packet.set_more_frags(to < 8008);
        packet.set_frag_offset(from as u16);
        packet.fill_checksum();
        common::send(&cards[0], &common::packet(gateway_mac(), mac(10), 0x800, &bytes));
    };
    let received = |count: u64, port: &lab_net::control::Port| port.received[0] == count;
    pieces(0, 4000);
    lab.wait_for("the first piece", |status| status.ports.iter().any(|port| received(1, port)));
    (0..100).for_each(begin);
    lab.wait_for("the other's", |status| status.ports.iter().any(|port| received(100, port)));
    pieces(4000, 8008);
    let mut buffer = vec![0; 9000];
    let (len, _) = server.recv_from(&mut buffer).expect("the datagram");
    assert_eq!(buffer[..len], [7; 8000]);
}
