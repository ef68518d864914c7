//! Echo requests of nodes to the outside, through "ping sockets" of the host (icmp(7)): they need no privilege where
//! `net.ipv4.ping_group_range` allows them.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Ipv4Packet},
};

use super::{
    Outside,
    datagrams::{self, Datagrams},
};
use crate::{
    lan::Lan,
    log,
    poller::{EventFlags, Token},
};

/// Most flows; when there are more, the one that was idle for longest is closed.
const MAX_FLOWS: usize = 256;
/// A flow ends when nothing was sent either way for so long.
const IDLE: Duration = Duration::from_secs(30);
/// Time between two looks for idle flows.
const SWEEP: Duration = Duration::from_secs(10);
/// Answers that are taken from one socket before others have their turn.
const BURST: usize = 64;

/// A sequence of echo requests of one ping: node, identifier, destination.
type Key = (Ipv4Addr, u16, Ipv4Addr);

#[derive(Debug)]
struct Flow {
    key: Key,
    socket: Datagrams,
    active: Instant,
}

/// The flows.
#[derive(Debug)]
pub struct IcmpFlows {
    outside: Outside,
    flows: HashMap<u64, Flow>,
    by_key: HashMap<Key, u64>,
    sweep: Option<Instant>,
    told: bool,
}

impl IcmpFlows {
    /// No flows yet.
    pub fn new(outside: Outside) -> IcmpFlows {
        IcmpFlows { outside, flows: HashMap::new(), by_key: HashMap::new(), sweep: None, told: false }
    }

    /// Number of flows.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// Take an ICMP message of a node, for the gateway or the outside.
    pub fn input(&mut self, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        let Ok(message) = Icmpv4Packet::new_checked(packet.payload()) else { return };
        let Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) =
            Icmpv4Repr::parse(&message, &ChecksumCapabilities::ignored())
        else {
            return;
        };
        let (guest, to) = (packet.src_addr(), packet.dst_addr());
        if to == lan.gateway() {
            return lan.send_icmp(to, guest, &Icmpv4Repr::EchoReply { ident, seq_no, data });
        }
        let key = (guest, ident, to);
        let id = match self.by_key.get(&key).copied() {
            Some(id) => id,
            None => match self.open(key, lan) {
                Ok(id) => id,
                Err(e) => return self.refuse(e, packet, lan),
            },
        };
        let request = Icmpv4Repr::EchoRequest { ident, seq_no, data };
        let mut bytes = vec![0; request.buffer_len()];
        request
            .emit(&mut Icmpv4Packet::new_unchecked(bytes.as_mut_slice()), &ChecksumCapabilities::default());
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.active = lan.now;
            flow.socket.send(packet, &bytes, lan);
        }
    }

    /// The socket of a flow became readable.
    pub fn ready(&mut self, id: u64, lan: &mut Lan) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.socket.pass_errors(lan);
        let mut buffer = vec![0; 65535];
        for _ in 0..BURST {
            let Some(len) = flow.socket.receive(&mut buffer) else { return };
            flow.active = lan.now;
            let Ok(message) = Icmpv4Packet::new_checked(buffer.get(..len).unwrap_or_default()) else {
                continue;
            };
            if let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) =
                Icmpv4Repr::parse(&message, &ChecksumCapabilities::ignored())
            {
                let (guest, ident, outside) = flow.key;
                lan.send_icmp(outside, guest, &Icmpv4Repr::EchoReply { ident, seq_no, data });
            }
        }
    }

    /// When [`IcmpFlows::expire`] has something to do.
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

    fn open(&mut self, key: Key, lan: &mut Lan) -> Result<u64, Errno> {
        let ip = self.outside.resolve(key.2).ok_or(Errno::PERM)?;
        let opened = Datagrams::echo(ip, key.2);
        if let Err(e @ (Errno::ACCESS | Errno::PERM)) = &opened
            && !std::mem::replace(&mut self.told, true)
        {
            log::warn(format_args!(
                "nodes cannot ping beyond the lab: {e}. Allow it with \
                 `sysctl net.ipv4.ping_group_range=\"0 2147483647\"`"
            ));
        }
        let socket = opened?;
        if self.flows.len() >= MAX_FLOWS
            && let Some((oldest, _)) = self.flows.iter().min_by_key(|(_, flow)| flow.active)
        {
            let oldest = *oldest;
            lan.notices.happened(
                format_args!("{MAX_FLOWS} pings are under way, which is the most: for a new one, the one that was idle for longest is closed"),
                lan.now,
            );
            if let Some(flow) = self.flows.remove(&oldest) {
                self.by_key.remove(&flow.key);
            }
        }
        let id = lan.new_id();
        lan.poller.add(socket.socket(), Token::Icmp(id), EventFlags::IN).map_err(|_| Errno::NOBUFS)?;
        self.flows.insert(id, Flow { key, socket, active: lan.now });
        self.by_key.insert(key, id);
        self.sweep.get_or_insert(lan.now + SWEEP);
        Ok(id)
    }

    fn refuse(&self, error: Errno, packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) {
        let reason = match error {
            Errno::ACCESS | Errno::PERM => Icmpv4DstUnreachable::CommProhibited,
            _ => datagrams::reason(error),
        };
        lan.send_unreachable(packet, reason);
    }
}
