//! A network in a thread, and mock nodes: smoltcp behind a card's socket, with the offloads of a virtio card.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddrV4},
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use lab_net::{
    config::{Hello, Host, NetworkConfig},
    control::{Action, Reply, Request, VERSION},
    nat::Outside,
    network::Network,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType},
};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta},
    socket::{dhcpv4, tcp},
    wire::{
        EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpCidr, IpProtocol, Ipv4Cidr, Ipv4Packet,
        Ipv4Repr, TcpPacket,
    },
};

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(30);
/// An address outside that leads to 127.0.0.1.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// A running network.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub config: NetworkConfig,
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

pub fn host(n: u8) -> Host {
    Host { name: format!("n{n}"), mac: mac(n).to_string().replace('-', ":"), ip: ip(n) }
}

pub fn ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, n)
}

pub fn mac(n: u8) -> EthernetAddress {
    EthernetAddress([0x52, 0x54, 0, 0, 0, n])
}

/// A network with the nodes n10, n11 and n12.
pub fn config(dir: &std::path::Path) -> NetworkConfig {
    NetworkConfig {
        lab: "test".into(),
        subnet: Ipv4Addr::new(10, 77, 0, 0),
        prefix: 24,
        gateway: GATEWAY,
        socket: dir.join("net.sock"),
        control: dir.join("control.sock"),
        lock: dir.join("lock"),
        hosts: vec![host(10), host(11), host(12)],
        cache: None,
        forwards: Vec::new(),
    }
}

impl Lab {
    pub fn start() -> Lab {
        Lab::with(|_, _| {})
    }

    pub fn with(change: impl FnOnce(&mut NetworkConfig, &mut Outside)) -> Lab {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().permissions(private).tempdir().unwrap();
        let mut config = config(dir.path());
        let resolv_conf = dir.path().join("resolv.conf");
        std::fs::write(&resolv_conf, "nameserver 127.0.0.1\n").unwrap();
        let detours = [(OUTSIDE, Ipv4Addr::LOCALHOST)].into_iter().collect();
        let mut outside = Outside { resolv_conf, dns_port: 9, detours };
        change(&mut config, &mut outside);
        let (stop, stopped) = UnixStream::pair().unwrap();
        let network = Network::open(config.clone(), &outside, &stopped).unwrap();
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || {
            network.run().unwrap();
            drop(stopped);
        });
        let thread = thread.unwrap();
        Lab { dir, config, stop, thread: Some(thread) }
    }

    pub fn card(&self, name: &str) -> OwnedFd {
        card(&self.config.socket, name)
    }

    pub fn guest(&self, n: u8) -> Guest {
        Guest::new(self.card(&format!("n{n}")), n)
    }

    pub fn client(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(&self.config.control).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        BufReader::new(stream)
    }

    pub fn ask(&self, action: Action) -> Reply {
        ask(&mut self.client(), action)
    }

    /// Wait until the network says that `condition` holds.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&lab_net::control::Status) -> bool) {
        let start = Instant::now();
        loop {
            let Reply::Status(status) = self.ask(Action::Status) else { panic!("no status") };
            if condition(&status) {
                return;
            }
            assert!(start.elapsed() < LIMIT, "waited for {what}; last saw {status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the event loop lives: it must answer.
    pub fn assert_alive(&self) {
        assert!(matches!(self.ask(Action::Status), Reply::Status(_)));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.stop.write_all(b"x");
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap();
                assert!(!self.config.socket.exists(), "the socket's file stays behind");
            }
        }
    }
}

pub fn ask(client: &mut BufReader<UnixStream>, action: Action) -> Reply {
    let line = serde_json::to_string(&Request { v: VERSION, action }).unwrap();
    writeln!(client.get_mut(), "{line}").unwrap();
    read_reply(client)
}

pub fn read_reply(client: &mut BufReader<UnixStream>) -> Reply {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
}

/// Connect a card and say its name.
pub fn card(path: &PathBuf, name: &str) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    let hello = serde_json::to_vec(&Hello { v: 1, port: name.into() }).unwrap();
    rustix::net::send(&socket, &hello, SendFlags::empty()).unwrap();
    socket
}

/// Wait until the socket is ready for `flags`; false when the time is over.
pub fn wait(socket: &OwnedFd, flags: PollFlags, timeout: Duration) -> bool {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    rustix::event::poll(&mut [PollFd::new(socket, flags)], Some(&timeout)).unwrap() > 0
}

/// Next packet for a card; none when the time is over.
pub fn receive(socket: &OwnedFd, timeout: Duration) -> Option<Vec<u8>> {
    if !wait(socket, PollFlags::IN, timeout) {
        return None;
    }
    let mut packet = vec![0; 70000];
    let (len, _) = rustix::net::recv(socket, packet.as_mut_slice(), RecvFlags::DONTWAIT).ok()?;
    packet.truncate(len);
    Some(packet)
}

/// A mock node.
pub struct Guest {
    pub device: CardDevice,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
}

impl Guest {
    /// A node with the address of the lab's file, set by hand.
    pub fn new(socket: OwnedFd, n: u8) -> Guest {
        let mut guest = Guest::unconfigured(socket, n);
        guest.configure(Ipv4Cidr::new(ip(n), 24), GATEWAY);
        guest
    }

    pub fn unconfigured(socket: OwnedFd, n: u8) -> Guest {
        let mut device = CardDevice { socket, largest: 0 };
        let mut config = Config::new(HardwareAddress::Ethernet(mac(n)));
        config.random_seed = n.into();
        let iface = Interface::new(config, &mut device, smoltcp::time::Instant::ZERO);
        Guest { device, iface, sockets: SocketSet::new(Vec::new()), start: Instant::now() }
    }

    pub fn configure(&mut self, cidr: Ipv4Cidr, router: Ipv4Addr) {
        self.iface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(IpCidr::Ipv4(cidr)).unwrap();
        });
        self.iface.routes_mut().add_default_ipv4_route(router).unwrap();
    }

    pub fn poll(&mut self) {
        let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.iface.poll(now, &mut self.device, &mut self.sockets);
    }

    /// Poll until `done` has a value.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.poll();
            if let Some(value) = done(self) {
                self.poll();
                return value;
            }
            assert!(start.elapsed() < LIMIT, "waited for {what}");
            wait(&self.device.socket, PollFlags::IN, Duration::from_millis(5));
        }
    }

    /// Go on for a while, with everything that has been begun.
    pub fn linger(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.poll();
            wait(&self.device.socket, PollFlags::IN, Duration::from_millis(1));
        }
    }

    pub fn socket(&mut self) -> SocketHandle {
        let buffer = |room| tcp::SocketBuffer::new(vec![0; room]);
        // smoltcp 0.14 rounds a scaled window down, takes back what it has offered, and does not recover if both
        // directions are full by then. Linux does not take back; this needs no scale.
        let mut socket = tcp::Socket::new(buffer(65535), buffer(512 << 10));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.socket();
        self.tcp(handle).listen(port).unwrap();
        handle
    }

    pub fn connect(&mut self, to: SocketAddrV4) -> SocketHandle {
        static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(40000);
        let port = PORT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let handle = self.socket();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.iface.context(), (*to.ip(), to.port()), port).unwrap();
        handle
    }

    /// Connect, and wait until that has come to something: whether it is connected.
    pub fn connected(&mut self, to: SocketAddrV4) -> (SocketHandle, bool) {
        let handle = self.connect(to);
        let connected = self.until("a connection", |guest| match guest.tcp(handle).state() {
            tcp::State::SynSent => None,
            state => Some(state == tcp::State::Established),
        });
        (handle, connected)
    }

    /// Ask for an address by DHCP and take it: the address and the answer's options.
    pub fn dhcp(&mut self) -> (Ipv4Cidr, Option<Ipv4Addr>, Vec<Ipv4Addr>) {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let (cidr, router, dns) =
            self.until("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
                Some(dhcpv4::Event::Configured(config)) => {
                    Some((config.address, config.router, config.dns_servers.to_vec()))
                }
                _ => None,
            });
        self.configure(cidr, router.unwrap_or(GATEWAY));
        (cidr, router, dns)
    }
}

/// A card of a node, with segmentation offload both ways.
pub struct CardDevice {
    pub socket: OwnedFd,
    /// Longest packet received in bytes.
    pub largest: usize,
}

impl phy::Device for CardDevice {
    type RxToken<'t> = Received;
    type TxToken<'t> = Transmit<'t>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Transmit<'_>)> {
        // As a card: what cannot be answered is not taken. A loss is nothing that a lab's wire knows.
        if !wait(&self.socket, PollFlags::OUT, Duration::ZERO) {
            return None;
        }
        let mut packet = vec![0; 70000];
        let (len, _) = rustix::net::recv(&self.socket, packet.as_mut_slice(), RecvFlags::DONTWAIT).ok()?;
        packet.truncate(len);
        if len == 0 {
            return None;
        }
        self.largest = self.largest.max(len);
        check_offload(&packet);
        Some((Received(packet), Transmit { socket: &self.socket, segment_size: 0 }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmit<'_>> {
        wait(&self.socket, PollFlags::OUT, Duration::ZERO)
            .then_some(Transmit { socket: &self.socket, segment_size: 0 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.segmentation.tcpv4 = std::num::NonZeroUsize::new(65535);
        capabilities
    }
}

/// What a card's driver relies on when it completes a checksum and cuts a segment.
fn check_offload(packet: &[u8]) {
    let (header, frame) = packet.split_at(12);
    if header[0] & 1 == 0 {
        assert_eq!(header[1], 0, "segmentation without a checksum to complete");
        return;
    }
    assert_eq!(u16::from_le_bytes([header[6], header[7]]), 34, "csum_start");
    assert_eq!(u16::from_le_bytes([header[8], header[9]]), 16, "csum_offset");
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert!(ip.verify_checksum());
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    let mut sum = 6 + ip.payload().len() as u32;
    for pair in ip.src_addr().octets().chunks(2).chain(ip.dst_addr().octets().chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    assert_eq!(u32::from(tcp.checksum()), sum, "the pseudo header's sum");
    let segment_size = u16::from_le_bytes([header[4], header[5]]);
    if header[1] == 0 {
        assert!(ip.total_len() <= 1500, "{} bytes, and not to be cut", ip.total_len());
    } else {
        assert_eq!(header[1] & 0x7f, 1, "TCP over IPv4");
        assert!((1..=1460).contains(&segment_size));
        let headers = 14 + usize::from(ip.header_len()) + usize::from(tcp.header_len());
        assert_eq!(usize::from(u16::from_le_bytes([header[2], header[3]])), headers, "hdr_len");
    }
}

pub struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[12..])
    }
}

pub struct Transmit<'a> {
    socket: &'a OwnedFd,
    segment_size: u16,
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; 12 + len];
        let result = f(&mut packet[12..]);
        let is_tcp = packet[24..26] == [8, 0] && packet[12 + 14 + 9] == 6;
        if is_tcp {
            packet[0] = 1;
            packet[6..8].copy_from_slice(&34u16.to_le_bytes());
            packet[8..10].copy_from_slice(&16u16.to_le_bytes());
            if self.segment_size > 0 {
                packet[1] = 1;
                packet[4..6].copy_from_slice(&self.segment_size.to_le_bytes());
            }
        }
        let _ = rustix::net::send(self.socket, &packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_size = meta.segmentation_offload_size.map_or(0, std::num::NonZeroU16::get);
    }
}

/// Bytes that are unlike each other, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

/// The gateway's MAC address.
pub fn gateway_mac() -> EthernetAddress {
    let [a, b, c, d] = GATEWAY.octets();
    EthernetAddress([0x52, 0x55, a, b, c, d])
}

/// A packet with an empty virtio-net header.
pub fn packet(to: EthernetAddress, from: EthernetAddress, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend(to.as_bytes());
    packet.extend(from.as_bytes());
    packet.extend(ethertype.to_be_bytes());
    packet.extend(payload);
    packet
}

pub fn send(card: &OwnedFd, packet: &[u8]) {
    rustix::net::send(card, packet, SendFlags::NOSIGNAL).unwrap();
}

/// An IPv4 packet of node `n`.
pub fn ipv4(n: u8, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let header = Ipv4Repr {
        src_addr: ip(n),
        dst_addr: to,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut packet = vec![0; 20];
    packet.extend(payload);
    header.emit(&mut Ipv4Packet::new_unchecked(packet.as_mut_slice()), &ChecksumCapabilities::default());
    packet
}

/// Send an ICMP message of node `n` by way of the gateway.
pub fn send_icmp(card: &OwnedFd, n: u8, to: Ipv4Addr, message: &Icmpv4Repr) {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut Icmpv4Packet::new_unchecked(bytes.as_mut_slice()), &ChecksumCapabilities::default());
    send(card, &packet(gateway_mac(), mac(n), 0x800, &ipv4(n, to, IpProtocol::Icmp, &bytes)));
}

/// The ICMP message in a packet, and who sent it.
pub fn icmp_of(packet: &[u8]) -> Option<(Ipv4Addr, Icmpv4Packet<&[u8]>)> {
    if packet[24..26] != [8, 0] {
        return None;
    }
    let header =
        Ipv4Packet::new_checked(&packet[26..]).ok().filter(|ip| ip.next_header() == IpProtocol::Icmp)?;
    let length = usize::from(header.total_len());
    Some((header.src_addr(), Icmpv4Packet::new_checked(&packet[46..26 + length]).ok()?))
}
