//! Frames against a server that stands for `lab-net`: bytes, sizes, back-pressure, and a link that comes and goes.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use proptest::prelude::*;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen,
        recv, send, socket_with,
    },
};

use super::*;
use crate::virtio::testing::{Driver, hostile};

const LIMIT: Duration = Duration::from_secs(20);

/// What stands for `lab-net`.
struct Server {
    listener: OwnedFd,
}

fn readable(fd: &OwnedFd) {
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "nothing came in {LIMIT:?}");
}

impl Server {
    fn new(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        Self { listener }
    }

    /// The next card, and its greeting.
    fn card(&self) -> (OwnedFd, serde_json::Value) {
        readable(&self.listener);
        let card = accept(&self.listener).unwrap();
        let hello = receive(&card);
        (card, serde_json::from_slice(&hello).unwrap())
    }
}

fn receive(card: &OwnedFd) -> Vec<u8> {
    readable(card);
    let mut packet = vec![0; 70000];
    let (length, _) = recv(card, &mut packet, RecvFlags::empty()).unwrap();
    packet.truncate(length);
    packet
}

fn config(folder: &Path) -> NetConfig {
    NetConfig { socket: folder.join("net.sock"), port: "node1".into(), mac: "52:54:00:00:00:01".into() }
}

/// A card with a driver at work on it.
struct Guest {
    device: Net,
    driver: Driver,
}

impl Guest {
    fn new(config: &NetConfig, features: u64) -> Self {
        let mut device = Net::new("net0", config).unwrap();
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(features)).unwrap();
        Self { device, driver }
    }

    fn link(&self) -> u8 {
        let mut status = [0; 2];
        self.device.read_config(6, &mut status);
        status[0]
    }

    fn wait_for_link(&self, up: u8) {
        self.driver.interrupt.wait("a change of the link", |_| self.link() == up);
    }

    /// Gives the card `count` receive buffers of `size` bytes.
    fn provide(&mut self, count: usize, size: usize) {
        for _ in 0..count {
            self.driver.send(0, &[], &[size]);
        }
    }

    /// One received packet, of as many buffers as its header says.
    fn receive(&mut self) -> (u16, Vec<u8>) {
        let mut packet = self.driver.wait(0);
        let buffers = u16::from_le_bytes([packet[10], packet[11]]);
        for _ in 1..buffers {
            packet.extend(self.driver.wait(0));
        }
        (buffers, packet)
    }
}

fn packet(seed: usize, length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..length).map(|i| (i.wrapping_mul(31) ^ i >> 8 ^ seed.wrapping_mul(7)) as u8));
    packet
}

/// The packet as the guest gets it: only `num_buffers` differs.
fn as_received(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

#[test]
fn frames_of_all_sizes_go_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, hello) = server.card();
    assert_eq!(hello, serde_json::json!({ "v": 1, "port": "node1" }));
    guest.wait_for_link(1);
    let mut mac = [0; 6];
    guest.device.read_config(0, &mut mac);
    assert_eq!(mac, [0x52, 0x54, 0, 0, 0, 1]);

    guest.provide(300, 1536);
    let sizes = [60, 1, 1514, 1524, 1525, 9000, 65535 + 18, 42, 30000];
    let mut bytes = 0;
    for (seed, size) in sizes.into_iter().enumerate() {
        let sent = packet(seed, size);
        // A few pieces, as Linux sends them.
        let (header, frame) = sent.split_at(HEADER);
        let pieces: Vec<&[u8]> = std::iter::once(header).chain(frame.chunks(16 << 10)).collect();
        guest.driver.send(1, &pieces, &[]);
        assert!(receive(&card) == sent, "a frame of {size} bytes was changed on its way out");
        guest.driver.wait(1);

        send(&card, &sent, SendFlags::empty()).unwrap();
        let (buffers, received) = guest.receive();
        assert_eq!(usize::from(buffers), (size + HEADER).div_ceil(1536));
        assert!(received == as_received(sent, buffers), "a frame of {size} bytes was changed on its way in");
        guest.provide(usize::from(buffers), 1536);
        bytes += size as u64;
    }
    let count = sizes.len() as u64;
    assert_eq!(guest.device.counters().read(), [count, bytes, count, bytes]);
    guest.device.reset();
    assert_eq!(guest.link(), 0);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    guest.driver.send(1, &[&[0; HEADER]], &[]);
    guest.driver.send(1, &[&packet(1, 30000), &packet(2, 40000)], &[]);
    guest.driver.send(1, &[], &[100]);
    guest.driver.send(1, &[&packet(3, 100)], &[]);
    assert!(receive(&card) == packet(3, 100));
    for _ in 0..4 {
        guest.driver.wait(1);
    }
    guest.device.reset();
}

#[test]
fn a_full_socket_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    guest.wait_for_link(1);
    // Far more than the socket holds, before the server reads anything.
    let total = 450;
    for seed in 0..total {
        guest.driver.send(1, &[&packet(seed, 20000)], &[]);
    }
    // The device must have filled the socket, and then wait.
    let first = receive(&card);
    assert!(first == packet(0, 20000));
    assert!(guest.driver.outstanding(1) > 100, "the socket took everything: this tests nothing");
    for seed in 1..total {
        assert!(receive(&card) == packet(seed, 20000), "frame {seed} is lost or changed");
    }
    while guest.driver.outstanding(1) > 0 {
        guest.driver.wait(1);
    }
    assert!(guest.driver.rung < total as u64 / 2, "{} bells for {total} frames", guest.driver.rung);
    guest.device.reset();
}

#[test]
fn what_a_paused_card_holds_goes_on_in_another_one() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    guest.wait_for_link(1);
    // More than the socket holds, so that the device has frames at hand that it cannot send; and buffers at hand that
    // wait for frames.
    guest.provide(100, 2000);
    send(&card, &packet(1, 100), SendFlags::empty()).unwrap();
    guest.receive();
    let total = 450;
    for seed in 0..total {
        guest.driver.send(1, &[&packet(seed, 20000)], &[]);
    }
    assert!(receive(&card) == packet(0, 20000));
    guest.device.pause();
    guest.device.pause();
    let positions = guest.device.positions();
    let taken = usize::from(positions[TRANSMIT as usize].0);
    assert_eq!(
        positions[TRANSMIT as usize].0, positions[TRANSMIT as usize].1,
        "all that was taken was given back"
    );
    assert!((1..total - 50).contains(&taken), "{taken} of {total} frames were sent: this tests nothing");
    for seed in 1..taken {
        assert!(receive(&card) == packet(seed, 20000), "frame {seed} of the first card");
    }
    drop(guest.device);
    let mut device = Net::new("net0", &config).unwrap();
    device.activate(guest.driver.restored(FEATURES, &positions)).unwrap();
    let mut guest = Guest { device, driver: guest.driver };
    assert_eq!(guest.link(), 1, "the guest need not see the link go");
    let (card, _) = server.card();
    for seed in taken..total {
        assert!(receive(&card) == packet(seed, 20000), "frame {seed} of the second card");
    }
    for seed in 0..90 {
        send(&card, &packet(seed, 1500), SendFlags::empty()).unwrap();
        assert!(guest.receive().1 == as_received(packet(seed, 1500), 1), "frame {seed} to the guest");
    }
    // One that only paused goes on itself.
    guest.device.pause();
    send(&card, &packet(5, 700), SendFlags::empty()).unwrap();
    guest.device.resume().unwrap();
    assert!(guest.receive().1 == as_received(packet(5, 700), 1));
    guest.device.reset();
    assert!(guest.device.positions().is_empty());
}

#[test]
fn a_paused_card_gives_no_buffer_back_twice() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    guest.wait_for_link(1);
    guest.provide(200, 2000);
    // Frames that come together: each has room for the longest one kept for it, so that buffers between them stay empty.
    guest.device.pause();
    for seed in 0..6 {
        send(&card, &packet(seed, 100), SendFlags::empty()).unwrap();
    }
    guest.device.resume().unwrap();
    let mut heads = Vec::new();
    for seed in 0..6 {
        let (head, received) = guest.driver.wait_head(0);
        assert!(received == as_received(packet(seed, 100), 1), "frame {seed}");
        heads.push(head);
    }
    let together = heads.windows(2).any(|pair| pair[0].abs_diff(pair[1]) > 1);
    assert!(together, "no frames came together: this tests nothing: {heads:?}");

    guest.device.pause();
    let positions = guest.device.positions();
    drop(guest.device);
    let mut device = Net::new("net0", &config).unwrap();
    device.activate(guest.driver.restored(FEATURES, &positions)).unwrap();
    let mut guest = Guest { device, driver: guest.driver };
    let (card, _) = server.card();
    // All buffers that are left, each once: the driver would not take one that it has not given.
    for seed in 6..200 {
        send(&card, &packet(seed, 100), SendFlags::empty()).unwrap();
        assert!(guest.receive().1 == as_received(packet(seed, 100), 1), "frame {seed}");
    }
    assert_eq!(guest.driver.outstanding(0), 0);
    guest.device.reset();
}

#[test]
fn without_buffers_frames_wait_in_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    let total = 60;
    for seed in 0..total {
        send(&card, &packet(seed, 100 + seed), SendFlags::empty()).unwrap();
    }
    for seed in 0..total {
        // One small buffer at a time: not enough for the longest packet, but for the next one.
        guest.provide(1, 256);
        let (buffers, received) = guest.receive();
        assert!(received == as_received(packet(seed, 100 + seed), buffers), "frame {seed}");
    }
    // A frame larger than the buffers that are there waits for more.
    send(&card, &packet(7, 1000), SendFlags::empty()).unwrap();
    guest.provide(2, 256);
    guest.provide(2, 256);
    let (buffers, received) = guest.receive();
    assert_eq!(buffers, 4);
    assert!(received == as_received(packet(7, 1000), 4));
    guest.device.reset();
}

#[test]
fn a_ring_full_of_small_buffers_does_not_stop_the_card() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, FEATURES);
    let (card, _) = server.card();
    guest.provide(512, 64);
    send(&card, &packet(1, 60000), SendFlags::empty()).unwrap();
    send(&card, &packet(2, 60), SendFlags::empty()).unwrap();
    let (buffers, received) = guest.receive();
    assert!(buffers == 2 && received == as_received(packet(2, 60), 2));
    guest.device.reset();
}

#[test]
fn the_link_follows_lab_net() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    // Nobody there yet: frames are dropped, and the ring goes on.
    let mut guest = Guest::new(&config, FEATURES);
    assert_eq!(guest.link(), 0);
    for seed in 0..600 {
        guest.driver.send(1, &[&packet(seed, 100)], &[]);
        guest.driver.wait(1);
    }
    for round in 0..3 {
        let server = Server::new(&config.socket);
        let (card, hello) = server.card();
        assert_eq!(hello["port"], "node1");
        guest.wait_for_link(1);
        assert!(guest.device.joined().load(Ordering::Relaxed));
        guest.driver.send(1, &[&packet(round, 1000)], &[]);
        assert!(receive(&card) == packet(round, 1000));
        guest.driver.wait(1);
        guest.provide(1, 2048);
        send(&card, &packet(round, 500), SendFlags::empty()).unwrap();
        assert!(guest.receive().1 == as_received(packet(round, 500), 1));
        drop((server, card));
        guest.wait_for_link(0);
        guest.driver.send(1, &[&packet(round, 100)], &[]);
        guest.driver.wait(1);
    }
    assert!(guest.driver.interrupt.told().config >= 6);
    // A server that dies with frames of the guest under way.
    let server = Server::new(&config.socket);
    let (card, _) = server.card();
    guest.wait_for_link(1);
    for seed in 0..400 {
        guest.driver.send(1, &[&packet(seed, 20000)], &[]);
    }
    drop((server, card));
    while guest.driver.outstanding(1) > 0 {
        guest.driver.wait(1);
    }
    guest.wait_for_link(0);
    guest.device.reset();
}

#[test]
fn a_card_is_activated_again_after_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut device = Net::new("net0", &config).unwrap();
    for round in 0..3 {
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(FEATURES)).unwrap();
        let (card, _) = server.card();
        driver.send(1, &[&packet(round, 64)], &[]);
        assert!(receive(&card) == packet(round, 64));
        device.reset();
        device.reset();
        assert!(receive(&card).is_empty(), "the card has not left");
    }
}

#[test]
fn guests_without_offloads_get_whole_checksums_and_no_large_segments() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let server = Server::new(&config.socket);
    let mut guest = Guest::new(&config, COMMON_FEATURES);
    let (card, _) = server.card();
    guest.provide(4, 2048);
    // An Ethernet and an IPv4 header's worth of bytes, then UDP whose checksum field holds the pseudo header's sum.
    let mut sent = packet(1, 34 + 8 + 5);
    sent[0] = 1; // NEEDS_CSUM
    sent[6..8].copy_from_slice(&34u16.to_le_bytes());
    sent[8..10].copy_from_slice(&6u16.to_le_bytes());
    let mut large = sent.clone();
    large[1] = 1; // a TCPv4 segment
    send(&card, &large, SendFlags::empty()).unwrap();
    send(&card, &sent, SendFlags::empty()).unwrap();
    let received = guest.driver.wait(0);
    assert_eq!(received.len(), sent.len());
    assert_eq!(received[0], 0);
    // Summed up with its pseudo header's sum in front, a whole UDP packet gives all ones.
    let udp = &received[HEADER + 34..];
    let pseudo = u64::from(u16::from_be_bytes([sent[HEADER + 40], sent[HEADER + 41]]));
    let mut sum: u64 = udp.chunks(2).map(|p| u64::from(p[0]) << 8 | u64::from(*p.get(1).unwrap_or(&0))).sum();
    sum += pseudo;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    assert_eq!(sum, 0xffff);
    // One that fits into no single buffer is lost, the next one is not.
    send(&card, &packet(2, 3000), SendFlags::empty()).unwrap();
    send(&card, &packet(3, 300), SendFlags::empty()).unwrap();
    assert!(guest.driver.wait(0) == as_received(packet(3, 300), 1));
    guest.device.reset();
}

#[test]
fn macs_are_checked() {
    let mut config = config(Path::new("/nowhere"));
    for bad in [
        "",
        "52:54:00:00:00",
        "52:54:00:00:00:0g",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
        "+2:54:00:00:00:1",
    ] {
        config.mac = bad.into();
        let error = Net::new("net0", &config).err().unwrap().to_string();
        assert!(error.contains(&format!("{bad:?} is not a MAC address")), "{error}");
    }
}

proptest! {
    #[test]
    fn hostile_queues_do_not_matter(case in hostile(2), joined: bool, packets in prop::collection::vec(0usize..3000, 0..5)) {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let server = joined.then(|| Server::new(&config.socket));
        let device = Net::new("net0", &config).unwrap();
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut handler = device.handler(Given::new("net0", driver.activation(case.features())).unwrap());
        if let Some(server) = &server {
            let poll = Poll::for_tests();
            handler.link.start(&poll).unwrap();
            let (card, _) = server.card();
            for length in packets {
                let _ = send(&card, &packet(1, length), SendFlags::DONTWAIT);
            }
        }
        driver.attack(&case, handler);
    }
}
