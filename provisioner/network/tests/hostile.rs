//! Nodes that mean no good: the network lives, works for others, and stays small.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/process.rs"]
mod process;

use std::time::Duration;

use common::{Guest, mac, packet, receive, send};
use lab_net::control::{Action, Reply};
use process::{ask, folder, start};
use proptest::{prelude::*, test_runner::TestRunner};
use rustix::{
    io::Errno,
    net::{SendFlags, send as send_raw},
    process::Signal,
};
use smoltcp::wire::{EthernetAddress, IpProtocol};

/// A frame of which every layer may be wrong: random bytes at all depths, behind headers that lead there.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let bytes = |len| proptest::collection::vec(any::<u8>(), 0..len);
    let offload = prop_oneof![
        Just(vec![0; 12]),
        Just(vec![1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]),
        Just(vec![1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]),
        proptest::collection::vec(any::<u8>(), 12),
    ];
    let to = prop_oneof![Just(common::gateway_mac()), Just(EthernetAddress::BROADCAST), Just(mac(11))];
    let destination = prop_oneof![
        Just(common::GATEWAY.octets()),
        Just([255; 4]),
        Just(common::ip(11).octets()),
        // Outside, but nowhere: a load test talks to this machine alone.
        Just([127, 0, 0, 1]),
        Just([0, 0, 0, 0]),
    ];
    let ip = (destination, prop_oneof![Just(6u8), Just(17), Just(1), any::<u8>()], bytes(120), any::<u8>())
        .prop_map(|(to, protocol, payload, odd)| {
            let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 77, 0, 10];
            packet.extend(to);
            packet.extend(payload);
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            match odd {
                0..16 => packet[0] = odd | 0x40,
                16..32 => packet[6] = odd,
                32..48 => packet[3] = odd,
                48..64 if packet.len() > 24 => packet[22..24].copy_from_slice(&[0, 53]),
                64..80 if packet.len() > 24 => packet[22..24].copy_from_slice(&[0, 67]),
                80..120 if packet.len() > 40 => {
                    // A segment with its SYN bit, for the gateway's DNS server.
                    packet[20..24].copy_from_slice(&[odd, 1, 0, 53]);
                    packet[32..34].copy_from_slice(&[0x50, odd & 0x3f]);
                }
                _ => {}
            }
            packet
        });
    let frame = prop_oneof![
        (to.clone(), ip).prop_map(|(to, ip)| packet(to, mac(10), 0x800, &ip)[12..].to_vec()),
        (to, bytes(60)).prop_map(|(to, arp)| packet(to, mac(10), 0x806, &arp)[12..].to_vec()),
        bytes(100),
    ];
    (offload, frame).prop_map(|(offload, frame)| [offload, frame].concat())
}

#[test]
fn hostile_frames_break_nothing() {
    let dir = folder();
    let mut process = start(dir.path());
    let [card, other] = ["n10", "n11"].map(|name| common::card(&process.config.socket, name));
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&hostile(), |frame| {
            // An empty packet would be the end of the connection.
            if !frame.is_empty() {
                match send_raw(&card, &frame, SendFlags::NOSIGNAL) {
                    Ok(_) | Err(Errno::AGAIN) => {}
                    Err(e) => return Err(TestCaseError::fail(format!("{e}"))),
                }
            }
            for socket in [&card, &other] {
                while receive(socket, Duration::ZERO).is_some() {}
            }
            Ok(())
        })
        .unwrap();
    assert!(matches!(ask(&process.config, Action::Status), Reply::Status(_)));
    assert!(process.resident_kib() < 16 << 10, "{} KiB", process.resident_kib());
    // The network still works.
    let mut guest = Guest::new(common::card(&process.config.socket, "n12"), 12);
    let (_, connected) = guest.connected(std::net::SocketAddrV4::new(common::GATEWAY, 53));
    assert!(connected);
    process.signal(Signal::TERM);
    let (success, words) = process.ended();
    assert!(success && !words.contains("panicked") && words.lines().count() < 10, "{words}");
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let dir = folder();
    let mut process = start(dir.path());
    let card = common::card(&process.config.socket, "n10");
    for n in 0..6000u16 {
        let mut syn = [(n + 1).to_be_bytes(), [0, 53], [0, 0], [0, 1], [0, 0], [0, 0]].concat();
        syn.extend([0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
        let ip = common::ipv4(10, common::GATEWAY, smoltcp::wire::IpProtocol::Tcp, &syn);
        send(&card, &packet(common::gateway_mac(), mac(10), 0x800, &ip));
        while receive(&card, Duration::ZERO).is_some() {}
    }
    let Reply::Status(status) = ask(&process.config, Action::Status) else { panic!("no status") };
    assert!((100..=4096).contains(&status.flows), "{} flows", status.flows);
    assert!(process.resident_kib() < 240 << 10, "{} KiB", process.resident_kib());
    let mut guest = Guest::new(common::card(&process.config.socket, "n11"), 11);
    let (_, connected) = guest.connected(std::net::SocketAddrV4::new(common::GATEWAY, 53));
    assert!(connected);
    process.signal(Signal::TERM);
    let (success, words) = process.ended();
    assert!(success && !words.contains("panicked") && words.lines().count() < 10, "{words}");
    // It is not without a word that others lose theirs.
    assert!(words.contains(" TCP connections are open, which is the most: "), "{words}");
}

/// A TCP segment of node 10 for the gateway's DNS server.
fn segment(
    port: u16,
    [seq, ack]: [u32; 2],
    flags: u8,
    window: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = [port.to_be_bytes(), [0, 53]].concat();
    bytes.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    bytes.extend([0x50 + ((options.len() as u8 / 4) << 4), flags]);
    bytes.extend([window.to_be_bytes(), [0; 2], [0; 2]].concat());
    bytes.extend(options);
    bytes.extend(payload);
    let ip = common::ipv4(10, common::GATEWAY, IpProtocol::Tcp, &bytes);
    packet(common::gateway_mac(), mac(10), 0x800, &ip)
}

#[test]
fn hostile_segments_of_a_connection_break_nothing() {
    let dir = folder();
    let mut process = start(dir.path());
    let card = common::card(&process.config.socket, "n10");
    let near = || prop_oneof![-3..3i32, -70_000..70_000i32, any::<i32>()];
    let wild = || proptest::collection::vec(any::<[u8; 4]>(), 0..10).prop_map(|words| words.concat());
    let options = || prop_oneof![4 => Just(Vec::new()), 1 => wild()];
    let step = (
        near(),
        near(),
        any::<u8>(),
        any::<u16>(),
        options(),
        proptest::collection::vec(any::<u8>(), 0..300),
    );
    let steps = (any::<u32>(), any::<u16>(), options(), proptest::collection::vec(step, 0..60));
    let next_port = std::cell::Cell::new(1024u16);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 500,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&steps, |(first, window, options, steps)| {
            let port = next_port.get();
            next_port.set(port + 1);
            send(&card, &segment(port, [first, 0], 2, window, &options, &[]));
            let server = loop {
                // Options that are malformed get no answer.
                let Some(packet) = receive(&card, Duration::from_millis(20)) else { return Ok(()) };
                let Some(tcp) = packet.get(46..66) else { continue };
                if packet[24..26] == [8, 0] && tcp[..4] == [[0, 53], port.to_be_bytes()].concat() {
                    break u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                }
            };
            for (seq, ack, flags, window, options, payload) in steps {
                let seq = first.wrapping_add(1).wrapping_add_signed(seq);
                let ack = server.wrapping_add(1).wrapping_add_signed(ack);
                // Mostly an acknowledgement and nothing else, as otherwise the connection ends soon.
                let flags = if flags < 160 { 0x10 } else { flags };
                send(&card, &segment(port, [seq, ack], flags, window, &options, &payload));
                while receive(&card, Duration::ZERO).is_some() {}
            }
            Ok(())
        })
        .unwrap();
    let mut guest = Guest::new(common::card(&process.config.socket, "n11"), 11);
    let (_, connected) = guest.connected(std::net::SocketAddrV4::new(common::GATEWAY, 53));
    assert!(connected);
    process.signal(Signal::TERM);
    let (success, words) = process.ended();
    assert!(success && !words.contains("panicked"), "{words}");
}
