//! A guest made of packets, against UNIX sockets: both directions, credit, ends of all kinds, and limits.

use std::{
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    thread,
    time::Duration,
};

use proptest::prelude::*;
use vm_memory::ByteValued;

use super::{
    connection::{BUFFER, WORTH_TELLING},
    packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, STREAM, operation},
    *,
};
use crate::virtio::testing::{Driver, hostile};

const CID: u64 = 3;
const LIMIT: Duration = Duration::from_secs(20);
/// As Linux provides them.
const BUFFER_SIZE: usize = 4096;

fn config(folder: &Path) -> VsockConfig {
    VsockConfig { cid: CID as u32, socket: folder.join("vsock"), notify_port: Some(9999) }
}

/// A device and the guest's driver.
struct Guest {
    device: Vsock,
    driver: Driver,
    config: VsockConfig,
    /// What the guest says of its own buffers in every packet.
    room: u32,
    taken: u32,
}

impl Guest {
    fn new(folder: &Path) -> Self {
        let config = config(folder);
        let device = Vsock::new(&config).unwrap();
        let mut guest =
            Self { driver: Driver::new(device.queue_sizes()), device, config, room: 65536, taken: 0 };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.driver = Driver::new(self.device.queue_sizes());
        let features = self.device.features();
        self.device.activate(self.driver.activation(features)).unwrap();
        for _ in 0..64 {
            self.driver.send(0, &[], &[BUFFER_SIZE]);
        }
    }

    /// Sends a packet from port `from` of the guest to port `to` of the host.
    fn send(&mut self, from: u32, to: u32, operation: u16, flags: u32, data: &[u8]) {
        let header = Header {
            source_cid: CID,
            destination_cid: HOST,
            source_port: from,
            destination_port: to,
            length: data.len() as u32,
            kind: STREAM,
            operation,
            flags,
            buffer: self.room,
            forwarded: self.taken,
        };
        let mut readable = vec![header.as_slice()];
        readable.extend(data.chunks(1500));
        self.driver.send(1, &readable, &[]);
        self.driver.wait(1);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut packet = self.driver.wait(0);
        self.driver.send(0, &[], &[BUFFER_SIZE]);
        let data = packet.split_off(HEADER);
        let header = *Header::from_slice(&packet).unwrap();
        assert_eq!({ header.length } as usize, data.len());
        assert_eq!(({ header.source_cid }, { header.destination_cid }), (HOST, CID));
        assert_eq!(
            ({ header.kind }, { header.buffer }),
            (STREAM, if header.buffer == 0 { 0 } else { BUFFER as u32 })
        );
        (header, data)
    }

    fn expect(&mut self, operation: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!({ header.operation }, operation, "{header:?} {}", String::from_utf8_lossy(&data));
        (header, data)
    }

    /// A host that connects to `port`, greeted and answered; returns its stream and its port.
    fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = connect(&self.config);
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(operation::REQUEST);
        assert_eq!({ request.destination_port }, port);
        let host_port = request.source_port;
        self.send(port, host_port, operation::RESPONSE, 0, b"");
        assert_eq!(line(&mut stream), format!("OK {host_port}\n"));
        (stream, host_port)
    }

    /// A guest that connects from `from` to `port`, where `listener` is.
    fn connected_to(&mut self, listener: &UnixListener, from: u32, port: u32) -> UnixStream {
        self.send(from, port, operation::REQUEST, 0, b"");
        self.expect(operation::RESPONSE);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.config.socket.display())).unwrap()
    }
}

fn connect(config: &VsockConfig) -> UnixStream {
    let stream = UnixStream::connect(&config.socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Reads up to a line feed.
fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ i >> 7 ^ i >> 13) as u8).collect()
}

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut cid = [0; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let (mut stream, port) = guest.connected(22);
    stream.write_all(b"SSH-2.0-client\r\n").unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"SSH-2.0-client\r\n");
    guest.send(22, port, operation::DATA, 0, b"SSH-2.0-server\r\n");
    assert_eq!(line(&mut stream), "SSH-2.0-server\r\n");
    // The guest closes.
    guest.send(22, port, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.expect(operation::RESET);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.device.reset();
}

#[test]
fn what_follows_the_greeting_is_data() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut stream = connect(&guest.config);
    stream.write_all(b"CONN").unwrap();
    stream.write_all(b"ECT 22\nearly").unwrap();
    let (request, _) = guest.expect(operation::REQUEST);
    guest.send(22, request.source_port, operation::RESPONSE, 0, b"");
    assert_eq!(guest.expect(operation::DATA).1, b"early");
    guest.device.reset();
    assert!(line(&mut stream).starts_with("OK "));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "a reset ends all connections");
}

#[test]
fn greetings_that_make_no_sense_are_hung_up_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    for greeting in
        ["HELLO\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT -1\n", "CONNECT  22\n"]
    {
        let mut stream = connect(&guest.config);
        stream.write_all(greeting.as_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{greeting:?} was accepted");
    }
    let mut stream = connect(&guest.config);
    stream.write_all(&[b'x'; 100]).unwrap();
    // Unread data makes it a reset.
    assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    // Connections that come and go leave nothing behind, and are not shown to the guest.
    for _ in 0..100 {
        drop(connect(&guest.config));
    }
    guest.connected(22);
    guest.device.reset();
}

#[test]
fn a_port_where_nobody_listens_is_refused_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let mut stream = connect(&guest.config);
    stream.write_all(b"CONNECT 22\n").unwrap();
    let (request, _) = guest.expect(operation::REQUEST);
    guest.send(22, request.source_port, operation::RESET, 0, b"");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.send(1000, 5000, operation::REQUEST, 0, b"");
    let (refused, _) = guest.expect(operation::RESET);
    assert_eq!(({ refused.source_port }, { refused.destination_port }), (5000, 1000));
    // So is all that belongs to no connection, other hosts and other types; but not a reset.
    for operation in [operation::RESPONSE, operation::DATA, operation::SHUTDOWN, operation::CREDIT_UPDATE, 77]
    {
        guest.send(1, 2, operation, 0, b"");
        guest.expect(operation::RESET);
    }
    guest.send(1, 2, operation::RESET, 0, b"");
    let listener = guest.listen(5000);
    guest.connected_to(&listener, 1000, 5000);
    guest.device.reset();
}

#[test]
fn a_megabyte_and_more_each_way_through_the_credit() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    guest.driver.use_indirect();
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    let sent = pattern(3 << 20);

    // To the host: no more than the device says that it has room for.
    let mut reader = stream.try_clone().unwrap();
    let expected = sent.clone();
    let reading = thread::spawn(move || {
        let mut received = vec![0; expected.len()];
        reader.read_exact(&mut received).unwrap();
        assert!(received == expected);
    });
    let (mut offset, mut forwarded) = (0usize, 0u32);
    let mut updates = 0;
    while offset < sent.len() {
        let room = BUFFER - (offset - forwarded as usize);
        let part = &sent[offset..(offset + 20000.min(room)).min(sent.len())];
        if part.len() < 10000 && offset + part.len() < sent.len() {
            let (header, _) = guest.expect(operation::CREDIT_UPDATE);
            forwarded = header.forwarded;
            updates += 1;
        } else {
            guest.send(1000, 5000, operation::DATA, 0, part);
            offset += part.len();
        }
    }
    reading.join().unwrap();
    assert!(updates >= 10, "only {updates} updates");

    // To the guest: no more than it says that it has room for.
    let expected = sent.clone();
    let writing = thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream
    });
    let (mut received, mut asked) = (Vec::new(), 0);
    while received.len() < expected.len() {
        let (header, data) = guest.receive();
        match header.operation {
            operation::DATA => received.extend(data),
            operation::CREDIT_UPDATE => {}
            operation::CREDIT_REQUEST => {
                assert_eq!(received.len() as u32 - guest.taken, guest.room, "asked while there was room");
                asked += 1;
                guest.taken = received.len() as u32;
                guest.send(1000, 5000, operation::CREDIT_UPDATE, 0, b"");
            }
            other => panic!("operation {other}"),
        }
        assert!(received.len() as u32 - guest.taken <= guest.room, "more than there was room for");
    }
    assert!(received == expected);
    assert!(asked >= (3 << 20) / 65536 - 1, "asked {asked} times");
    drop(writing.join().unwrap());
    guest.device.reset();
}

#[test]
fn a_host_that_does_not_read_is_waited_for_and_a_guest_that_sends_on_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    let data = pattern(20000);
    // The socket takes some, the device keeps its window, and that is all.
    let mut sent = 0;
    let mut forwarded = 0;
    loop {
        guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        while {
            let (header, _) = guest.expect(operation::CREDIT_UPDATE);
            let more = header.forwarded != forwarded;
            forwarded = header.forwarded;
            more
        } {
            guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        }
        if sent + data.len() - forwarded as usize > BUFFER {
            break;
        }
        guest.send(1000, 5000, operation::DATA, 0, &data);
        sent += data.len();
    }
    // The host reads on: it gets all, and the guest gets room.
    let mut received = vec![0; sent];
    stream.read_exact(&mut received).unwrap();
    assert!(received.chunks(data.len()).all(|chunk| chunk == data));
    let (header, _) = guest.expect(operation::CREDIT_UPDATE);
    assert!(header.forwarded - forwarded >= WORTH_TELLING);

    let mut reset = false;
    for _ in 0..100 {
        guest.send(1000, 5000, operation::DATA, 0, &data);
        while let Some((_, packet)) = guest.driver.used(0) {
            let header = *Header::from_slice(&packet[..HEADER]).unwrap();
            reset |= header.operation == operation::RESET;
        }
    }
    assert!(reset, "a guest may send more than it has credit for");
    guest.device.reset();
}

#[test]
fn each_direction_ends_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    // The host first: it sends all, and still gets the answer.
    let (mut stream, port) = guest.connected(22);
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"question");
    assert_eq!({ guest.expect(operation::SHUTDOWN).0.flags }, NO_SEND);
    guest.send(22, port, operation::DATA, 0, b"answer\n");
    assert_eq!(line(&mut stream), "answer\n");
    guest.send(22, port, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.expect(operation::RESET);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    // The guest first.
    let (mut stream, port) = guest.connected(22);
    guest.send(22, port, operation::DATA, 0, b"question");
    guest.send(22, port, operation::SHUTDOWN, NO_SEND, b"");
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(operation::DATA).1, b"answer");
    // The host is gone altogether: the guest learns it once, after all data.
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.expect(operation::DATA).1, b"bye");
    let mut ended = 0;
    while ended != NO_SEND | NO_RECEIVE {
        ended |= { guest.expect(operation::SHUTDOWN).0.flags };
    }
    guest.send(22, port, operation::RESET, 0, b"");
    // Nothing is left of it.
    guest.send(22, port, operation::CREDIT_UPDATE, 0, b"");
    guest.expect(operation::RESET);
    guest.device.reset();
}

#[test]
fn what_was_sent_before_a_reset_arrives() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let listener = guest.listen(5000);
    let mut stream = guest.connected_to(&listener, 1000, 5000);
    // More than the socket takes (208 KiB by default), not more than the credit.
    let data = pattern(16 << 10);
    let mut sent = 0;
    let mut forwarded = 0;
    while sent - forwarded as usize + data.len() <= BUFFER && sent < 4 << 20 {
        guest.send(1000, 5000, operation::DATA, 0, &data);
        sent += data.len();
        guest.send(1000, 5000, operation::CREDIT_REQUEST, 0, b"");
        forwarded = guest.expect(operation::CREDIT_UPDATE).0.forwarded;
    }
    assert!((forwarded as usize) < sent, "the socket took everything: this tests nothing");
    guest.send(1000, 5000, operation::SHUTDOWN, NO_SEND | NO_RECEIVE, b"");
    guest.send(1000, 5000, operation::RESET, 0, b"");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);
    assert!(received.chunks(data.len()).all(|chunk| chunk == data));
    guest.device.reset();
}

#[test]
fn systemd_is_heard() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    for (port, message) in
        [(1, "READY=0\nSTATUS=begun\n"), (2, "READY=1\nX_SYSTEMD_UNIT_ACTIVE=ssh-access.target")]
    {
        guest.send(port, 9999, operation::REQUEST, 0, b"");
        guest.expect(operation::RESPONSE);
        guest.send(port, 9999, operation::DATA, 0, message.as_bytes());
        guest.send(port, 9999, operation::SHUTDOWN, NO_SEND, b"");
        guest.expect(operation::RESET);
    }
    let expected = ["READY=0", "STATUS=begun", "READY=1", "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target"];
    assert_eq!(guest.device.notified().lines(), expected);
    guest.device.reset();
    assert_eq!(guest.device.notified().lines().len(), 4);
    guest.activate();
    assert!(guest.device.notified().lines().is_empty(), "a guest that starts anew has said nothing");
}

#[test]
fn connections_wait_for_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let mut device = Vsock::new(&config).unwrap();
    // Before there is a driver at all, one that waits and some that give up.
    let mut patient = connect(&config);
    patient.write_all(b"CONNECT 22\n").unwrap();
    for _ in 0..50 {
        connect(&config).write_all(b"CONNECT 23\n").unwrap();
    }
    let mut driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features())).unwrap();
    driver.send(0, &[], &[BUFFER_SIZE]);
    let request = driver.wait(0);
    let request = *Header::from_slice(&request[..HEADER]).unwrap();
    assert_eq!(({ request.operation }, { request.destination_port }), (operation::REQUEST, 22));
    drop(device);
    assert_eq!(patient.read(&mut [0]).unwrap(), 0);
    assert!(!config.socket.exists());
}

#[test]
fn there_is_an_end_to_connections() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    // More than there may be, none of which is ever closed by the guest; notifications need no descriptor each.
    let mut open = 0;
    for port in 0..1100 {
        guest.send(port, 9999, operation::REQUEST, 0, b"");
        let (answer, _) = guest.receive();
        open += usize::from(answer.operation == operation::RESPONSE);
    }
    assert_eq!(open, 1024);
    // One ends, one can begin.
    guest.send(7, 9999, operation::RESET, 0, b"");
    guest.connected(22);
    guest.device.reset();
}

#[test]
fn a_guest_that_takes_no_answers_is_not_answered_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let mut device = Vsock::new(&config).unwrap();
    let mut driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features())).unwrap();
    let packet = Header {
        source_cid: CID,
        destination_cid: HOST,
        destination_port: 5,
        kind: STREAM,
        operation: operation::DATA,
        ..Header::default()
    };
    // The device takes 256 packets without giving an answer, then no more.
    for _ in 0..256 {
        driver.send(1, &[packet.as_slice()], &[]);
        driver.wait(1);
    }
    for _ in 0..10 {
        driver.send(1, &[packet.as_slice()], &[]);
        driver.ring(1);
    }
    // With buffers, all are answered.
    for _ in 0..266 {
        driver.send(0, &[], &[BUFFER_SIZE]);
        assert_eq!(driver.wait(0).len(), HEADER);
    }
    assert!(driver.used(0).is_none());
    device.reset();
}

#[test]
fn the_socket_is_private_and_one_machine_s() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    let first = Vsock::new(&config).unwrap();
    let mode = fs::metadata(&config.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Vsock::new(&config).err().unwrap().to_string();
    assert!(error.contains("another machine listens there"), "{error}");
    drop(first);
    // What a killed process leaves behind.
    drop(UnixListener::bind(&config.socket).unwrap());
    assert!(config.socket.exists());
    drop(Vsock::new(&config).unwrap());
    fs::write(&config.socket, "mine").unwrap();
    let error = Vsock::new(&config).err().unwrap().to_string();
    assert!(error.contains("another file is in the way"), "{error}");
    assert_eq!(fs::read_to_string(&config.socket).unwrap(), "mine");
    config.socket = folder.path().join("x".repeat(120));
    let error = Vsock::new(&config).err().unwrap().to_string();
    assert!(error.contains("longer than 107 bytes"), "{error}");
    config.cid = 2;
    assert!(Vsock::new(&config).err().unwrap().to_string().contains("start at 3"));
}

/// What a guest may say, sense or nonsense.
fn packets() -> impl Strategy<Value = Vec<(u32, u32, u16, u32, usize, u32, u32)>> {
    let port = prop_oneof![0u32..3, Just(9999), Just(5000), first_ports()];
    let credit = prop_oneof![Just(0u32), 0u32..100_000, any::<u32>()];
    prop::collection::vec(
        (0u32..3, port, 0u16..9, 0u32..5, prop_oneof![Just(0usize), 0usize..3000], credit.clone(), credit),
        0..60,
    )
}

fn first_ports() -> impl Strategy<Value = u32> {
    (1u32 << 30)..(1 << 30) + 3
}

proptest! {
    #[test]
    fn hostile_queues_do_not_matter(case in hostile(3)) {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let mut device = Vsock::new(&config).unwrap();
        let mut host = connect(&config);
        host.write_all(b"CONNECT 1\ndata").unwrap();
        let mut driver = Driver::new(&QUEUE_SIZES);
        let given = Given::new(NAME, driver.activation(case.features())).unwrap();
        driver.attack(&case, Muxer::new(given, device.host.take().unwrap()));
    }

    /// Packets in any order, with hosts that come, send and go: the device answers on, and ends.
    #[test]
    fn nonsense_packets_do_not_matter(packets in packets(), leave in 0usize..60) {
        let folder = tempfile::tempdir().unwrap();
        let mut guest = Guest::new(folder.path());
        let listener = guest.listen(5000);
        let mut hosts: Vec<UnixStream> = (0..3).map(|i| {
            let mut host = connect(&guest.config);
            host.write_all(format!("CONNECT {i}\n").as_bytes()).unwrap();
            host.write_all(&pattern(10000)).unwrap();
            host
        }).collect();
        for (index, (from, to, operation, flags, length, room, taken)) in packets.into_iter().enumerate() {
            (guest.room, guest.taken) = (room, taken);
            guest.send(from, to, operation, flags, &pattern(length));
            if index == leave {
                hosts.pop();
            }
            while guest.driver.used(0).is_some() {
                guest.driver.send(0, &[], &[BUFFER_SIZE]);
            }
        }
        // Still there.
        guest.send(77, 78, operation::DATA, 0, b"");
        loop {
            let (header, _) = {
                let mut packet = guest.driver.wait(0);
                guest.driver.send(0, &[], &[BUFFER_SIZE]);
                let data = packet.split_off(HEADER);
                (*Header::from_slice(&packet).unwrap(), data)
            };
            if ({ header.source_port }, { header.operation }) == (78, operation::RESET) {
                break;
            }
        }
        prop_assert!(!guest.driver.interrupt.told().needs_reset);
        drop(listener);
        guest.device.reset();
    }
}
