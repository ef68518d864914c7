//! UDP flows of nodes to the outside: a connected socket of the host for each, until it has been idle for a while.

use std::{
    collections::HashMap,
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use smoltcp::wire::{Icmpv4DstUnreachable, Ipv4Packet, UdpPacket};

use super::{
    FlowKey, Outside,
    datagrams::{Datagrams, reason},
};
use crate::{
    lan::Lan,
    poller::{EventFlags, Token},
};

/// Most flows; when there are more, the one that was idle for longest is closed.
const MAX_FLOWS: usize = 1024;
/// A flow ends when nothing was sent either way for so long.
const IDLE: Duration = Duration::from_secs(120);
/// Time between two looks for idle flows.
const SWEEP: Duration = Duration::from_secs(10);
/// Datagrams that are taken from one socket before others have their turn.
const BURST: usize = 64;
/// Longest payload in bytes.
const MAX_PAYLOAD: usize = 65535 - 28;

#[derive(Debug)]
struct Flow {
    key: FlowKey,
    socket: Datagrams,
    active: Instant,
}

/// The flows.
#[derive(Debug)]
pub struct UdpFlows {
    outside: Outside,
    limit: usize,
    flows: HashMap<u64, Flow>,
    by_key: HashMap<FlowKey, u64>,
    sweep: Option<Instant>,
    buffer: Vec<u8>,
}

impl UdpFlows {
    /// No flows yet. At most `descriptors` sockets may be open at once.
    pub fn new(outside: Outside, descriptors: usize) -> UdpFlows {
        UdpFlows {
            outside,
            limit: descriptors.min(MAX_FLOWS),
            flows: HashMap::new(),
            by_key: HashMap::new(),
            sweep: None,
            buffer: vec![0; MAX_PAYLOAD],
        }
    }

    /// Number of flows.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// Take a datagram of a node for the outside.
    pub fn input(&mut self, packet: &Ipv4Packet<&[u8]>, datagram: &UdpPacket<&[u8]>, lan: &mut Lan) {
        let key = FlowKey {
            guest: SocketAddrV4::new(packet.src_addr(), datagram.src_port()),
            outside: SocketAddrV4::new(packet.dst_addr(), datagram.dst_port()),
        };
        let id = match self.by_key.get(&key).copied() {
            Some(id) => id,
            None => match self.open(key, lan) {
                Ok(id) => id,
                Err(reason) => return lan.send_unreachable(packet, reason),
            },
        };
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.active = lan.now;
            flow.socket.send(packet, datagram.payload(), lan);
        }
    }

    /// The socket of a flow became readable.
    pub fn ready(&mut self, id: u64, lan: &mut Lan) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.socket.pass_errors(lan);
        for _ in 0..BURST {
            let Some(len) = flow.socket.receive(&mut self.buffer) else { return };
            flow.active = lan.now;
            lan.send_udp(flow.key.outside, flow.key.guest, self.buffer.get(..len).unwrap_or_default());
        }
    }

    /// When [`UdpFlows::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.sweep
    }

    /// Close idle flows.
    pub fn expire(&mut self, now: Instant) {
        if self.sweep.is_some_and(|due| due <= now) {
            let idle = |flow: &Flow| now.saturating_duration_since(flow.active) >= IDLE;
            self.by_key.retain(|_, id| self.flows.get(id).is_some_and(|flow| !idle(flow)));
            self.flows.retain(|_, flow| !idle(flow));
            self.sweep = (!self.flows.is_empty()).then_some(now + SWEEP);
        }
    }

    fn open(&mut self, key: FlowKey, lan: &mut Lan) -> Result<u64, Icmpv4DstUnreachable> {
        let ip = self.outside.resolve(*key.outside.ip()).ok_or(Icmpv4DstUnreachable::NetProhibited)?;
        if self.flows.len() >= self.limit
            && let Some((oldest, _)) = self.flows.iter().min_by_key(|(_, flow)| flow.active)
        {
            let (oldest, limit) = (*oldest, self.limit);
            lan.notices.happened(
                format_args!("{limit} UDP flows are open, which is the most: for a new one, the one that was idle for longest is closed"),
                lan.now,
            );
            self.remove(oldest);
        }
        let real = SocketAddrV4::new(ip, key.outside.port());
        let socket = Datagrams::udp(real, *key.outside.ip()).map_err(reason)?;
        let id = lan.new_id();
        let watched = lan.poller.add(socket.socket(), Token::Udp(id), EventFlags::IN);
        watched.map_err(|_| Icmpv4DstUnreachable::NetUnreachable)?;
        self.flows.insert(id, Flow { key, socket, active: lan.now });
        self.by_key.insert(key, id);
        self.sweep.get_or_insert(lan.now + SWEEP);
        Ok(id)
    }

    fn remove(&mut self, id: u64) {
        if let Some(flow) = self.flows.remove(&id) {
            self.by_key.remove(&flow.key);
        }
    }
}
