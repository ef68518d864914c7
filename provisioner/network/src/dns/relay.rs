//! Queries by datagram that the host's resolvers are to answer. Each has a socket of its own, so that nobody can
//! guess where an answer is expected.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, SocketAddrV4},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
};

use super::{PORT, is_refusal, resolvers::Resolvers, zone};
use crate::{
    lan::Lan,
    poller::{EventFlags, Token},
};

/// Most queries under way.
const MAX_QUERIES: usize = 512;
/// Time for one resolver to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a query is sent before it has failed.
const TRIES: usize = 3;
/// Longest answer in bytes.
const MAX_ANSWER: usize = 65535;

#[derive(Debug)]
struct Query {
    guest: SocketAddrV4,
    bytes: Vec<u8>,
    /// Whom to ask, in this order.
    resolvers: Vec<SocketAddr>,
    socket: Option<OwnedFd>,
    tries: usize,
    deadline: Instant,
    /// The last resolver's answer that says that it has none.
    refusal: Option<Vec<u8>>,
}

impl Query {
    /// The resolver that was asked last.
    fn asked(&self) -> Option<SocketAddr> {
        self.resolvers.iter().cycle().nth(self.tries.checked_sub(1)?).copied()
    }
}

/// The queries under way.
#[derive(Debug, Default)]
pub struct Relay {
    queries: BTreeMap<u64, Query>,
}

impl Relay {
    /// Pass a query of a node on.
    pub fn ask(&mut self, guest: SocketAddrV4, bytes: &[u8], resolvers: &mut Resolvers, lan: &mut Lan) {
        // A repeated question is not asked twice.
        if self.queries.values().any(|query| query.guest == guest && query.bytes == bytes) {
            return;
        }
        if self.queries.len() >= MAX_QUERIES {
            lan.notices.happened(
                format_args!("{MAX_QUERIES} DNS queries wait for the host's resolvers, which is the most: for a new one, the oldest is dropped"),
                lan.now,
            );
            self.queries.pop_first();
        }
        let id = lan.new_id();
        let (bytes, deadline, list) = (bytes.to_vec(), lan.now, resolvers.list(lan.now));
        let query = Query { guest, bytes, resolvers: list, socket: None, tries: 0, deadline, refusal: None };
        self.queries.insert(id, query);
        self.next_try(id, lan);
    }

    /// The socket of a query became readable.
    pub fn ready(&mut self, id: u64, resolvers: &mut Resolvers, lan: &mut Lan) {
        let Some(query) = self.queries.get_mut(&id) else { return };
        let (Some(socket), bytes, guest) = (&query.socket, &query.bytes, query.guest) else { return };
        let mut answer = vec![0; MAX_ANSWER];
        match rustix::net::recv(socket, answer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((len, _)) => {
                answer.truncate(len);
                let response = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
                if len >= 12 && response && answer.get(..2) == bytes.get(..2) {
                    if let Some(resolver) = query.asked() {
                        resolvers.has_answered(resolver);
                    }
                    if is_refusal(&answer) && query.tries < query.resolvers.len() {
                        query.refusal = Some(answer);
                        return self.next_try(id, lan);
                    }
                    lan.send_udp(SocketAddrV4::new(lan.gateway(), PORT), guest, &answer);
                    self.queries.remove(&id);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.next_try(id, lan),
        }
    }

    /// When [`Relay::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.queries.values().map(|query| query.deadline).min()
    }

    /// Ask again, or give up, where no answer came in time.
    pub fn expire(&mut self, resolvers: &mut Resolvers, lan: &mut Lan) {
        let due: Vec<u64> =
            self.queries.iter().filter(|(_, query)| query.deadline <= lan.now).map(|(id, _)| *id).collect();
        for id in due {
            if let Some(resolver) = self.queries.get(&id).and_then(Query::asked) {
                resolvers.has_not_answered(resolver, lan.now);
            }
            self.next_try(id, lan);
        }
    }

    /// Queries under way.
    pub fn under_way(&self) -> usize {
        self.queries.len()
    }

    /// Send a query to the next resolver that takes it; if there is none, it has failed.
    fn next_try(&mut self, id: u64, lan: &mut Lan) {
        let Some(query) = self.queries.get_mut(&id) else { return };
        while query.tries < TRIES.max(query.resolvers.len()) && !query.resolvers.is_empty() {
            query.tries = query.tries.saturating_add(1);
            if let Some(resolver) = query.asked()
                && let Ok(socket) = send(&query.bytes, resolver)
                && lan.poller.add(&socket, Token::Dns(id), EventFlags::IN).is_ok()
            {
                query.socket = Some(socket);
                query.deadline = lan.now + PATIENCE;
                return;
            }
        }
        let failure = query.refusal.take().unwrap_or_else(|| zone::failure(&query.bytes));
        let guest = query.guest;
        self.queries.remove(&id);
        lan.send_udp(SocketAddrV4::new(lan.gateway(), PORT), guest, &failure);
    }
}

fn send(bytes: &[u8], resolver: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if resolver.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    rustix::net::connect(&socket, &resolver)?;
    rustix::net::send(&socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(socket)
}
