//! One lab's network: all its parts, and the event loop that drives them.

use std::{
    collections::BTreeMap,
    fs::File,
    hash::{BuildHasher, Hasher, RandomState},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SocketFlags, SocketType, sockopt},
    process::{Resource, Rlimit},
};
use smoltcp::wire::Ipv4Cidr;

use crate::{
    cache::Cache,
    config::{Hello, NetworkConfig},
    control::{Action, Port as PortStatus, Reply, Request, Status},
    control_server::ControlServer,
    forward,
    frame::{Frame, MAX_PACKET},
    gateway::Gateway,
    hosts::{self, Hosts},
    lan::Lan,
    listen::{self, SocketFile},
    log,
    nat::{
        Outside,
        splice::{self, Opener},
    },
    poller::{EventFlags, Events, Token},
    port::Port,
    switch::MAX_PORTS,
};

/// Version of the frame protocol.
const FRAME_VERSION: u32 = 1;
/// Time for a card to say its name.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Most cards that have not said their names.
const MAX_NAMELESS: usize = 32;
/// Longest name of a port in bytes.
const MAX_NAME: usize = 64;
/// Packets that are taken from one card before others have their turn.
const BURST: usize = 64;
/// Room in bytes in the socket of a card, as far as the host allows it.
const CARD_BUFFER: usize = 2 << 20;
/// Descriptors that are not for flows.
const RESERVED_DESCRIPTORS: u64 = 512;

/// Why a network cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The subnet is no use.
    #[error("subnet {0}/{1}: write a network address, with a prefix of 8 to 29 bits")]
    Subnet(std::net::Ipv4Addr, u8),
    /// The gateway is not in the subnet.
    #[error("gateway {0} is not an address of {1} that a host can have")]
    Gateway(std::net::Ipv4Addr, String),
    /// A node is wrong.
    #[error(transparent)]
    Hosts(#[from] hosts::Error),
    /// A forward cannot be.
    #[error(transparent)]
    Forward(#[from] forward::Error),
    /// A socket or the lock cannot be had.
    #[error(transparent)]
    Listen(#[from] listen::Error),
    /// The host refuses something else.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

struct Nameless {
    socket: OwnedFd,
    since: Instant,
}

/// A network that is ready to run: its forwards are open and its sockets are there.
pub struct Network {
    config: NetworkConfig,
    lan: Lan,
    gateway: Gateway,
    control: ControlServer,
    cards: OwnedFd,
    nameless: BTreeMap<u64, Nameless>,
    buffer: Box<[u8]>,
    stopping: bool,
    _files: [SocketFile; 2],
    _lock: File,
}

impl Network {
    /// Open everything that `config` asks for. `stop` ends the network when it becomes readable.
    pub fn open(config: NetworkConfig, outside: &Outside, stop: impl AsFd) -> Result<Network, Error> {
        let cidr = subnet(&config)?;
        let io = |action| move |source| Error::Io { action, source };
        let mut lan = Lan::new(cidr).map_err(io("make an epoll instance"))?;
        let hosts = Hosts::new(config.hosts.clone(), &lan)?;
        let lock = listen::lock(&config.lock)?;
        let seed = RandomState::new().build_hasher().finish();
        let cache = config.cache.as_deref().map(|folder| Cache::new(folder, outside.clone()));
        let mut gateway = Gateway::new(&config.lab, hosts, outside, cache, descriptors(), seed, &mut lan);
        for forward in &config.forwards {
            gateway.forwards.add(forward.clone(), &mut lan)?;
        }
        let (cards, cards_file) = listen::unix(&config.socket, SocketType::SEQPACKET)?;
        let (control, control_file) = listen::unix(&config.control, SocketType::STREAM)?;
        let watch = io("watch a socket");
        lan.poller.add(&cards, Token::CardListener, EventFlags::IN).map_err(watch)?;
        lan.poller.add(&control, Token::ControlListener, EventFlags::IN).map_err(watch)?;
        lan.poller.add(stop, Token::Signal, EventFlags::IN).map_err(watch)?;
        Ok(Network {
            config,
            lan,
            gateway,
            control: ControlServer::new(control),
            cards,
            nameless: BTreeMap::new(),
            buffer: vec![0; MAX_PACKET].into_boxed_slice(),
            stopping: false,
            _files: [cards_file, control_file],
            _lock: lock,
        })
    }

    /// Run until a signal or a request ends it.
    pub fn run(mut self) -> Result<(), Error> {
        let mut events = Events::with_capacity(256);
        while !self.stopping {
            let timeout = self.deadline().map(|due| due.saturating_duration_since(Instant::now()));
            let waited = self.lan.poller.wait(&mut events, timeout);
            waited.map_err(|source| Error::Io { action: "wait for events", source })?;
            self.lan.now = Instant::now();
            for (token, flags) in events.iter() {
                self.event(token, flags);
            }
            self.expire();
            self.gateway.run(&mut self.lan);
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        let nameless = self.nameless.values().map(|card| card.since + HELLO_PATIENCE).min();
        [self.lan.deadline(), self.gateway.deadline(), nameless].into_iter().flatten().min()
    }

    fn expire(&mut self) {
        let now = self.lan.now;
        self.nameless.retain(|_, card| now.saturating_duration_since(card.since) < HELLO_PATIENCE);
        for ip in self.lan.expire() {
            self.gateway.tcp.nobody_at(ip, now);
        }
        self.gateway.expire(&mut self.lan);
    }

    fn event(&mut self, token: Token, flags: EventFlags) {
        let (gateway, lan) = (&mut self.gateway, &mut self.lan);
        match token {
            Token::CardListener => self.accept_cards(),
            Token::Card(id) if self.nameless.contains_key(&id) => self.hello(id),
            Token::Card(id) => self.card(id, flags),
            Token::ControlListener => self.control.accept(lan),
            Token::Client(id) => {
                self.control.ready(id, flags, &lan.poller);
                self.requests(id);
            }
            Token::Forward(id) => gateway.forwards.ready(id, &gateway.hosts, &mut gateway.tcp, lan),
            Token::Tcp(id) => gateway.tcp.ready(id, flags),
            Token::Udp(id) => gateway.udp.ready(id, lan),
            Token::Icmp(id) => gateway.icmp.ready(id, lan),
            Token::Dns(id) => gateway.relay.ready(id, &mut gateway.resolvers, lan),
            Token::Signal => self.stopping = true,
        }
    }

    fn accept_cards(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.cards, flags) {
            let id = self.lan.new_id();
            if self.nameless.len() < MAX_NAMELESS
                && self.lan.poller.add(&socket, Token::Card(id), EventFlags::IN).is_ok()
            {
                self.nameless.insert(id, Nameless { socket, since: self.lan.now });
            }
        }
    }

    /// A card says its name; one that does not is sent away.
    fn hello(&mut self, id: u64) {
        let Some(Nameless { socket, .. }) = self.nameless.get(&id) else { return };
        let mut packet = [0; 1024];
        let len = match rustix::net::recv(socket, &mut packet[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => len,
            Err(Errno::AGAIN) => return,
            Err(_) => 0,
        };
        let Some(Nameless { socket, .. }) = self.nameless.remove(&id) else { return };
        if len == 0 {
            return;
        }
        match serde_json::from_slice::<Hello>(packet.get(..len).unwrap_or_default()) {
            Ok(Hello { v: FRAME_VERSION, port }) if !port.is_empty() && port.len() <= MAX_NAME => {
                if self.lan.switch.ports().count() >= MAX_PORTS {
                    return log::warn(format_args!("card {port} cannot join: there are {MAX_PORTS} already"));
                }
                // The host may allow less; what it allows is used.
                let _ = sockopt::set_socket_send_buffer_size(&socket, CARD_BUFFER);
                self.lan.join(Port::new(id, port, socket));
            }
            Ok(Hello { v, port }) => {
                log::warn(format_args!(
                    "card {port:?} cannot join: it speaks version {v}, this is version {FRAME_VERSION}"
                ));
            }
            Err(e) => log::warn(format_args!("a card did not say its name: {e}")),
        }
    }

    /// A card has packets, or room for some.
    fn card(&mut self, id: u64, flags: EventFlags) {
        if flags.contains(EventFlags::OUT) {
            self.lan.switch.writable(id, &self.lan.poller);
        }
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        for _ in 0..BURST {
            let Some(port) = self.lan.switch.port(id) else { return };
            if port.held_for.is_some() && !hung_up {
                return;
            }
            let len = match port.receive(&mut self.buffer) {
                Ok(0) => return self.lan.leave(id),
                Ok(len) => len,
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return self.lan.leave(id),
            };
            // A length beyond the buffer's is that of a packet that was cut off.
            let packet = self.buffer.get_mut(..len).unwrap_or_default();
            match Frame::check(packet) {
                Ok(frame) => {
                    if self.lan.switch.forward(id, &frame, &self.lan.poller, self.lan.now) {
                        self.gateway.input(id, &frame, &mut self.lan);
                    }
                }
                Err(e) => {
                    if port.invalid == 0 {
                        log::warn(format_args!("card {} sends {e}; it and its like are dropped", port.name));
                    }
                    port.invalid = port.invalid.saturating_add(1);
                }
            }
        }
        if hung_up {
            self.lan.leave(id);
        }
    }

    /// Answer a control client's requests.
    fn requests(&mut self, id: u64) {
        while let Some(request) = self.control.next_request(id) {
            let reply = match request {
                Ok(Request { action: Action::Dial { ip, port }, .. }) => match self.dial(id, ip, port) {
                    Some(reply) => reply,
                    None => return,
                },
                Ok(Request { action, .. }) => self.answer(action),
                Err(message) => Reply::Error(message),
            };
            self.control.reply(id, &reply, &self.lan.poller);
        }
    }

    /// Turn a client's connection into a stream to a node; a reply tells why not.
    fn dial(&mut self, id: u64, ip: std::net::Ipv4Addr, port: u16) -> Option<Reply> {
        if !self.lan.is_node(ip) || port == 0 {
            let subnet = self.lan.cidr.network();
            return Some(Reply::Error(format!("{ip}:{port} is not a port of a node in {subnet}")));
        }
        let (socket, preface) = self.control.take(id, &self.lan.poller)?;
        let node = std::net::SocketAddrV4::new(ip, port);
        let opener = (Opener::Dial, splice::PATIENCE);
        self.gateway.tcp.connect(socket, opener, node, preface, &mut self.lan);
        None
    }

    fn answer(&mut self, action: Action) -> Reply {
        let forwards = &mut self.gateway.forwards;
        let done = match action {
            Action::Status => return Reply::Status(self.status()),
            Action::SetHosts { hosts } => Hosts::new(hosts, &self.lan)
                .map(|hosts| self.gateway.hosts = hosts)
                .map_err(|e| e.to_string()),
            Action::AddForward { forward } => forwards.add(forward, &mut self.lan).map_err(|e| e.to_string()),
            Action::RemoveForward { forward } => forwards.remove(&forward).map_err(|e| e.to_string()),
            Action::Stop => {
                self.stopping = true;
                Ok(())
            }
            Action::Dial { .. } => Err("a stream was asked for where none can be".into()),
        };
        done.map_or_else(Reply::Error, |()| Reply::Done)
    }

    fn status(&self) -> Status {
        let mut ports: Vec<PortStatus> = self
            .lan
            .switch
            .ports()
            .map(|port| PortStatus {
                name: port.name.clone(),
                leased: port.leased,
                received: port.received,
                sent: port.sent,
                dropped: port.dropped,
            })
            .collect();
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        Status {
            lab: self.config.lab.clone(),
            pid: std::process::id(),
            ports,
            forwards: self.gateway.forwards.list(),
            flows: u32::try_from(self.gateway.flows()).unwrap_or(u32::MAX),
        }
    }
}

fn subnet(config: &NetworkConfig) -> Result<Ipv4Cidr, Error> {
    let wrong = Error::Subnet(config.subnet, config.prefix);
    if !(8..=29).contains(&config.prefix) {
        return Err(wrong);
    }
    let cidr = Ipv4Cidr::new(config.gateway, config.prefix);
    let network = Ipv4Cidr::new(config.subnet, config.prefix).network();
    let [first, ..] = config.subnet.octets();
    if network.address() != config.subnet || first == 0 || first == 127 || first >= 224 {
        return Err(wrong);
    }
    let reserved = config.gateway == network.address() || Some(config.gateway) == network.broadcast();
    if !network.contains_addr(&config.gateway) || reserved {
        return Err(Error::Gateway(config.gateway, network.to_string()));
    }
    Ok(cidr)
}

/// Number of sockets for flows: as many as the host allows a process at most.
fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit { current: limit.maximum.or(limit.current), maximum: limit.maximum },
    );
    let now = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(now.saturating_sub(RESERVED_DESCRIPTORS)).unwrap_or(usize::MAX).clamp(64, 8192)
}
