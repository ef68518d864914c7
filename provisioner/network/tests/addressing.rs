//! Nodes get their addresses and find each other by name: ARP, DHCP, DNS.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    time::Duration,
};

use common::{GATEWAY, Guest, Lab, OUTSIDE, host, ip};
use lab_net::control::{Action, Reply};
use smoltcp::{
    iface::SocketHandle,
    phy::ChecksumCapabilities,
    socket::udp,
    wire::{
        DhcpPacket, DnsPacket, DnsQuestion, DnsRecord, DnsRecordData, EthernetAddress, IpProtocol, Ipv4Cidr,
        Ipv4Packet, Ipv4Repr,
    },
};

const A: u16 = 1;
const AAAA: u16 = 28;

#[test]
fn nodes_get_the_addresses_of_the_file() {
    let lab = Lab::start();
    let mut guest = Guest::unconfigured(lab.card("n10"), 10);
    let (cidr, router, dns) = guest.dhcp();
    assert_eq!(cidr, Ipv4Cidr::new(ip(10), 24));
    assert_eq!((router, dns), (Some(GATEWAY), vec![GATEWAY]));
    lab.wait_for("the lease", |status| {
        status.ports.iter().any(|port| port.name == "n10" && port.leased == Some(ip(10)))
    });
}

#[test]
fn nodes_get_the_hosts_search_domains_if_they_ask_for_them() {
    let lab = Lab::with(|_, outside| {
        std::fs::write(&outside.resolv_conf, "search corp.example .\nnameserver 127.0.0.1\n").unwrap();
    });
    let card = lab.card("n10");
    let answers = |parameters: &[u8]| {
        let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4];
        message.resize(28, 0);
        message.extend(common::mac(10).as_bytes());
        message.resize(236, 0);
        message.extend([99, 130, 83, 99, 53, 1, 1, 55, parameters.len() as u8]);
        message.extend(parameters);
        message.push(255);
        let mut datagram = [[0, 68], [0, 67], (message.len() as u16 + 8).to_be_bytes(), [0, 0]].concat();
        datagram.extend(message);
        let header = Ipv4Repr {
            src_addr: Ipv4Addr::UNSPECIFIED,
            dst_addr: Ipv4Addr::BROADCAST,
            next_header: IpProtocol::Udp,
            payload_len: datagram.len(),
            hop_limit: 64,
        };
        let mut packet = vec![0; 20];
        packet.extend(datagram);
        header.emit(&mut Ipv4Packet::new_unchecked(packet.as_mut_slice()), &ChecksumCapabilities::default());
        let everyone = EthernetAddress::BROADCAST;
        common::send(&card, &common::packet(everyone, common::mac(10), 0x800, &packet));
        let got = common::receive(&card, common::LIMIT).expect("an offer");
        let offer = DhcpPacket::new_checked(&got[12 + 14 + 28..]).unwrap();
        let option =
            |kind| offer.options().find(|option| option.kind == kind).map(|option| option.data.to_vec());
        (option(15), option(119), option(42))
    };
    let (own, all) = (b"test.lab".to_vec(), b"\x04test\x03lab\0\x04corp\x07example\0".to_vec());
    assert_eq!(answers(&[1, 3, 15, 119]), (Some(own.clone()), Some(all), None));
    // The time is the gateway's, too.
    assert_eq!(answers(&[1, 3, 15, 42]), (Some(own), None, Some(GATEWAY.octets().to_vec())));
}

#[test]
fn the_gateway_tells_the_time() {
    let lab = Lab::start();
    let mut guest = lab.guest(10);
    let mut question = [0; 48];
    question[0] = 0x23;
    let answer = exchange_with(&mut guest, 123, &question);
    let seconds = u64::from(u32::from_be_bytes(answer[40..44].try_into().unwrap()));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!((seconds - 2_208_988_800).abs_diff(now) <= 60, "{seconds} {now}");
}

#[test]
fn unknown_cards_get_a_free_address() {
    let lab = Lab::start();
    let mut guest = Guest::unconfigured(lab.card("stranger"), 99);
    assert_eq!(guest.dhcp().0, Ipv4Cidr::new(ip(254), 24));
}

#[test]
fn a_node_that_joins_later_is_known_at_once() {
    let lab = Lab::start();
    let mut hosts = lab.config.hosts.clone();
    hosts.push(host(20));
    assert_eq!(lab.ask(Action::SetHosts { hosts: hosts.clone() }), Reply::Done);
    let mut guest = Guest::unconfigured(lab.card("n20"), 20);
    assert_eq!(guest.dhcp().0, Ipv4Cidr::new(ip(20), 24));
    assert_eq!(resolve(&mut guest, "n20", A), Ok(Some(ip(20))));
    hosts.push(host(20));
    let Reply::Error(message) = lab.ask(Action::SetHosts { hosts }) else { panic!("taken") };
    assert_eq!(message, "nodes n20 and n20 both have the name n20");
}

fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    query
}

/// The first address in a response, or its error code.
fn parse(response: &[u8]) -> Result<Option<Ipv4Addr>, u8> {
    let packet = DnsPacket::new_checked(response).unwrap();
    assert_eq!(packet.transaction_id(), 0x1234);
    let (rest, _) = DnsQuestion::parse(packet.payload()).unwrap();
    match u8::from(packet.rcode()) {
        0 if packet.answer_record_count() == 0 => Ok(None),
        0 => match DnsRecord::parse(rest).unwrap().1.data {
            DnsRecordData::A(ip) => Ok(Some(ip)),
            other => panic!("{other:?}"),
        },
        code => Err(code),
    }
}

fn udp_socket(guest: &mut Guest) -> SocketHandle {
    static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(6000);
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(PORT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)).unwrap();
    guest.sockets.add(socket)
}

fn exchange(guest: &mut Guest, query: &[u8]) -> Vec<u8> {
    exchange_with(guest, 53, query)
}

fn exchange_with(guest: &mut Guest, port: u16, query: &[u8]) -> Vec<u8> {
    let handle = udp_socket(guest);
    guest.sockets.get_mut::<udp::Socket>(handle).send_slice(query, (GATEWAY, port)).unwrap();
    guest.until("a response", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        socket.recv().ok().map(|(data, _)| data.to_vec())
    })
}

fn exchange_on_stream(guest: &mut Guest, handle: SocketHandle, name: &str) -> Vec<u8> {
    let query = query(name, A);
    let mut message = (query.len() as u16).to_be_bytes().to_vec();
    message.extend(query);
    guest.tcp(handle).send_slice(&message).unwrap();
    let mut got: Vec<u8> = Vec::new();
    guest.until("a response", |guest| {
        let _ = guest.tcp(handle).recv(|bytes| (bytes.len(), got.extend(&*bytes)));
        let len = usize::from(u16::from_be_bytes([*got.first()?, *got.get(1)?]));
        got.get(2..2 + len).map(<[u8]>::to_vec)
    })
}

fn resolve(guest: &mut Guest, name: &str, kind: u16) -> Result<Option<Ipv4Addr>, u8> {
    let response = exchange(guest, &query(name, kind));
    parse(&response)
}

#[test]
fn names_of_the_lab_are_answered_by_the_gateway() {
    let lab = Lab::start();
    let mut guest = lab.guest(10);
    assert_eq!(resolve(&mut guest, "n11", A), Ok(Some(ip(11))));
    assert_eq!(resolve(&mut guest, "N11.test.lab", A), Ok(Some(ip(11))));
    assert_eq!(resolve(&mut guest, "n11.test.lab", AAAA), Ok(None));
    assert_eq!(resolve(&mut guest, "gateway.test.lab", A), Ok(Some(GATEWAY)));
    assert_eq!(resolve(&mut guest, "n99.test.lab", A), Err(3));
}

/// A resolver on both protocols, which answers everything with 192.0.2.7.
fn resolver() -> (u16, std::thread::JoinHandle<()>) {
    let (datagrams, streams) = loop {
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        if let Ok(streams) = TcpListener::bind(datagrams.local_addr().unwrap()) {
            break (datagrams, streams);
        }
    };
    let port = datagrams.local_addr().unwrap().port();
    let respond = |query: &[u8]| {
        let mut response = query.to_vec();
        response[2] |= 0x80;
        response[7] = 1;
        response.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7]);
        response
    };
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        let (len, peer) = datagrams.recv_from(&mut buffer).unwrap();
        // A forged answer first: it has another number.
        let mut forged = respond(&buffer[..len]);
        forged[0] ^= 1;
        datagrams.send_to(&forged, peer).unwrap();
        datagrams.send_to(&respond(&buffer[..len]), peer).unwrap();
        let (mut stream, _) = streams.accept().unwrap();
        stream.read_exact(&mut buffer[..2]).unwrap();
        let len = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
        stream.read_exact(&mut buffer[..len]).unwrap();
        let mut response = respond(&buffer[..len]);
        // An answer that is too long for a datagram, and comes in two pieces.
        response.resize(20_000, 0);
        let mut message = (response.len() as u16).to_be_bytes().to_vec();
        message.extend(response);
        stream.write_all(&message[..9_999]).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        stream.write_all(&message[9_999..]).unwrap();
    });
    (port, thread)
}

#[test]
fn other_names_are_answered_by_the_hosts_resolver() {
    let (port, thread) = resolver();
    let lab = Lab::with(|_, outside| outside.dns_port = port);
    let mut guest = lab.guest(10);
    let outside = Ok(Some(Ipv4Addr::new(192, 0, 2, 7)));
    assert_eq!(resolve(&mut guest, "deb.debian.org", A), outside);
    // The same over TCP, after a name of the lab on the same connection.
    let (handle, connected) = guest.connected(SocketAddrV4::new(GATEWAY, 53));
    assert!(connected);
    let mut responses = Vec::new();
    for name in ["n12.test.lab", "deb.debian.org"] {
        responses.push(exchange_on_stream(&mut guest, handle, name));
    }
    assert_eq!(parse(&responses[0]), Ok(Some(ip(12))));
    assert_eq!(responses[1].len(), 20_000);
    assert_eq!(parse(&responses[1]), outside);
    guest.tcp(handle).close();
    guest.until("the end", |guest| (!guest.tcp(handle).is_active()).then_some(()));
    thread.join().unwrap();
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

/// A resolver at `ip` that answers two datagrams and two streams: with 192.0.2.7 if it `knows` the name, otherwise with
/// that error code.
fn resolver_that_knows(
    ip: &str,
    port: u16,
    knows: &'static str,
    code: u8,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let (datagrams, streams) = (UdpSocket::bind((ip, port))?, TcpListener::bind((ip, port))?);
    let respond = move |question: &[u8]| {
        let mut response = question.to_vec();
        response[2] |= 0x80;
        if question == query(knows, A) {
            response[7] = 1;
            response.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7]);
        } else {
            response[3] |= code;
        }
        response
    };
    Ok(std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        for _ in 0..2 {
            let (len, peer) = datagrams.recv_from(&mut buffer).unwrap();
            datagrams.send_to(&respond(&buffer[..len]), peer).unwrap();
        }
        for _ in 0..2 {
            let (mut stream, _) = streams.accept().unwrap();
            stream.read_exact(&mut buffer[..2]).unwrap();
            let len = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
            stream.read_exact(&mut buffer[..len]).unwrap();
            let response = respond(&buffer[..len]);
            stream.write_all(&(response.len() as u16).to_be_bytes()).unwrap();
            stream.write_all(&response).unwrap();
        }
    }))
}

#[test]
fn the_next_resolver_is_asked_where_one_fails() {
    let (port, threads) = loop {
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if let (Ok(first), Ok(second)) = (
            resolver_that_knows("127.0.0.1", port, "none", 5),
            resolver_that_knows("127.0.0.2", port, "deb.debian.org", 4),
        ) {
            break (port, [first, second]);
        }
    };
    let lab = Lab::with(|_, outside| {
        std::fs::write(&outside.resolv_conf, "nameserver 127.0.0.1\nnameserver 127.0.0.2\n").unwrap();
        outside.dns_port = port;
    });
    let mut guest = lab.guest(10);
    let outside = Ok(Some(Ipv4Addr::new(192, 0, 2, 7)));
    assert_eq!(resolve(&mut guest, "deb.debian.org", A), outside);
    assert_eq!(resolve(&mut guest, "debian.example", A), Err(4), "the last one's");
    let (handle, connected) = guest.connected(SocketAddrV4::new(GATEWAY, 53));
    assert!(connected);
    for (name, answer) in [("deb.debian.org", outside), ("debian.example", Err(4))] {
        assert_eq!(parse(&exchange_on_stream(&mut guest, handle, name)), answer);
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_resolver_that_is_not_there_is_a_failure_and_not_a_silence() {
    // Nobody listens at this port: the host refuses at once.
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let lab = Lab::with(|_, outside| outside.dns_port = unused);
    let mut guest = lab.guest(10);
    assert_eq!(resolve(&mut guest, "deb.debian.org", A), Err(2));
    std::fs::write(lab.dir.path().join("resolv.conf"), "").unwrap();
    assert_eq!(resolve(&mut guest, "deb.debian.org", A), Err(2));
}

#[test]
fn long_datagrams_cross_in_fragments() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let lab = Lab::start();
    let card = lab.card("n10");
    let to = server.local_addr().unwrap().port();
    let question = common::noise(3000, 4);
    let len = question.len() as u16 + 8;
    let mut datagram = [5000u16.to_be_bytes(), to.to_be_bytes(), len.to_be_bytes(), [0, 0]].concat();
    datagram.extend(&question);
    for (n, piece) in datagram.chunks(1480).enumerate() {
        let mut packet = common::ipv4(10, OUTSIDE, IpProtocol::Udp, piece);
        let mut header = Ipv4Packet::new_unchecked(packet.as_mut_slice());
        header.set_dont_frag(false);
        header.set_frag_offset(n as u16 * 1480);
        header.set_more_frags((n + 1) * 1480 < datagram.len());
        header.fill_checksum();
        common::send(&card, &common::packet(common::gateway_mac(), common::mac(10), 0x800, &packet));
    }
    let mut buffer = vec![0; 5000];
    server.set_read_timeout(Some(common::LIMIT)).unwrap();
    let (len, peer) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..len] == question);
    let data = common::noise(4000, 3);
    server.send_to(&data, peer).unwrap();
    let mut whole: Vec<u8> = Vec::new();
    loop {
        let packet = common::receive(&card, common::LIMIT).expect("a fragment");
        if packet[24..26] != [8, 0] {
            continue;
        }
        let ip = Ipv4Packet::new_checked(&packet[26..]).unwrap();
        assert!(ip.verify_checksum() && ip.total_len() <= 1500);
        assert_eq!(usize::from(ip.frag_offset()), whole.len());
        whole.extend(ip.payload());
        if !ip.more_frags() {
            break;
        }
    }
    assert!(whole[8..] == data);
}
