//! The host reaches nodes: port forwards, and streams through the control socket.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io::{BufRead, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use common::{Guest, LIMIT, Lab, ip, noise, read_reply, receive};
use lab_net::{
    config::{Forward, Protocol},
    control::{Action, Reply},
    frame::HEADER_LEN,
    nat::Outside,
    network::Network,
};
use smoltcp::socket::{tcp, udp};

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn forward(host_port: u16, guest_port: u16, protocol: Protocol) -> Forward {
    Forward { bind: Ipv4Addr::LOCALHOST, host_port, guest_ip: ip(10), guest_port, protocol }
}

/// Run a node that sends back what it gets, until `stop`.
fn echo(mut guest: Guest, port: u16, stop: &AtomicBool) {
    let mut handles: Vec<_> = (0..4).map(|_| guest.listen(port)).collect();
    let mut buffer = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        guest.linger(Duration::from_millis(1));
        for handle in &mut handles {
            let socket = guest.tcp(*handle);
            loop {
                let room = socket.send_capacity() - socket.send_queue();
                buffer.clear();
                let got = socket.recv(|bytes| {
                    let len = bytes.len().min(room);
                    buffer.extend(&bytes[..len]);
                    (len, len)
                });
                if !matches!(got, Ok(1..)) {
                    break;
                }
                socket.send_slice(&buffer).unwrap();
            }
            match socket.state() {
                tcp::State::CloseWait if !socket.can_recv() && socket.send_queue() == 0 => socket.close(),
                tcp::State::Closed | tcp::State::TimeWait => *handle = guest.listen(port),
                _ => {}
            }
        }
    }
}

/// Do `work` while a node echoes at its port 7.
fn with_echo(lab: &Lab, work: impl FnOnce()) {
    let guest = lab.guest(10);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| echo(guest, 7, &stop));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Send ten megabytes and read them back, until the other side closes.
fn round_trip(mut stream: impl Read + Send, clone: impl Write + Send, half_close: impl FnOnce() + Send) {
    let data = noise(10 << 20, 2);
    std::thread::scope(|scope| {
        let data = &data;
        scope.spawn(move || {
            let mut clone = clone;
            clone.write_all(data).unwrap();
            half_close();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == *data, "{} bytes came back, or others", back.len());
    });
}

#[test]
fn ten_megabytes_go_through_a_forward_and_back() {
    let port = free_port();
    let lab = Lab::with(|config, _| config.forwards.push(forward(port, 7, Protocol::Tcp)));
    with_echo(&lab, || {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let other = stream.try_clone().unwrap();
        let third = stream.try_clone().unwrap();
        round_trip(stream, other, move || third.shutdown(std::net::Shutdown::Write).unwrap());
    });
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn a_refused_forward_closes_the_hosts_connection() {
    let port = free_port();
    let lab = Lab::with(|config, _| config.forwards.push(forward(port, 9, Protocol::Tcp)));
    let stop = AtomicBool::new(false);
    let guest = lab.guest(10);
    std::thread::scope(|scope| {
        scope.spawn(|| echo(guest, 7, &stop));
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let error = stream.read(&mut [0; 1]).unwrap_err();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn forwards_come_and_go_while_the_lab_runs() {
    let lab = Lab::start();
    let port = free_port();
    let added = forward(port, 7, Protocol::Tcp);
    with_echo(&lab, || {
        assert_eq!(lab.ask(Action::AddForward { forward: added.clone() }), Reply::Done);
        lab.wait_for("the forward", |status| status.forwards == [added.clone()]);
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"before").unwrap();
        stream.read_exact(&mut [0; 6]).unwrap();
        let Reply::Error(message) = lab.ask(Action::AddForward { forward: added.clone() }) else { panic!() };
        assert_eq!(
            message,
            format!(
                "cannot forward 127.0.0.1:{port}/tcp to 10.77.0.10:7: the port is in use. Choose another one, \
                 or end what listens there (`ss -lntup`)"
            )
        );
        assert_eq!(lab.ask(Action::RemoveForward { forward: added.clone() }), Reply::Done);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
        // What goes through it lives on.
        stream.write_all(b"after").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        let Reply::Error(message) = lab.ask(Action::RemoveForward { forward: added.clone() }) else {
            panic!()
        };
        assert_eq!(message, format!("127.0.0.1:{port}/tcp to 10.77.0.10:7 is not forwarded"));
    });
    let wrong = Forward { guest_ip: Ipv4Addr::new(192, 0, 2, 1), ..added };
    let Reply::Error(message) = lab.ask(Action::AddForward { forward: wrong }) else { panic!() };
    assert!(message.contains("not an address for a node in 10.77.0.0/24"), "{message}");
}

#[test]
fn a_port_in_use_stops_the_start_and_leaves_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let lab = Lab::start();
    let dir = lab.dir.path().join("other");
    std::fs::DirBuilder::new().create(&dir).unwrap();
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut config = common::config(&dir);
    config.forwards = vec![forward(free_port(), 1, Protocol::Tcp), forward(port, 7, Protocol::Tcp)];
    let (stop, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = Network::open(config.clone(), &Outside::default(), &stop).err().unwrap().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}/tcp")) && error.contains("in use"), "{error}");
    assert!(!config.socket.exists() && !config.control.exists());
    config.forwards.clear();
    Network::open(config, &Outside::default(), &stop).unwrap();
}

#[test]
fn datagrams_are_forwarded_for_each_peer() {
    let port = free_port();
    let lab = Lab::with(|config, _| config.forwards.push(forward(port, 53, Protocol::Udp)));
    let mut guest = lab.guest(10);
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(53).unwrap();
    let handle = guest.sockets.add(socket);
    let peers: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (n, peer) in peers.iter().enumerate() {
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        peer.send_to(&[n as u8], ("127.0.0.1", port)).unwrap();
    }
    let mut sources = Vec::new();
    guest.until("three datagrams", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        while let Ok((data, meta)) = socket.recv() {
            let data = [data, b"!"].concat();
            assert_eq!(meta.endpoint.addr, common::GATEWAY.into());
            sources.push(meta.endpoint);
            socket.send_slice(&data, meta.endpoint).unwrap();
        }
        (sources.len() == 3).then_some(())
    });
    for (n, peer) in peers.iter().enumerate() {
        let mut buffer = [0; 10];
        let (len, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from), (&[n as u8, b'!'][..], SocketAddr::from(([127, 0, 0, 1], port))));
    }
}

#[test]
fn a_control_client_becomes_a_stream() {
    let lab = Lab::start();
    with_echo(&lab, || {
        let mut client = lab.client();
        assert!(matches!(common::ask(&mut client, Action::Status), Reply::Status(_)));
        // The first bytes of the stream come right behind the request.
        let request = "{\"v\":1,\"do\":\"dial\",\"ip\":\"10.77.0.10\",\"port\":7}\nSSH-2.0-early\r\n";
        client.get_mut().write_all(request.as_bytes()).unwrap();
        assert_eq!(read_reply(&mut client), Reply::Done);
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        assert_eq!(line, "SSH-2.0-early\r\n");
        let other = client.get_ref().try_clone().unwrap();
        let third = other.try_clone().unwrap();
        round_trip(client, other, move || third.shutdown(std::net::Shutdown::Write).unwrap());
    });
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn a_dial_that_fails_says_why() {
    let lab = Lab::start();
    with_echo(&lab, || {
        let reply = lab.ask(Action::Dial { ip: ip(10), port: 8 });
        assert_eq!(reply, Reply::Error("10.77.0.10:8 refused the connection".into()));
        let reply = lab.ask(Action::Dial { ip: Ipv4Addr::new(192, 0, 2, 1), port: 8 });
        assert_eq!(reply, Reply::Error("192.0.2.1:8 is not a port of a node in 10.77.0.0/24".into()));
    });
    let reply = lab.ask(Action::Dial { ip: ip(50), port: 22 });
    let expected =
        "10.77.0.50:22 did not answer within 10 seconds: is the node up, and does a firewall there drop it?";
    assert_eq!(reply, Reply::Error(expected.into()));
    lab.wait_for("the end of the flows", |status| status.flows == 0);
}

#[test]
fn a_node_that_comes_back_is_asked_for_before_anything_is_sent_to_it() {
    let lab = Lab::start();
    let mut guest = lab.guest(10);
    let handle = guest.listen(7);
    let dial = |port: u16| {
        let mut client = lab.client();
        writeln!(client.get_mut(), r#"{{"v":1,"do":"dial","ip":"10.77.0.10","port":{port}}}"#).unwrap();
        client
    };
    let mut known = dial(7);
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    assert_eq!(read_reply(&mut known), Reply::Done);
    drop(guest);
    lab.wait_for("the end of its card", |status| status.ports.is_empty());

    let _waits = dial(22);
    lab.wait_for("the connection's beginning", |status| status.flows == 2);
    let card = lab.card("n10");
    let first = receive(&card, LIMIT).expect("nothing came");
    assert_eq!(first[HEADER_LEN + 12..][..2], [8, 6], "the first packet is no question of ARP's");
}

/// What a client of the host gets that reads only once the node has closed and has its last answer.
fn reads_late(node_closes_first: bool) {
    let lab = Lab::start();
    let mut guest = lab.guest(10);
    let handle = guest.listen(7);
    let mut client = lab.client();
    client.get_mut().write_all(b"{\"v\":1,\"do\":\"dial\",\"ip\":\"10.77.0.10\",\"port\":7}\n").unwrap();
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    assert_eq!(read_reply(&mut client), Reply::Done);
    // More than there is room for in a socket's buffer, and less than in that and the gateway's.
    let data = noise(350 << 10, 6);
    if !node_closes_first {
        client.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        guest.until("the client's end", |guest| (!guest.tcp(handle).may_recv()).then_some(()));
    }
    assert_eq!(guest.tcp(handle).send_slice(&data), Ok(data.len()));
    guest.tcp(handle).close();
    if node_closes_first {
        guest.until("the answer to the end", |guest| {
            (guest.tcp(handle).state() == tcp::State::FinWait2).then_some(())
        });
        client.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    }
    guest.until("the end", |guest| (!guest.tcp(handle).is_active()).then_some(()));
    guest.linger(Duration::from_millis(50));
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got == data, "{} bytes came, or others", got.len());
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn what_a_node_sends_after_the_hosts_end_is_not_lost() {
    reads_late(false);
}

#[test]
fn what_a_node_sends_before_its_end_is_not_lost() {
    reads_late(true);
}

#[test]
fn a_node_that_has_closed_and_reads_little_by_little_is_not_kept_waiting() {
    let lab = Lab::start();
    let mut guest = lab.guest(10);
    let buffer = |room| tcp::SocketBuffer::new(vec![0; room]);
    // A full window for each 4 KiB: 64 of them, each a second and more if it is not heard that there is room again.
    let handle = guest.sockets.add(tcp::Socket::new(buffer(4 << 10), buffer(4 << 10)));
    guest.tcp(handle).set_ack_delay(None);
    guest.tcp(handle).listen(7).unwrap();
    let mut client = lab.client();
    client.get_mut().write_all(b"{\"v\":1,\"do\":\"dial\",\"ip\":\"10.77.0.10\",\"port\":7}\n").unwrap();
    guest.until("the connection", |guest| guest.tcp(handle).may_send().then_some(()));
    assert_eq!(read_reply(&mut client), Reply::Done);
    guest.tcp(handle).close();
    guest.until("the answer to the end", |guest| {
        (guest.tcp(handle).state() == tcp::State::FinWait2).then_some(())
    });
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let data = noise(256 << 10, 7);
    client.get_mut().write_all(&data).unwrap();
    client.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    let mut got: Vec<u8> = Vec::new();
    guest.until("all of it, and the end", |guest| {
        let socket = guest.tcp(handle);
        if socket.recv_queue() == 4 << 10 || !socket.may_recv() {
            let _ = socket.recv(|bytes| (bytes.len(), got.extend(&*bytes)));
        }
        (!socket.is_active()).then_some(())
    });
    assert!(got == data);
    lab.wait_for("the end of the flow", |status| status.flows == 0);
}

#[test]
fn stop_ends_the_network() {
    let lab = Lab::start();
    let mut client = lab.client();
    assert_eq!(common::ask(&mut client, Action::Stop), Reply::Done);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}
