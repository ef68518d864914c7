//! All TCP flows through the gateway: connections of nodes to the outside and to the gateway's DNS server and
//! cache, and connections of forwards and control clients into the lab.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use smoltcp::{
    socket::tcp::State,
    wire::{Icmpv4DstUnreachable, Ipv4Packet, TcpPacket},
};

use super::{
    FlowKey, Outside,
    connect::{connect, tell_why, unreachable},
    splice::{HostSide, Opener, Outcome},
    stack::{Egress, FlowSocket, Stack},
};
use crate::{
    cache::{self, Cache},
    dns::{
        self,
        resolvers::Resolvers,
        stream::{Progress, Session},
        zone::Zone,
    },
    lan::Lan,
    poller::{EventFlags, Token},
};

/// Most flows; when there are more, the one that was silent for longest is closed.
const MAX_FLOWS: usize = 4096;
/// A node that has been out of reach for so long loses its flows.
const MAX_SILENCE: Duration = Duration::from_secs(900);
/// Time between two tries to reach a node whose path is blocked, besides those when it opens.
const RETRY: Duration = Duration::from_secs(2);
/// Longest SYN that is kept, in bytes: both headers with all their options.
const MAX_SYN: usize = 120;
/// First port of the gateway for connections into the lab.
const FIRST_PORT: u16 = 49152;

/// What is on the other side of a flow.
enum Peer {
    Host(HostSide),
    Dns(Session),
}

impl Peer {
    /// Whether the node's SYN is not to be answered yet.
    fn is_connecting(&self) -> bool {
        matches!(self, Peer::Host(host) if host.is_host_connecting())
    }
}

struct Flow {
    key: FlowKey,
    socket: FlowSocket,
    peer: Peer,
    active: Instant,
    timer: Option<Instant>,
    queued: bool,
    blocked: bool,
    /// The node's SYN, if it opened the flow.
    syn: Vec<u8>,
}

/// What DNS sessions need besides.
pub struct Names<'a> {
    /// The lab's names.
    pub zone: Zone<'a>,
    /// The host's resolvers.
    pub resolvers: &'a mut Resolvers,
}

/// The flows.
pub struct TcpFlows {
    stack: Stack,
    outside: Outside,
    cache: Option<Cache>,
    limit: usize,
    flows: HashMap<u64, Flow>,
    by_key: HashMap<FlowKey, u64>,
    timers: BTreeSet<(Instant, u64)>,
    /// Flows that have something to do.
    work: VecDeque<u64>,
    /// Flows that wait for [`Lan::take_opened`].
    blocked: Vec<u64>,
    next_port: u16,
}

impl TcpFlows {
    /// No flows yet. At most `descriptors` sockets may be open at once. `cache` is the gateway's cache of packages.
    pub fn new(stack: Stack, outside: Outside, cache: Option<Cache>, descriptors: usize) -> TcpFlows {
        TcpFlows {
            stack,
            outside,
            cache,
            limit: descriptors.min(MAX_FLOWS),
            flows: HashMap::new(),
            by_key: HashMap::new(),
            timers: BTreeSet::new(),
            work: VecDeque::new(),
            blocked: Vec::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Number of flows.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// Take a packet of a node for the gateway or the outside.
    pub fn input(&mut self, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
        let key = FlowKey {
            guest: SocketAddrV4::new(packet.src_addr(), segment.src_port()),
            outside: SocketAddrV4::new(packet.dst_addr(), segment.dst_port()),
        };
        let bytes = packet.as_ref();
        let begins = segment.syn() && !segment.ack() && !segment.rst();
        if begins
            && let Some(id) = self.by_key.get(&key).copied()
            && (self.is_forgotten(id, &segment) || self.is_next_probe(id, packet))
        {
            self.remove(id);
        }
        if let Some(id) = self.by_key.get(&key).copied() {
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.active = lan.now;
                if self.stack.ingress(&mut flow.socket, lan, bytes, *key.guest.ip()) {
                    self.schedule(id);
                } else {
                    self.remove(id);
                }
            }
        } else if begins {
            self.open(key, packet, lan);
        } else {
            self.stack.refuse(lan, bytes, *key.guest.ip());
        }
    }

    /// The poller says what the host's side of a flow is ready for.
    pub fn ready(&mut self, id: u64, flags: EventFlags) {
        if let Some(flow) = self.flows.get_mut(&id) {
            if let Peer::Host(host) = &mut flow.peer {
                host.ready(flags);
            }
            self.schedule(id);
        }
    }

    /// Join `socket` with a new connection from the gateway to a node, which has so long to answer.
    pub fn connect(
        &mut self,
        socket: OwnedFd,
        opener: (Opener, Duration),
        node: SocketAddrV4,
        preface: Vec<u8>,
        lan: &mut Lan,
    ) {
        let ports = (u16::MAX - FIRST_PORT).into();
        for _ in 0..ports {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            let key = FlowKey { guest: node, outside: SocketAddrV4::new(lan.gateway(), port) };
            if self.by_key.contains_key(&key) {
                continue;
            }
            let host = HostSide::accepted(socket, opener, node, preface, lan.now);
            let id = self.insert(key, Peer::Host(host), lan);
            let connected = match self.flows.get_mut(&id) {
                Some(flow) => self.stack.connect(&mut flow.socket, lan, port, node),
                None => return,
            };
            if !connected || !self.watch(id, lan) {
                self.remove(id);
            }
            self.schedule(id);
            return;
        }
    }

    /// Let all flows that have something to do, do it.
    pub fn run(&mut self, names: &mut Names<'_>, lan: &mut Lan) {
        if lan.take_opened() {
            for id in std::mem::take(&mut self.blocked) {
                if let Some(flow) = self.flows.get_mut(&id) {
                    flow.blocked = false;
                }
                self.schedule(id);
            }
        }
        while let Some(id) = self.work.pop_front() {
            self.step(id, names, lan);
        }
    }

    /// When [`TcpFlows::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Schedule the flows whose time has come.
    pub fn expire(&mut self, now: Instant) {
        while let Some((due, id)) = self.timers.first().copied()
            && due <= now
        {
            self.timers.remove(&(due, id));
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.timer = None;
            }
            self.schedule(id);
        }
    }

    /// Whether a SYN shows that the node knows nothing of that flow any more: it was restarted, and uses the port again.
    fn is_forgotten(&mut self, id: u64, syn: &TcpPacket<&[u8]>) -> bool {
        let Some(flow) = self.flows.get_mut(&id) else { return false };
        let opening =
            matches!(flow.socket.tcp().state(), State::Listen | State::SynSent | State::SynReceived);
        let Ok(packet) = Ipv4Packet::new_checked(flow.syn.as_slice()) else { return false };
        let Ok(first) = TcpPacket::new_checked(packet.payload()) else { return false };
        !opening && first.seq_number() != syn.seq_number()
    }

    /// Whether a SYN asks for another router than the one before, of which nothing was heard: a traceroute's.
    fn is_next_probe(&self, id: u64, packet: &Ipv4Packet<&[u8]>) -> bool {
        let Some(flow) = self.flows.get(&id).filter(|flow| flow.peer.is_connecting()) else { return false };
        let first = Ipv4Packet::new_checked(flow.syn.as_slice());
        first.is_ok_and(|first| first.hop_limit() != packet.hop_limit())
    }

    /// Nobody is at that address of the lab: connections of forwards to it wait no longer.
    pub fn nobody_at(&mut self, ip: Ipv4Addr, now: Instant) {
        let waits = |flow: &mut Flow| match &mut flow.peer {
            Peer::Host(host) => *flow.key.guest.ip() == ip && host.nobody_there(now),
            Peer::Dns(_) => false,
        };
        let given_up: Vec<u64> =
            self.flows.iter_mut().filter_map(|(id, flow)| waits(flow).then_some(*id)).collect();
        for id in given_up {
            self.schedule(id);
        }
    }

    /// A node opens a connection.
    fn open(&mut self, key: FlowKey, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        let guest = *key.guest.ip();
        let peer = if *key.outside.ip() == lan.gateway() {
            let cache = self.cache.as_ref().filter(|_| key.outside.port() == cache::PORT);
            match (key.outside.port(), cache.and_then(Cache::connect)) {
                (dns::PORT, _) => Peer::Dns(Session::default()),
                (_, Some(socket)) => Peer::Host(HostSide::connecting(socket, key.guest)),
                _ => return self.stack.refuse(lan, packet.as_ref(), guest),
            }
        } else {
            let Some(ip) = self.outside.resolve(*key.outside.ip()) else {
                return lan.send_unreachable(packet, Icmpv4DstUnreachable::NetProhibited);
            };
            match connect(SocketAddrV4::new(ip, key.outside.port()), packet.hop_limit().saturating_sub(1)) {
                Ok(socket) => Peer::Host(HostSide::connecting(socket, key.guest)),
                Err(e) => return self.refuse(e, packet, lan),
            }
        };
        let is_host = matches!(peer, Peer::Host(_));
        let id = self.insert(key, peer, lan);
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if packet.as_ref().len() <= MAX_SYN {
            flow.syn = packet.as_ref().to_vec();
        }
        let socket = flow.socket.tcp();
        socket.pause_synack(is_host);
        let listening = socket.listen((*key.outside.ip(), key.outside.port())).is_ok();
        let alive = listening && self.stack.ingress(&mut flow.socket, lan, packet.as_ref(), guest);
        if !alive || flow.socket.tcp().state() != State::SynReceived || (is_host && !self.watch(id, lan)) {
            self.remove(id);
            return;
        }
        self.schedule(id);
    }

    /// Tell a node why the host cannot connect.
    fn refuse(&mut self, error: Errno, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        match unreachable(error) {
            Some(reason) => lan.send_unreachable(packet, reason),
            None => self.stack.refuse(lan, packet.as_ref(), packet.src_addr()),
        }
    }

    fn insert(&mut self, key: FlowKey, peer: Peer, lan: &mut Lan) -> u64 {
        if self.flows.len() >= self.limit
            // Those that lead nowhere yet go first: a scan of ports must not cost others their connections.
            && let Some((id, _)) =
                self.flows.iter().min_by_key(|(_, flow)| (!flow.peer.is_connecting(), flow.active))
        {
            let (id, limit) = (*id, self.limit);
            lan.notices.happened(
                format_args!("{limit} TCP connections are open, which is the most: for a new one, the one that was silent for longest is closed"),
                lan.now,
            );
            self.evict(id, lan);
        }
        let id = lan.new_id();
        let socket = FlowSocket::new(room(self.flows.len()));
        let (active, timer, syn) = (lan.now, None, Vec::new());
        self.flows.insert(id, Flow { key, socket, peer, active, timer, queued: false, blocked: false, syn });
        self.by_key.insert(key, id);
        id
    }

    /// Watch the host's side of a flow: edge-triggered, as that needs no more system calls.
    fn watch(&self, id: u64, lan: &Lan) -> bool {
        let Some(Flow { peer: Peer::Host(host), .. }) = self.flows.get(&id) else { return false };
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        lan.poller.add(host.socket(), Token::Tcp(id), flags).is_ok()
    }

    fn schedule(&mut self, id: u64) {
        if let Some(flow) = self.flows.get_mut(&id)
            && !flow.queued
        {
            flow.queued = true;
            self.work.push_back(id);
        }
    }

    /// Close a flow to make room for another.
    fn evict(&mut self, id: u64, lan: &mut Lan) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.socket.tcp().abort();
            let _ = self.stack.egress(&mut flow.socket, lan, *flow.key.guest.ip());
        }
        self.remove(id);
    }

    fn remove(&mut self, id: u64) {
        if let Some(flow) = self.flows.remove(&id) {
            // An end that is not both sides' must not look like one.
            if let Peer::Host(host) = &flow.peer
                && !host.is_done()
            {
                host.reset();
            }
            give_up(&mut self.by_key, &flow.key, id);
            if let Some(due) = flow.timer {
                self.timers.remove(&(due, id));
            }
        }
    }

    fn step(&mut self, id: u64, names: &mut Names<'_>, lan: &mut Lan) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.queued = false;
        let guest = *flow.key.guest.ip();
        let mut finished = false;
        match &mut flow.peer {
            Peer::Host(host) => match host.advance(flow.socket.tcp(), lan.now) {
                Outcome::Going => {}
                Outcome::Finished => finished = true,
                Outcome::Unreachable(e) => {
                    // The node takes this as the reason, where the reset that follows would say "refused".
                    finished = tell_why(e, flow.key.outside, host.socket(), &flow.syn, &self.outside, lan);
                    if !finished {
                        flow.socket.tcp().abort();
                    }
                }
            },
            Peer::Dns(session) => {
                let socket = flow.socket.tcp();
                match session.drive(id, socket, &names.zone, names.resolvers, lan) {
                    Progress::Going => {}
                    Progress::Done => socket.close(),
                    Progress::Broken => socket.abort(),
                }
            }
        }
        let egress = if finished || flow.peer.is_connecting() {
            Egress::Idle(None)
        } else {
            self.stack.egress(&mut flow.socket, lan, guest)
        };
        let tcp = flow.socket.tcp();
        let gone = tcp.state() == State::Closed && tcp.remote_endpoint().is_none();
        // A reset that cannot be sent now is sent when the node next sends something.
        let unheard = tcp.state() == State::Closed && egress == Egress::Blocked;
        if finished || unheard || egress == Egress::Broken {
            return self.remove(id);
        }
        // Nothing more is sent.
        let over = gone || tcp.state() == State::TimeWait && egress != Egress::Blocked;
        let has_rest = matches!(&flow.peer, Peer::Host(host) if host.has_rest());
        let end = flow.active + MAX_SILENCE;
        if over && (!has_rest || lan.now >= end) {
            return self.remove(id);
        }
        let mut due = match &flow.peer {
            Peer::Host(host) => host.deadline(),
            Peer::Dns(session) => session.deadline(),
        };
        match egress {
            // The host may take its time; the node may use its port again.
            _ if over => {
                give_up(&mut self.by_key, &flow.key, id);
                due = Some(end);
            }
            Egress::Blocked if lan.now.saturating_duration_since(flow.active) > MAX_SILENCE => {
                return self.remove(id);
            }
            Egress::Blocked => {
                due = Some(due.map_or(lan.now + RETRY, |due| due.min(lan.now + RETRY)));
                if !std::mem::replace(&mut flow.blocked, true) {
                    self.blocked.push(id);
                }
            }
            // Never at once: whatever could be done now has been done.
            Egress::Idle(Some(at)) => {
                let at = at.max(lan.now + Duration::from_millis(1));
                due = Some(due.map_or(at, |due| due.min(at)));
            }
            _ => {}
        }
        if flow.timer != due {
            if let Some(old) = std::mem::replace(&mut flow.timer, due) {
                self.timers.remove(&(old, id));
            }
            if let Some(due) = due {
                self.timers.insert((due, id));
            }
        }
    }
}

/// A flow no longer has its key; another may have it by now.
fn give_up(by_key: &mut HashMap<FlowKey, u64>, key: &FlowKey, id: u64) {
    if by_key.get(key) == Some(&id) {
        by_key.remove(key);
    }
}

/// Room in bytes for a flow's data in each direction: less where there are many, so that they are bounded together
/// (4096 flows: 240 MiB, if all are full; half as much again, if then all nodes close and the host does not read).
fn room(flows: usize) -> usize {
    match flows {
        0..64 => 256 << 10,
        64..512 => 96 << 10,
        _ => 16 << 10,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use smoltcp::wire::Ipv4Cidr;

    use super::*;
    use crate::hosts::Hosts;

    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    #[test]
    fn flows_that_lead_nowhere_make_room_first() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 24)).unwrap();
        let outside =
            Outside { detours: [(OUTSIDE, Ipv4Addr::LOCALHOST)].into_iter().collect(), ..Outside::default() };
        let mut flows = TcpFlows::new(Stack::new(&mut lan, 1), outside, None, 2);
        let open = |flows: &mut TcpFlows, lan: &mut Lan, from: u16| {
            let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2];
            packet.extend(OUTSIDE.octets());
            packet.extend([from.to_be_bytes(), port.to_be_bytes()].concat());
            packet.extend([0, 0, 0, 9, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
            let mut packet = Ipv4Packet::new_unchecked(packet);
            packet.fill_checksum();
            lan.now += Duration::from_secs(1);
            flows.input(&Ipv4Packet::new_checked(packet.into_inner().as_slice()).unwrap(), lan);
        };
        open(&mut flows, &mut lan, 1);
        let connected = *flows.flows.keys().next().unwrap();
        flows.ready(connected, EventFlags::OUT);
        let mut resolvers = Resolvers::new("/none".into(), 9);
        let zone = Zone { domain: "test.lab", hosts: &Hosts::default(), cidr: lan.cidr };
        flows.run(&mut Names { zone, resolvers: &mut resolvers }, &mut lan);
        // Nobody says that these are connected.
        for from in 2..6 {
            open(&mut flows, &mut lan, from);
        }
        assert!(flows.count() == 2 && flows.flows.contains_key(&connected));
    }
}
