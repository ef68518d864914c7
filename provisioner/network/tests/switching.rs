//! Frames between cards: learning, flooding, and cards that do not read, that come back, or that lie.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::{os::fd::OwnedFd, time::Duration};

use common::{Lab, mac, packet, receive, send};
use smoltcp::wire::EthernetAddress;

const TYPE: u16 = 0x88b5;
const SOON: Duration = Duration::from_millis(50);

/// Make the switch learn that `n` is at `card`, and take the frame from `others` again.
fn introduce(lab: &Lab, card: &OwnedFd, n: u8, others: &[&OwnedFd]) {
    wait_joined(lab, 1 + others.len());
    send(card, &packet(EthernetAddress::BROADCAST, mac(n), TYPE, b"hello"));
    for other in others {
        assert!(receive(other, common::LIMIT).unwrap().ends_with(b"hello"));
    }
}

fn wait_joined(lab: &Lab, count: usize) {
    lab.wait_for("the cards", |status| status.ports.len() == count);
}

#[test]
fn frames_go_where_their_station_is() {
    let lab = Lab::start();
    let cards = [lab.card("a"), lab.card("b"), lab.card("c")];
    let [a, b, c] = &cards;
    wait_joined(&lab, 3);
    // Nobody knows b yet: everyone but the sender gets it.
    send(a, &packet(mac(2), mac(1), TYPE, b"to b"));
    assert!(receive(b, common::LIMIT).unwrap().ends_with(b"to b"));
    assert!(receive(c, common::LIMIT).unwrap().ends_with(b"to b"));
    // Its answer makes it known.
    send(b, &packet(mac(1), mac(2), TYPE, b"to a"));
    assert!(receive(a, common::LIMIT).unwrap().ends_with(b"to a"));
    send(a, &packet(mac(2), mac(1), TYPE, b"to b alone"));
    assert!(receive(b, common::LIMIT).unwrap().ends_with(b"to b alone"));
    assert_eq!(receive(c, SOON), None);
    assert_eq!(receive(a, SOON), None);
    // A station that moves is found at its new port.
    send(c, &packet(mac(1), mac(2), TYPE, b"moved"));
    assert!(receive(a, common::LIMIT).unwrap().ends_with(b"moved"));
    send(a, &packet(mac(2), mac(1), TYPE, b"to the new place"));
    assert!(receive(c, common::LIMIT).unwrap().ends_with(b"to the new place"));
    assert_eq!(receive(b, SOON), None);
}

#[test]
fn a_large_segment_crosses_in_one_piece_with_its_header() {
    let lab = Lab::start();
    let (a, b) = (lab.card("a"), lab.card("b"));
    introduce(&lab, &b, 2, &[&a]);
    let mut segment = packet(mac(2), mac(1), 0x800, &common::noise(65_000, 5));
    segment[..12].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
    send(&a, &segment);
    let got = receive(&b, common::LIMIT).unwrap();
    segment[10] = 1;
    assert!(got == segment);
}

#[test]
fn a_newer_card_replaces_the_older_one() {
    let lab = Lab::start();
    let (a, old) = (lab.card("a"), lab.card("b"));
    introduce(&lab, &old, 2, &[&a]);
    let new = lab.card("b");
    assert_eq!(receive(&old, common::LIMIT), Some(Vec::new()), "the old connection ends");
    introduce(&lab, &new, 2, &[&a]);
    send(&a, &packet(mac(2), mac(1), TYPE, b"to the new b"));
    assert!(receive(&new, common::LIMIT).unwrap().ends_with(b"to the new b"));
    drop(new);
    wait_joined(&lab, 1);
}

#[test]
fn a_card_that_does_not_read_stops_nobody_else() {
    let lab = Lab::start();
    let (a, stuck, c) = (lab.card("a"), lab.card("stuck"), lab.card("c"));
    introduce(&lab, &stuck, 2, &[&a, &c]);
    introduce(&lab, &c, 3, &[&a, &stuck]);
    let frame = packet(mac(2), mac(1), TYPE, &[0; 60_000]);
    for _ in 0..200 {
        send(&a, &frame);
    }
    send(&a, &packet(mac(3), mac(1), TYPE, b"to c"));
    assert!(receive(&c, common::LIMIT).unwrap().ends_with(b"to c"));
    lab.wait_for("frames dropped for the one that does not read", |status| {
        status.ports.iter().any(|port| port.name == "stuck" && port.dropped > 50)
    });
    // It reads again, and is served again.
    let mut got = 0;
    while receive(&stuck, SOON).is_some() {
        got += 1;
    }
    assert!((5..150).contains(&got), "{got} frames had waited");
    send(&a, &packet(mac(2), mac(1), TYPE, b"welcome back"));
    assert!(receive(&stuck, common::LIMIT).unwrap().ends_with(b"welcome back"));
}

#[test]
fn a_fast_sender_waits_for_a_slow_reader() {
    let lab = Lab::start();
    let (a, b) = (lab.card("a"), lab.card("b"));
    introduce(&lab, &b, 2, &[&a]);
    const COUNT: usize = 500;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..COUNT as u32 {
                let mut frame = packet(mac(2), mac(1), TYPE, &[0; 30_000]);
                frame.extend(n.to_be_bytes());
                send(&a, &frame);
            }
        });
        for n in 0..COUNT as u32 {
            let frame = receive(&b, common::LIMIT).unwrap();
            assert_eq!(frame[frame.len() - 4..], n.to_be_bytes(), "nothing is lost, and nothing overtakes");
        }
    });
}

#[test]
fn cards_that_do_not_say_their_name_are_sent_away() {
    let lab = Lab::start();
    for hello in ["", "{}", "{\"v\":2,\"port\":\"a\"}", "{\"v\":1,\"port\":\"\"}", "\u{0}\u{0}\u{0}"] {
        let card = lab.card("x");
        wait_joined(&lab, 1);
        drop(card);
        let socket = nameless(&lab);
        if !hello.is_empty() {
            send(&socket, hello.as_bytes());
            assert_eq!(receive(&socket, common::LIMIT), Some(Vec::new()), "{hello:?}");
        }
    }
    wait_joined(&lab, 0);
}

fn nameless(lab: &Lab) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(&lab.config.socket).unwrap()).unwrap();
    socket
}

#[test]
fn packets_that_are_too_long_are_dropped() {
    let lab = Lab::start();
    let (a, b) = (lab.card("a"), lab.card("b"));
    introduce(&lab, &b, 2, &[&a]);
    send(&a, &packet(mac(2), mac(1), TYPE, &[0; 100_000]));
    send(&a, &[0; 5]);
    send(&a, &packet(mac(2), mac(1), TYPE, b"and on"));
    assert!(receive(&b, common::LIMIT).unwrap().ends_with(b"and on"));
}
