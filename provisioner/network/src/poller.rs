//! epoll, and the tokens that say what became ready.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::event::{Timespec, epoll};

pub use epoll::EventFlags;

/// What a file descriptor belongs to. The numbers are ids of [`crate::lan::Lan::new_id`], which never come twice, so
/// an event that was fetched before its owner went away finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The socket where cards connect.
    CardListener,
    /// A card.
    Card(u64),
    /// The socket where control clients connect.
    ControlListener,
    /// A control client.
    Client(u64),
    /// A forward's listening socket.
    Forward(u64),
    /// The host's side of a TCP flow.
    Tcp(u64),
    /// The host's side of a UDP flow.
    Udp(u64),
    /// The host's side of an ICMP echo flow.
    Icmp(u64),
    /// A DNS query that waits for a resolver.
    Dns(u64),
    /// The pipe that signals write to.
    Signal,
}

const KIND_SHIFT: u32 = 56;
const ID_MASK: u64 = (1 << KIND_SHIFT) - 1;

impl Token {
    fn encode(self) -> u64 {
        let (kind, id) = match self {
            Token::CardListener => (0, 0),
            Token::Card(id) => (1, id),
            Token::ControlListener => (2, 0),
            Token::Client(id) => (3, id),
            Token::Forward(id) => (4, id),
            Token::Tcp(id) => (5, id),
            Token::Udp(id) => (6, id),
            Token::Icmp(id) => (7, id),
            Token::Dns(id) => (8, id),
            Token::Signal => (9, 0),
        };
        (kind << KIND_SHIFT) | (id & ID_MASK)
    }

    fn decode(data: u64) -> Token {
        let id = data & ID_MASK;
        match data >> KIND_SHIFT {
            0 => Token::CardListener,
            1 => Token::Card(id),
            2 => Token::ControlListener,
            3 => Token::Client(id),
            4 => Token::Forward(id),
            5 => Token::Tcp(id),
            6 => Token::Udp(id),
            7 => Token::Icmp(id),
            8 => Token::Dns(id),
            _ => Token::Signal,
        }
    }
}

/// An epoll instance. Closing a file descriptor takes it out.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// A new epoll instance.
    pub fn new() -> std::io::Result<Poller> {
        Ok(Poller { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watch `fd`.
    pub fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> std::io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), flags)?)
    }

    /// Watch `fd`, which is watched already, for something else.
    pub fn modify(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> std::io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token.encode()), flags)?)
    }

    /// Stop watching `fd`, which stays open.
    pub fn remove(&self, fd: impl AsFd) -> std::io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Wait until something is ready or `timeout` has passed (for ever without one); `events` then holds what became
    /// ready. A signal ends the wait early.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> std::io::Result<()> {
        events.0.clear();
        let timeout = timeout.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events.0), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Room for the events of one wait.
pub struct Events(Vec<epoll::Event>);

impl Events {
    /// Room for `capacity` events a wait.
    pub fn with_capacity(capacity: usize) -> Events {
        Events(Vec::with_capacity(capacity))
    }

    /// What became ready in the last wait.
    pub fn iter(&self) -> impl Iterator<Item = (Token, EventFlags)> + '_ {
        self.0.iter().map(|event| (Token::decode(event.data.u64()), event.flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::CardListener,
            Token::Card(1),
            Token::ControlListener,
            Token::Client(2),
            Token::Forward(ID_MASK),
            Token::Tcp(3),
            Token::Udp(4),
            Token::Icmp(5),
            Token::Dns(6),
            Token::Signal,
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
