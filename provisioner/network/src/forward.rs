//! Port forwards: sockets of the host whose connections and datagrams lead to an address in the lab. To the node they
//! come from the gateway.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt},
};
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet, UdpPacket};

use crate::{
    config::{Forward, Protocol},
    hosts::Hosts,
    lan::Lan,
    log,
    nat::{
        datagrams::make_room,
        splice::{self, Opener},
        tcp::TcpFlows,
    },
    poller::{EventFlags, Token},
};

/// Most forwards.
const MAX_FORWARDS: usize = 1024;
/// Most peers of UDP forwards; when there are more, the one that was idle for longest is forgotten.
const MAX_PEERS: usize = 1024;
/// A peer of a UDP forward is forgotten when nothing was sent either way for so long.
const IDLE: Duration = Duration::from_secs(120);
/// Time for a node whose card is not joined: after a reset of the guest's, or a start of this process, a card is back within
/// a quarter of a second.
const JOIN_PATIENCE: Duration = Duration::from_secs(1);
/// Time between two looks for idle peers.
const SWEEP: Duration = Duration::from_secs(10);
/// Datagrams that are taken from one socket before others have their turn.
const BURST: usize = 64;
/// First port of the gateway for peers of UDP forwards.
const FIRST_PORT: u16 = 49152;
const BACKLOG: i32 = 128;

/// Why a forward was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another program has the port, or another forward.
    #[error(
        "cannot forward {0}: the port is in use. Choose another one, or end what listens there (`ss -lntup`)"
    )]
    InUse(String),
    /// The host refuses the port.
    #[error("cannot forward {forward}: {source}")]
    Bind {
        /// The forward.
        forward: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// The target is no address for a node.
    #[error("cannot forward {0}: that is not an address for a node in {1}")]
    Target(String, String),
    /// Port 0.
    #[error("cannot forward {0}: ports are numbers from 1 to 65535")]
    Port(String),
    /// More than [`MAX_FORWARDS`].
    #[error("cannot forward {0}: there are {MAX_FORWARDS} forwards already")]
    TooMany(String),
    /// There is no such forward.
    #[error("{0} is not forwarded")]
    Unknown(String),
}

#[derive(Debug)]
struct Listener {
    forward: Forward,
    socket: OwnedFd,
}

/// Somebody who has sent a datagram to a UDP forward, known to the node as one port of the gateway.
#[derive(Debug)]
struct Peer {
    listener: u64,
    address: SocketAddr,
    active: Instant,
}

/// The forwards.
#[derive(Debug)]
pub struct Forwards {
    listeners: BTreeMap<u64, Listener>,
    peers: HashMap<u16, Peer>,
    ports: HashMap<(u64, SocketAddr), u16>,
    next_port: u16,
    sweep: Option<Instant>,
    buffer: Vec<u8>,
}

/// A forward in words: `127.0.0.1:8080/tcp to 10.0.0.2:80`.
pub fn describe(forward: &Forward) -> String {
    let protocol = match forward.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{}:{}/{protocol} to {}", forward.bind, forward.host_port, target(forward))
}

fn target(forward: &Forward) -> SocketAddrV4 {
    SocketAddrV4::new(forward.guest_ip, forward.guest_port)
}

impl Default for Forwards {
    fn default() -> Forwards {
        Forwards {
            listeners: BTreeMap::new(),
            peers: HashMap::new(),
            ports: HashMap::new(),
            next_port: FIRST_PORT,
            sweep: None,
            buffer: vec![0; 65535],
        }
    }
}

impl Forwards {
    /// Open a forward.
    pub fn add(&mut self, forward: Forward, lan: &mut Lan) -> Result<(), Error> {
        let words = describe(&forward);
        if self.listeners.len() >= MAX_FORWARDS {
            return Err(Error::TooMany(words));
        }
        if forward.host_port == 0 || forward.guest_port == 0 {
            return Err(Error::Port(words));
        }
        if !lan.is_node(forward.guest_ip) {
            return Err(Error::Target(words, lan.cidr.network().to_string()));
        }
        let id = lan.new_id();
        let socket = listen(&forward)
            .map_err(std::io::Error::from)
            .and_then(|socket| {
                let flags = match forward.protocol {
                    // Edge-triggered, so that a connection that cannot be accepted does not keep the loop busy.
                    Protocol::Tcp => EventFlags::IN | EventFlags::ET,
                    Protocol::Udp => EventFlags::IN,
                };
                lan.poller.add(&socket, Token::Forward(id), flags)?;
                Ok(socket)
            })
            .map_err(|source| match source.kind() {
                std::io::ErrorKind::AddrInUse => Error::InUse(words.clone()),
                _ => Error::Bind { forward: words.clone(), source },
            })?;
        self.listeners.insert(id, Listener { forward, socket });
        Ok(())
    }

    /// Close a forward. Its TCP connections live on.
    pub fn remove(&mut self, forward: &Forward) -> Result<(), Error> {
        let found = self.listeners.iter().find(|(_, listener)| listener.forward == *forward);
        let id = *found.ok_or_else(|| Error::Unknown(describe(forward)))?.0;
        self.listeners.remove(&id);
        self.peers.retain(|_, peer| peer.listener != id);
        self.ports.retain(|(listener, _), _| *listener != id);
        Ok(())
    }

    /// The open forwards.
    pub fn list(&self) -> Vec<Forward> {
        self.listeners.values().map(|listener| listener.forward.clone()).collect()
    }

    /// Number of UDP flows.
    pub fn count(&self) -> usize {
        self.peers.len()
    }

    /// A listening socket has something.
    pub fn ready(&mut self, id: u64, hosts: &Hosts, tcp: &mut TcpFlows, lan: &mut Lan) {
        let Some(Listener { forward, socket }) = self.listeners.get(&id) else { return };
        let node = target(forward);
        match forward.protocol {
            Protocol::Tcp => loop {
                match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(connection) => {
                        let _ = sockopt::set_tcp_nodelay(&connection, true);
                        let absent = is_absent(forward.guest_ip, hosts, lan);
                        let patience = if absent { JOIN_PATIENCE } else { splice::PATIENCE };
                        tcp.connect(connection, (Opener::Forward, patience), node, Vec::new(), lan);
                    }
                    Err(Errno::AGAIN) => return,
                    Err(Errno::CONNABORTED | Errno::INTR) => {}
                    Err(e) => return log::warn(format_args!("forward {}: {e}", describe(forward))),
                }
            },
            Protocol::Udp => {
                for _ in 0..BURST {
                    if !self.take_datagram(id, node, lan) {
                        return;
                    }
                }
            }
        }
    }

    /// Take a datagram of a node for a port of the gateway. False if nobody waits for it there.
    pub fn input(&mut self, packet: &Ipv4Packet<&[u8]>, datagram: &UdpPacket<&[u8]>, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(&datagram.dst_port()) else { return false };
        let Some(Listener { forward, socket }) = self.listeners.get(&peer.listener) else { return false };
        if target(forward) != SocketAddrV4::new(packet.src_addr(), datagram.src_port()) {
            return false;
        }
        peer.active = now;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = rustix::net::sendto(socket, datagram.payload(), flags, &peer.address);
        true
    }

    /// Take an ICMP message of a node. If it says that nobody takes a forward's datagrams there, that is said: an ordinary
    /// socket has no way to tell it to the peer.
    pub fn refused(&self, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        let Ok(message) = Icmpv4Packet::new_checked(packet.payload()) else { return };
        let reason = Icmpv4DstUnreachable::from(message.msg_code());
        if (message.msg_type(), reason)
            != (Icmpv4Message::DstUnreachable, Icmpv4DstUnreachable::PortUnreachable)
        {
            return;
        }
        // Of the datagram, no more than its beginning is quoted: its length says nothing here.
        let data = message.data();
        let Some(header) = data.get(..20).map(Ipv4Packet::new_unchecked) else { return };
        let Some(&[a, b, c, d, ..]) = data.get(usize::from(header.header_len())..) else { return };
        let (from, to) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let listener = self.peers.get(&from).and_then(|peer| self.listeners.get(&peer.listener));
        if let Some(Listener { forward, .. }) = listener
            && (header.src_addr(), header.next_header()) == (lan.gateway(), IpProtocol::Udp)
            && target(forward) == SocketAddrV4::new(packet.src_addr(), to)
        {
            let words = describe(forward);
            lan.notices.happened(
                format_args!(
                    "forward {words}: nobody listens there, and who sends is not told. Is the program up?"
                ),
                lan.now,
            );
        }
    }

    /// When [`Forwards::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.sweep
    }

    /// Forget idle peers.
    pub fn expire(&mut self, now: Instant) {
        if self.sweep.is_some_and(|due| due <= now) {
            self.peers.retain(|_, peer| now.saturating_duration_since(peer.active) < IDLE);
            self.ports.retain(|_, port| self.peers.contains_key(port));
            self.sweep = (!self.peers.is_empty()).then_some(now + SWEEP);
        }
    }

    fn take_datagram(&mut self, id: u64, node: SocketAddrV4, lan: &mut Lan) -> bool {
        let Some(Listener { socket, .. }) = self.listeners.get(&id) else { return false };
        let received = rustix::net::recvfrom(socket, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT);
        let (len, address) = match received {
            Ok((len, _, Some(address))) => (len, address),
            // An error that the network reported about an earlier datagram.
            Ok((_, _, None)) | Err(Errno::CONNREFUSED | Errno::INTR) => return true,
            Err(_) => return false,
        };
        let Ok(address) = SocketAddr::try_from(address) else { return true };
        let Some(port) = self.port_of(id, address, lan) else { return true };
        let from = SocketAddrV4::new(lan.gateway(), port);
        lan.send_udp(from, node, self.buffer.get(..len).unwrap_or_default());
        true
    }

    /// The gateway's port for a peer.
    fn port_of(&mut self, listener: u64, address: SocketAddr, lan: &mut Lan) -> Option<u16> {
        let now = lan.now;
        if let Some(port) = self.ports.get(&(listener, address)) {
            self.peers.get_mut(port)?.active = now;
            return Some(*port);
        }
        if self.peers.len() >= MAX_PEERS
            && let Some((oldest, _)) = self.peers.iter().min_by_key(|(_, peer)| peer.active)
        {
            let oldest = *oldest;
            lan.notices.happened(
                format_args!("UDP forwards have {MAX_PEERS} peers, which is the most: for a new one, the one that was idle for longest is forgotten"),
                now,
            );
            self.peers.remove(&oldest);
            self.ports.retain(|_, port| *port != oldest);
        }
        // There are fewer peers than ports.
        while self.peers.contains_key(&self.next_port) {
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
        }
        let port = self.next_port;
        self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
        self.peers.insert(port, Peer { listener, address, active: now });
        self.ports.insert((listener, address), port);
        self.sweep.get_or_insert(now + SWEEP);
        Some(port)
    }
}

/// Whether nobody can be at an address: it is a node's whose card is not joined, or no card is, and nobody was heard there.
fn is_absent(ip: Ipv4Addr, hosts: &Hosts, lan: &Lan) -> bool {
    let mut cards = lan.switch.ports();
    let joined = match hosts.by_ip(ip) {
        Some(node) => cards.any(|card| hosts.by_name(&card.name) == Some(node)),
        None => cards.next().is_some(),
    };
    !joined && lan.neighbors.lookup(ip, lan.now).is_none()
}

fn listen(forward: &Forward) -> Result<OwnedFd, Errno> {
    let kind = match forward.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, flags, None)?;
    if forward.protocol == Protocol::Tcp {
        // A port whose last connections have just ended can be taken again.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    } else {
        make_room(&socket);
    }
    rustix::net::bind(&socket, &SocketAddrV4::new(forward.bind, forward.host_port))?;
    if forward.protocol == Protocol::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use smoltcp::wire::Ipv4Cidr;

    use super::*;
    use crate::{
        config::Host,
        dns::{resolvers::Resolvers, zone::Zone},
        nat::{Outside, stack::Stack, tcp::Names},
        port::Port,
    };

    const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    #[test]
    fn a_node_that_is_not_there_is_not_waited_for() {
        let mut lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 24)).unwrap();
        let node = |n: u8| Host {
            name: format!("n{n}"),
            mac: format!("52:54:00:00:00:0{n}"),
            ip: [10, 0, 0, n].into(),
        };
        let hosts = Hosts::new(vec![node(2), node(3)], &lan).unwrap();
        let mut tcp = TcpFlows::new(Stack::new(&mut lan, 1), Outside::default(), None, 8);
        let mut forwards = Forwards::default();
        let host_port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let forward = Forward {
            bind: Ipv4Addr::LOCALHOST,
            host_port,
            guest_ip: NODE,
            guest_port: 80,
            protocol: Protocol::Tcp,
        };
        forwards.add(forward, &mut lan).unwrap();
        let id = *forwards.listeners.keys().next().unwrap();
        let mut cards = Vec::new();
        let mut join = |name: &str, lan: &mut Lan| {
            let (card, end) = std::os::unix::net::UnixStream::pair().unwrap();
            cards.push(end);
            let port = Port::new(lan.new_id(), name.into(), card.into());
            lan.join(port);
        };
        let reset = |mut stream: TcpStream| {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream.read(&mut [0]).unwrap_err().kind() == std::io::ErrorKind::ConnectionReset
        };
        let mut resolvers = Resolvers::new("/none".into(), 9);
        // What is left of a connection to the forward, second by second.
        let mut watch = |lan: &mut Lan, seconds: usize| {
            let stream = TcpStream::connect(("127.0.0.1", host_port)).unwrap();
            forwards.ready(id, &hosts, &mut tcp, lan);
            let mut counts = Vec::new();
            for _ in 0..seconds {
                for ip in lan.expire() {
                    tcp.nobody_at(ip, lan.now);
                }
                tcp.expire(lan.now);
                let zone = Zone { domain: "test.lab", hosts: &hosts, cidr: lan.cidr };
                tcp.run(&mut Names { zone, resolvers: &mut resolvers }, lan);
                counts.push(tcp.count());
                lan.now += Duration::from_secs(1);
            }
            (stream, counts)
        };
        // Another node's card is no reason to wait.
        join("n3", &mut lan);
        let (stream, counts) = watch(&mut lan, 2);
        assert_eq!(counts, [1, 0]);
        assert!(reset(stream));
        // That it was asked for is forgotten.
        (0..3).for_each(|_| {
            lan.expire();
            lan.now += Duration::from_secs(1);
        });
        // It has a card, and nobody there answers: the fourth second is the end, and not the eleventh.
        join("n2", &mut lan);
        let (stream, counts) = watch(&mut lan, 4);
        assert_eq!(counts, [1, 1, 1, 0]);
        assert!(reset(stream));
    }
}
