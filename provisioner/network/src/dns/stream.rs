//! DNS over TCP (RFC 7766): a node's connection to the gateway's port 53. One query at a time is answered or passed
//! on, over a connection to a resolver that lives as long as the query.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
};
use smoltcp::socket::tcp::{Socket, State};

use super::{
    is_refusal,
    resolvers::Resolvers,
    zone::{self, Verdict, Zone},
};
use crate::{
    lan::Lan,
    poller::{EventFlags, Token},
};

/// Longest query in bytes.
const MAX_QUERY: usize = 4096;
/// Time for one resolver to answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// Length of the length before each message.
const PREFIX: usize = 2;

/// What a session comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It goes on.
    Going,
    /// The node has closed its side and has all answers.
    Done,
    /// The node does not speak DNS.
    Broken,
}

#[derive(Debug)]
struct Upstream {
    socket: OwnedFd,
    resolver: SocketAddr,
    query: Vec<u8>,
    written: usize,
    answer: Vec<u8>,
    tries: usize,
    deadline: Instant,
}

/// A node's connection.
#[derive(Debug, Default)]
pub struct Session {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    upstream: Option<Upstream>,
    /// Whom to ask, in this order.
    resolvers: Vec<SocketAddr>,
    /// The last resolver's answer that says that it has none.
    refusal: Option<Vec<u8>>,
}

impl Session {
    /// When [`Session::drive`] must be called again at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.upstream.as_ref().map(|upstream| upstream.deadline)
    }

    /// Do all that can be done now. `id` is the flow's, for the poller.
    pub fn drive(
        &mut self,
        id: u64,
        socket: &mut Socket<'_>,
        zone: &Zone<'_>,
        resolvers: &mut Resolvers,
        lan: &mut Lan,
    ) -> Progress {
        if socket.state() == State::SynReceived {
            return Progress::Going;
        }
        loop {
            if !self.outgoing.is_empty() {
                let Ok(sent) = socket.send_slice(&self.outgoing) else { return Progress::Going };
                self.outgoing.drain(..sent.min(self.outgoing.len()));
                if !self.outgoing.is_empty() {
                    return Progress::Going;
                }
            }
            if let Some(upstream) = self.upstream.as_mut() {
                match upstream.exchange(lan.now) {
                    Ok(None) => return Progress::Going,
                    Ok(Some(answer)) if !is_refusal(&answer) || upstream.tries >= self.resolvers.len() => {
                        resolvers.has_answered(upstream.resolver);
                        self.upstream = None;
                        self.reply(&answer);
                    }
                    other => {
                        if other == Err(Errno::TIMEDOUT) {
                            resolvers.has_not_answered(upstream.resolver, lan.now);
                        }
                        self.refusal = other.ok().flatten().or(self.refusal.take());
                        let (query, tries) = (std::mem::take(&mut upstream.query), upstream.tries);
                        self.open(id, query.get(PREFIX..).unwrap_or_default(), tries, lan);
                    }
                }
                continue;
            }
            let Some(query) = self.next_query(socket) else {
                let too_long = self.wanted().is_some_and(|len| len > MAX_QUERY);
                return match socket.may_recv() {
                    _ if too_long => Progress::Broken,
                    true => Progress::Going,
                    false => Progress::Done,
                };
            };
            match zone.decide(&query) {
                Verdict::Answer(answer) => self.reply(&answer),
                Verdict::Relay => {
                    self.refusal = None;
                    self.resolvers = resolvers.list(lan.now);
                    self.open(id, &query, 0, lan);
                }
                Verdict::Drop => return Progress::Broken,
            }
        }
    }

    /// Length of the query that is coming in.
    fn wanted(&self) -> Option<usize> {
        match self.incoming.as_slice() {
            [high, low, ..] => Some(usize::from(u16::from_be_bytes([*high, *low]))),
            _ => None,
        }
    }

    fn next_query(&mut self, socket: &mut Socket<'_>) -> Option<Vec<u8>> {
        let room = (PREFIX + MAX_QUERY).saturating_sub(self.incoming.len());
        let incoming = &mut self.incoming;
        let _ = socket.recv(|bytes| {
            let taken = bytes.get(..bytes.len().min(room)).unwrap_or_default();
            incoming.extend(taken);
            (taken.len(), ())
        });
        let end = self.wanted()?.checked_add(PREFIX)?;
        let query = self.incoming.get(PREFIX..end)?.to_vec();
        self.incoming.drain(..end);
        Some(query)
    }

    fn reply(&mut self, answer: &[u8]) {
        let Ok(len) = u16::try_from(answer.len()) else { return };
        self.outgoing.extend(len.to_be_bytes());
        self.outgoing.extend(answer);
    }

    /// Ask the next resolver that takes the query; if there is none, it has failed.
    fn open(&mut self, id: u64, query: &[u8], tried: usize, lan: &mut Lan) {
        self.upstream = None;
        for (n, resolver) in self.resolvers.iter().enumerate().skip(tried) {
            if let Ok(socket) = connect(*resolver)
                && lan
                    .poller
                    .add(&socket, Token::Tcp(id), EventFlags::IN | EventFlags::OUT | EventFlags::ET)
                    .is_ok()
            {
                let mut prefixed = u16::try_from(query.len()).unwrap_or_default().to_be_bytes().to_vec();
                prefixed.extend(query);
                let upstream = Upstream {
                    socket,
                    resolver: *resolver,
                    query: prefixed,
                    written: 0,
                    answer: Vec::new(),
                    tries: n.saturating_add(1),
                    deadline: lan.now + PATIENCE,
                };
                self.upstream = Some(upstream);
                return;
            }
        }
        let failure = self.refusal.take().unwrap_or_else(|| zone::failure(query));
        self.reply(&failure);
    }
}

impl Upstream {
    /// Write the query and read the answer, as far as the resolver goes: the answer, once it is whole.
    fn exchange(&mut self, now: Instant) -> Result<Option<Vec<u8>>, Errno> {
        while let Some(rest) = self.query.get(self.written..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => self.written = self.written.saturating_add(sent),
                // A connection that is being made is "not connected".
                Err(Errno::AGAIN | Errno::NOTCONN) => return self.patience(now),
                Err(e) => return Err(e),
            }
        }
        loop {
            let mut buffer = [0; 4096];
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Errno::CONNRESET),
                Ok((len, _)) => self.answer.extend(buffer.get(..len).unwrap_or_default()),
                Err(Errno::AGAIN) => return self.patience(now),
                Err(e) => return Err(e),
            }
            if let [high, low, message @ ..] = self.answer.as_slice()
                && let Some(answer) = message.get(..usize::from(u16::from_be_bytes([*high, *low])))
            {
                return Ok(Some(answer.to_vec()));
            }
        }
    }

    fn patience(&self, now: Instant) -> Result<Option<Vec<u8>>, Errno> {
        if now >= self.deadline { Err(Errno::TIMEDOUT) } else { Ok(None) }
    }
}

fn connect(resolver: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if resolver.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &resolver) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(e) => Err(e),
    }
}
