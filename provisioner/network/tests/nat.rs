//! Nodes reach the world outside: TCP, UDP and echo requests.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    time::Duration,
};

use common::{Lab, OUTSIDE, noise};
use smoltcp::{
    iface::SocketHandle,
    phy::ChecksumCapabilities,
    socket::{icmp, tcp, udp},
    wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, TcpPacket},
};

const SIZE: usize = 10 << 20;

fn server() -> (TcpListener, SocketAddrV4) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, SocketAddrV4::new(OUTSIDE, port))
}

/// Read until the other side has closed.
fn read_all(guest: &mut common::Guest, handle: SocketHandle) -> Vec<u8> {
    let mut data = Vec::new();
    guest.until("the end of the stream", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), data.extend(&*bytes))).unwrap();
        }
        (!socket.may_recv()).then_some(())
    });
    data
}

fn write_all(guest: &mut common::Guest, handle: SocketHandle, mut data: &[u8]) {
    guest.until("room to send", |guest| {
        let sent = guest.tcp(handle).send_slice(data).unwrap();
        data = &data[sent..];
        (data.is_empty()).then_some(())
    });
}

#[test]
fn ten_megabytes_go_out_and_come_back() {
    let lab = Lab::start();
    let (listener, address) = server();
    let data = noise(SIZE, 1);
    let expected = data.clone();
    let echo = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        assert!(peer.ip().is_loopback());
        let mut got = Vec::new();
        // Half close: the node says when it is done, and still reads.
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expected, "what the node sent has changed on its way");
        got.reverse();
        stream.write_all(&got).unwrap();
    });
    let mut guest = lab.guest(10);
    let (handle, connected) = guest.connected(address);
    assert!(connected);
    write_all(&mut guest, handle, &data);
    guest.tcp(handle).close();
    let mut back = read_all(&mut guest, handle);
    echo.join().unwrap();
    back.reverse();
    assert!(back == data, "what came back has changed on its way");
    assert!(
        guest.device.largest > 20_000,
        "segments come in one piece, not as {} bytes",
        guest.device.largest
    );
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn the_host_may_close_first() {
    let lab = Lab::start();
    let (listener, address) = server();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"bye").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let mut guest = lab.guest(10);
    let (handle, _) = guest.connected(address);
    assert_eq!(read_all(&mut guest, handle), b"bye");
    write_all(&mut guest, handle, b"see you");
    guest.tcp(handle).close();
    guest.until("the end", |guest| (!guest.tcp(handle).is_active()).then_some(()));
    assert_eq!(server.join().unwrap(), b"see you");
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn refusals_are_seen_as_refusals() {
    let lab = Lab::start();
    let (listener, address) = server();
    drop(listener);
    let mut guest = lab.guest(10);
    let (handle, connected) = guest.connected(address);
    assert!(!connected);
    assert_eq!(guest.tcp(handle).state(), tcp::State::Closed);
    lab.wait_for("the end of the flow", |status| status.flows == 0);
    // The gateway itself serves nothing but DNS.
    let (_, connected) = guest.connected(SocketAddrV4::new(common::GATEWAY, 22));
    assert!(!connected);
}

#[test]
fn the_first_packet_is_answered_by_the_refusal() {
    let lab = Lab::start();
    let (listener, address) = server();
    drop(listener);
    let card = lab.card("n10");
    for port in [address.port(), 9] {
        // A SYN from port 7 with sequence number 100.
        let mut syn = [7u16.to_be_bytes(), port.to_be_bytes(), [0, 0], [0, 100]].concat();
        syn.extend([0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
        let to = if port == 9 { common::GATEWAY } else { OUTSIDE };
        let packet = common::ipv4(10, to, IpProtocol::Tcp, &syn);
        common::send(&card, &common::packet(common::gateway_mac(), common::mac(10), 0x800, &packet));
        let answer = common::receive(&card, common::LIMIT).expect("an answer to the only SYN");
        let ip = Ipv4Packet::new_checked(&answer[26..]).unwrap();
        let reset = TcpPacket::new_checked(ip.payload()).unwrap();
        assert!(reset.rst() && reset.ack_number().0 == 101);
    }
}

#[test]
fn the_hosts_loopback_is_out_of_reach() {
    let lab = Lab::start();
    let (listener, address) = server();
    listener.set_nonblocking(true).unwrap();
    let mut guest = lab.guest(10);
    let handle = guest.connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, address.port()));
    guest.linger(Duration::from_millis(100));
    assert_eq!(guest.tcp(handle).state(), tcp::State::SynSent, "no answer but an ICMP message");
    assert!(listener.accept().is_err());
    lab.wait_for("no flow", |status| status.flows == 0);
}

#[test]
fn resets_cross_both_ways() {
    let lab = Lab::start();
    let (listener, address) = server();
    let mut guest = lab.guest(10);
    // The node's.
    let (handle, _) = guest.connected(address);
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    guest.poll();
    let error = stream.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // The host's.
    let (handle, _) = guest.connected(address);
    let (stream, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    guest.until("the reset", |guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    lab.wait_for("the end of the flows", |status| status.flows == 0);
}

#[test]
fn an_answer_comes_before_the_hosts_reset() {
    let lab = Lab::start();
    let (listener, address) = server();
    let answer = noise(40_000, 7);
    let mut guest = lab.guest(10);
    for _ in 0..10 {
        let (handle, _) = guest.connected(address);
        let (mut stream, _) = listener.accept().unwrap();
        write_all(&mut guest, handle, b"a question that is not read to its end");
        guest.until("the question", |_| (stream.peek(&mut [0; 100]).unwrap() > 0).then_some(()));
        stream.write_all(&answer).unwrap();
        drop(stream); // with unread input: a reset
        let mut got: Vec<u8> = Vec::new();
        guest.until("the reset", |guest| {
            let socket = guest.tcp(handle);
            let _ = socket.recv(|bytes| (bytes.len(), got.extend(&*bytes)));
            (socket.state() == tcp::State::Closed).then_some(())
        });
        assert!(got == answer, "{} bytes of the answer came", got.len());
    }
    lab.wait_for("the end of the flows", |status| status.flows == 0);
}

/// A SYN of n10 from port 7.
fn syn(card: &OwnedFd, to: SocketAddrV4, sequence: u32) {
    segment(card, to, [sequence, 0], 2);
}

/// A segment of n10 from port 7, without data.
fn segment(card: &OwnedFd, to: SocketAddrV4, [sequence, ack]: [u32; 2], flags: u8) {
    let mut bytes = [7u16.to_be_bytes(), to.port().to_be_bytes()].concat();
    bytes.extend([sequence.to_be_bytes(), ack.to_be_bytes()].concat());
    bytes.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let packet = common::ipv4(10, *to.ip(), IpProtocol::Tcp, &bytes);
    common::send(card, &common::packet(common::gateway_mac(), common::mac(10), 0x800, &packet));
}

/// The answer to a SYN with that sequence number: its own sequence number.
fn syn_ack(card: &OwnedFd, sequence: u32) -> u32 {
    loop {
        let answer = common::receive(card, Duration::from_secs(5)).expect("an answer to the SYN");
        let Ok(ip) = Ipv4Packet::new_checked(&answer[26..]) else { continue };
        let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { continue };
        if tcp.syn() && tcp.ack() && tcp.ack_number().0 as u32 == sequence + 1 {
            return tcp.seq_number().0 as u32;
        }
    }
}

#[test]
fn a_restarted_node_may_use_its_port_again() {
    let lab = Lab::start();
    let (listener, address) = server();
    let card = lab.card("n10");
    syn(&card, address, 100);
    let theirs = syn_ack(&card, 100);
    segment(&card, address, [101, theirs.wrapping_add(1)], 16);
    let (mut before, _) = listener.accept().unwrap();
    before.set_read_timeout(Some(common::LIMIT)).unwrap();
    // The same again is a copy of the first, and changes nothing.
    syn(&card, address, 100);
    lab.wait_for("the flow", |status| status.flows == 1);
    syn(&card, address, 70_000);
    let theirs = syn_ack(&card, 70_000);
    segment(&card, address, [70_001, theirs.wrapping_add(1)], 16);
    let (mut after, _) = listener.accept().unwrap();
    let error = before.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    after.set_nonblocking(true).unwrap();
    assert_eq!(after.read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    lab.wait_for("one flow", |status| status.flows == 1);
}

#[test]
fn a_node_that_does_not_read_stops_the_host() {
    let lab = Lab::start();
    let (listener, address) = server();
    let mut guest = lab.guest(10);
    let (handle, _) = guest.connected(address);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let chunk = [7; 1 << 16];
    let mut sent = 0;
    for _ in 0..200 {
        match stream.write(&chunk) {
            Ok(len) => sent += len,
            Err(_) => guest.linger(Duration::from_millis(5)),
        }
    }
    // Buffers of the host's socket (loopback: up to 6 MiB each way), of the gateway and of the node.
    assert!(sent < 40 << 20, "{sent} bytes were taken");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut guest, handle).len(), sent);
}

#[test]
fn many_connections_at_once() {
    let lab = Lab::start();
    let (listener, address) = server();
    let server = std::thread::spawn(move || {
        let mut streams = Vec::new();
        for _ in 0..200 {
            streams.push(listener.accept().unwrap().0);
        }
        for mut stream in streams {
            let mut got = [0; 4];
            stream.read_exact(&mut got).unwrap();
            stream.write_all(&got).unwrap();
        }
    });
    let mut guest = lab.guest(10);
    let handles: Vec<SocketHandle> = (0..200)
        .map(|_| {
            let handle = guest.connect(address);
            guest.poll();
            handle
        })
        .collect();
    for (n, handle) in handles.iter().enumerate() {
        guest.until("a connection", |guest| guest.tcp(*handle).may_send().then_some(()));
        write_all(&mut guest, *handle, &(n as u32).to_be_bytes());
    }
    for (n, handle) in handles.iter().enumerate() {
        assert_eq!(read_all(&mut guest, *handle), (n as u32).to_be_bytes());
        guest.tcp(*handle).close();
    }
    server.join().unwrap();
    guest.linger(Duration::from_millis(50));
    lab.wait_for("the end of the flows", |status| status.flows == 0);
}

fn udp_socket(guest: &mut common::Guest, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    guest.sockets.add(socket)
}

#[test]
fn datagrams_go_out_and_come_back() {
    let lab = Lab::start();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = lab.guest(10);
    let handle = udp_socket(&mut guest, 5000);
    let to = (IpAddress::Ipv4(OUTSIDE), port);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"question", to).unwrap();
    // A card of a busy machine may need a while to find the gateway, and does so only while it is looked after.
    server.set_nonblocking(true).unwrap();
    let mut buffer = [0; 100];
    let (len, peer) = guest.until("the question", |_| server.recv_from(&mut buffer).ok());
    assert_eq!(&buffer[..len], b"question");
    server.send_to(b"answer", peer).unwrap();
    let (data, from) = guest.until("the answer", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        socket.recv().ok().map(|(data, meta)| (data.to_vec(), meta.endpoint))
    });
    assert_eq!((data.as_slice(), from.port), (&b"answer"[..], port));
    assert_eq!(from.addr, IpAddress::Ipv4(OUTSIDE));
}

/// The reason of the next ICMP error for the node's UDP port.
fn unreachable(guest: &mut common::Guest, handle: SocketHandle) -> Icmpv4DstUnreachable {
    guest.until("an ICMP message", |guest| {
        let (data, _) = guest.sockets.get_mut::<icmp::Socket>(handle).recv().ok()?;
        let packet = Icmpv4Packet::new_checked(data).unwrap();
        match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap() {
            Icmpv4Repr::DstUnreachable { reason, .. } => Some(reason),
            _ => None,
        }
    })
}

fn icmp_socket(guest: &mut common::Guest, endpoint: icmp::Endpoint) -> SocketHandle {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(endpoint).unwrap();
    guest.sockets.add(socket)
}

#[test]
fn a_closed_udp_port_is_told() {
    let lab = Lab::start();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    drop(server);
    let mut guest = lab.guest(10);
    let errors = icmp_socket(&mut guest, icmp::Endpoint::Udp(5000.into()));
    let handle = udp_socket(&mut guest, 5000);
    guest
        .sockets
        .get_mut::<udp::Socket>(handle)
        .send_slice(b"hello?", (IpAddress::Ipv4(OUTSIDE), port))
        .unwrap();
    assert_eq!(unreachable(&mut guest, errors), Icmpv4DstUnreachable::PortUnreachable);
    let gateway = IpAddress::Ipv4(common::GATEWAY);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"hello?", (gateway, 99)).unwrap();
    assert_eq!(unreachable(&mut guest, errors), Icmpv4DstUnreachable::PortUnreachable);
    let loopback = IpAddress::Ipv4(Ipv4Addr::LOCALHOST);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"hello?", (loopback, 99)).unwrap();
    assert_eq!(unreachable(&mut guest, errors), Icmpv4DstUnreachable::NetProhibited);
}

/// Send an echo request from n10's card, and take the answer: its data, or why there is none.
fn ping(card: &OwnedFd, to: Ipv4Addr) -> Result<Vec<u8>, Icmpv4DstUnreachable> {
    let request = Icmpv4Repr::EchoRequest { ident: 0x22, seq_no: 7, data: b"are you there?" };
    common::send_icmp(card, 10, to, &request);
    loop {
        let packet = common::receive(card, common::LIMIT).expect("an answer");
        let Some((from, message)) = common::icmp_of(&packet) else { continue };
        match Icmpv4Repr::parse(&message, &ChecksumCapabilities::default()).unwrap() {
            Icmpv4Repr::EchoReply { ident: 0x22, seq_no: 7, data } => {
                assert_eq!(from, to);
                return Ok(data.to_vec());
            }
            Icmpv4Repr::DstUnreachable { reason, .. } => return Err(reason),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn pings_are_answered_or_refused_in_words() {
    let lab = Lab::start();
    let card = lab.card("n10");
    let answered = Ok(b"are you there?".to_vec());
    assert_eq!(ping(&card, common::GATEWAY), answered);
    let allowed = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        Some(rustix::net::ipproto::ICMP),
    )
    .is_ok();
    let expected = if allowed { answered } else { Err(Icmpv4DstUnreachable::CommProhibited) };
    assert_eq!(ping(&card, OUTSIDE), expected);
    assert_eq!(ping(&card, Ipv4Addr::LOCALHOST), Err(Icmpv4DstUnreachable::CommProhibited));
}

/// What a node gets from the gateway's cache for a request.
fn from_cache(guest: &mut common::Guest, request: &str) -> String {
    let gateway = SocketAddrV4::new(common::GATEWAY, lab_net::cache::PORT);
    let (handle, connected) = guest.connected(gateway);
    assert!(connected);
    write_all(guest, handle, request.as_bytes());
    guest.tcp(handle).close();
    String::from_utf8(read_all(guest, handle)).unwrap()
}

#[test]
fn two_nodes_fetch_a_package_once() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("packages");
    let lab = Lab::with(|config, _| config.cache = Some(cache.clone()));
    let (listener, address) = server();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n!<arch>\npackage").unwrap();
        drop(listener); // nobody asks again
    });
    let request = format!("GET http://{address}/pool/a.deb HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(from_cache(&mut lab.guest(10), &request).ends_with("\r\n\r\n!<arch>\npackage"));
    server.join().unwrap();
    assert!(from_cache(&mut lab.guest(11), &request).ends_with("\r\n\r\n!<arch>\npackage"));
    lab.wait_for("the end of the flows", |status| status.flows == 0);
    // Without a folder there is no such port.
    let lab = Lab::start();
    let (_, connected) = lab.guest(10).connected(SocketAddrV4::new(common::GATEWAY, lab_net::cache::PORT));
    assert!(!connected);
}
