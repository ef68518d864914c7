//! The command itself: how it starts, ends, and what it leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/process.rs"]
mod process;

use std::{
    io::Write,
    net::{Ipv4Addr, UdpSocket},
    os::unix::net::UnixStream,
    process::Command,
};

use common::{GATEWAY, Guest};
use lab_net::{
    config::{Forward, NetworkConfig, Protocol},
    control::{Action, Reply},
};
use process::{ask, ended, folder, spawn, start};
use rustix::process::Signal;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol};

#[test]
fn it_starts_once_ends_on_a_signal_and_leaves_nothing() {
    let dir = folder();
    let mut first = start(dir.path());
    let second = ended(&mut spawn(dir.path(), &first.config));
    let lock = first.config.lock.display();
    assert_eq!(second, (false, format!("lab-net: the lab's network is running already: {lock} is locked\n")));
    assert!(matches!(ask(&first.config, Action::Status), Reply::Status(_)), "the first one goes on");
    first.signal(Signal::TERM);
    assert_eq!(first.ended(), (true, String::new()));
    assert!(!first.config.socket.exists() && !first.config.control.exists());
    let mut again = start(dir.path());
    assert_eq!(ask(&again.config, Action::Stop), Reply::Done);
    assert_eq!(again.ended(), (true, String::new()));
}

#[test]
fn a_killed_one_is_replaced() {
    let dir = folder();
    let mut killed = start(dir.path());
    killed.signal(Signal::KILL);
    assert!(!killed.ended().0);
    assert!(killed.config.socket.exists());
    let next = start(dir.path());
    assert!(matches!(ask(&next.config, Action::Status), Reply::Status(_)));
}

#[test]
fn a_forward_to_a_port_that_is_closed_is_told_of_once() {
    let dir = folder();
    let mut process = start(dir.path());
    let card = common::card(&process.config.socket, "n10");
    let host_port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (bind, guest_ip, protocol) = (Ipv4Addr::LOCALHOST, common::ip(10), Protocol::Udp);
    let forward = Forward { bind, host_port, guest_ip, guest_port: 53, protocol };
    assert_eq!(ask(&process.config, Action::AddForward { forward }), Reply::Done);
    // The node makes itself known.
    let hello = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 1, data: b"" };
    common::send_icmp(&card, 10, GATEWAY, &hello);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..3 {
        client.send_to(&[b'?'; 1000], ("127.0.0.1", host_port)).unwrap();
        let got = loop {
            let got = common::receive(&card, common::LIMIT).expect("the datagram");
            if got[26 + 9] == 17 {
                break got;
            }
        };
        // As short as RFC 792 has it.
        let mut message = [&[3, 3, 0, 0, 0, 0, 0, 0], &got[26..26 + 28]].concat();
        if n == 0 {
            // One that is about something else is passed over.
            message[8 + 20 + 3] = 54;
        }
        Icmpv4Packet::new_unchecked(message.as_mut_slice()).fill_checksum();
        let packet = common::ipv4(10, GATEWAY, IpProtocol::Icmp, &message);
        common::send(&card, &common::packet(common::gateway_mac(), common::mac(10), 0x800, &packet));
    }
    // All of it has been taken once this is answered.
    common::send_icmp(&card, 10, GATEWAY, &Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"" });
    loop {
        let got = common::receive(&card, common::LIMIT).expect("an answer");
        if common::icmp_of(&got).is_some_and(|(_, message)| message.echo_seq_no() == 2) {
            break;
        }
    }
    process.signal(Signal::TERM);
    let expected = format!(
        "lab-net: forward 127.0.0.1:{host_port}/udp to 10.77.0.10:53: nobody listens there, and who sends is not told. \
         Is the program up?\n"
    );
    assert_eq!(process.ended(), (true, expected));
}

#[test]
fn nobody_needs_to_listen_to_it() {
    let dir = folder();
    let mut process = start(dir.path());
    drop(process.child.stderr.take());
    let card = common::card(&process.config.socket, "n10");
    // A packet of which it complains.
    common::send(&card, &[0; 5]);
    let mut guest = Guest::new(card, 10);
    let (_, connected) = guest.connected(std::net::SocketAddrV4::new(GATEWAY, 53));
    assert!(connected);
}

#[test]
fn wrong_configurations_are_refused_in_words() {
    let dir = folder();
    let good = common::config(dir.path());
    type Change = fn(&mut NetworkConfig);
    let cases: [(Change, &str); 5] = [
        (|c| c.prefix = 31, "subnet 10.77.0.0/31: write a network address, with a prefix of 8 to 29 bits"),
        (
            |c| c.subnet = "10.77.0.5".parse().unwrap(),
            "subnet 10.77.0.5/24: write a network address, with a prefix of 8 to 29 bits",
        ),
        (
            |c| c.gateway = "10.78.0.1".parse().unwrap(),
            "gateway 10.78.0.1 is not an address of 10.77.0.0/24 that a host can have",
        ),
        (
            |c| c.hosts[0].ip = "10.78.0.9".parse().unwrap(),
            "node n10: 10.78.0.9 is not an address for a node in 10.77.0.0/24, whose gateway is 10.77.0.1",
        ),
        (
            |c| c.socket = "/x/y.sock".into(),
            "cannot use the folder /x: No such file or directory (os error 2)",
        ),
    ];
    for (change, message) in cases {
        let mut config = good.clone();
        change(&mut config);
        assert_eq!(ended(&mut spawn(dir.path(), &config)), (false, format!("lab-net: {message}\n")));
    }
    std::fs::write(dir.path().join("broken.json"), "{").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lab-net"))
        .arg("--config")
        .arg(dir.path().join("broken.json"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("broken.json: EOF while parsing"));
}

#[test]
fn three_nodes_and_their_flows_fit_into_16_mib() {
    let dir = folder();
    let process = start(dir.path());
    let config = &process.config;
    let mut guests: Vec<Guest> = (10..13)
        .map(|n| {
            let mut guest = Guest::unconfigured(common::card(&config.socket, &format!("n{n}")), n);
            guest.dhcp();
            guest
        })
        .collect();
    // Each has opened a hundred connections one after the other, and asked for a hundred names.
    for guest in &mut guests {
        for _ in 0..100 {
            let (handle, connected) = guest.connected(std::net::SocketAddrV4::new(GATEWAY, 53));
            assert!(connected);
            let mut query = vec![0, 0, 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3];
            query.extend(b"n11\0\0\x01\0\x01");
            query[1] = query.len() as u8 - 2;
            guest.tcp(handle).send_slice(&query).unwrap();
            guest.until("an answer", |guest| guest.tcp(handle).can_recv().then_some(()));
            guest.tcp(handle).close();
            guest.until("the end", |guest| (!guest.tcp(handle).is_active()).then_some(()));
            guest.sockets.remove(handle);
        }
    }
    // And streams go through it.
    let mut client = UnixStream::connect(&config.control).unwrap();
    let guest = &mut guests[0];
    let handle = guest.listen(7);
    client.write_all(b"{\"v\":1,\"do\":\"dial\",\"ip\":\"10.77.0.10\",\"port\":7}\n").unwrap();
    let data = common::noise(20 << 20, 9);
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&data).unwrap());
        let mut got = 0;
        guest.until("all of it", |guest| {
            while let Ok(len @ 1..) = guest.tcp(handle).recv(|bytes| (bytes.len(), bytes.len())) {
                got += len;
            }
            (got == data.len()).then_some(())
        });
    });
    let resident = process.resident_kib();
    assert!(resident < 16 << 10, "{resident} KiB");
    println!("{resident} KiB with three nodes");
}
