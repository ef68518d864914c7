//! What is refused, what waits, and what a guest that makes no sense can do.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::hostile;

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
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    guest.driver.send(2, &[], &[8]);
    let mut before = connect(&guest.config);
    before.write_all(b"CONNECT 22\n").unwrap();
    let (request, _) = guest.receive();
    let port = { request.source_port };
    guest.device.pause();
    let positions = guest.device.positions();
    let features = guest.device.features();
    let config = guest.config.clone();
    drop(guest.device);
    guest.device = Vsock::new(&config).unwrap();
    guest.device.activate(guest.driver.restored(features, &positions)).unwrap();
    assert_eq!(guest.driver.wait(2), 0u32.to_le_bytes(), "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    // And new ones are taken, with the buffers from before.
    let mut host = connect(&config);
    host.write_all(b"CONNECT 22\n").unwrap();
    let (request, _) = guest.receive();
    assert_eq!(({ request.operation }, { request.destination_port }), (operation::REQUEST, 22));
    assert_ne!({ request.source_port }, port, "the guest may have a socket for that");
    guest.device.reset();
}

#[test]
fn there_is_an_end_to_connections() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(folder.path());
    let listener = guest.listen(5000);
    // More than there may be (or than this process may have descriptors for), none of which the guest closes.
    let mut open = 0;
    for port in 0..1100 {
        guest.send(port, 5000, operation::REQUEST, 0, b"");
        if guest.answer_for(port) == operation::RESPONSE {
            open += 1;
            // Gone at once, but the guest has not said its last word.
            drop(listener.accept().unwrap());
            assert_eq!(guest.answer_for(port), operation::SHUTDOWN);
        }
    }
    assert_eq!(open, 1100, "connections that are over make place");
    // Those that are not over do not.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: limit.maximum.map(|most| most.min(5000)), ..limit },
    )
    .unwrap();
    let mut kept = Vec::new();
    for port in 2000..3100 {
        guest.send(port, 5000, operation::REQUEST, 0, b"");
        if guest.answer_for(port) == operation::RESPONSE {
            kept.push(listener.accept().unwrap());
        }
    }
    assert_eq!(kept.len(), 1024);
    // One ends, one can begin.
    guest.send(2007, 5000, operation::RESET, 0, b"");
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
    let port = prop_oneof![0u32..3, Just(5000), first_ports()];
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
