//! A switch port: the connection to one card, with what waits for the card to read.

use std::{
    collections::VecDeque,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags},
};

use crate::{
    log,
    poller::{EventFlags, Poller, Token},
};

/// Most bytes that wait for a card that does not read.
const QUEUE_BYTES: usize = 1 << 20;
/// Most packets that wait for a card that does not read.
const QUEUE_PACKETS: usize = 512;
/// For how long senders are held back for a card that does not read; afterwards its packets are dropped.
const PATIENCE: Duration = Duration::from_millis(500);

/// What became of a packet for a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The card's socket has it.
    Now,
    /// It waits: whoever sends to this port had better stop for a moment.
    Queued,
    /// The card does not read and the queue is full.
    Dropped,
}

/// How fast the card reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// Nothing waits.
    Free,
    /// Packets wait since then.
    Congested(Instant),
    /// Packets have waited for longer than [`PATIENCE`]: nobody is held back for this card until it has read all.
    Stuck,
}

/// A port with its card.
#[derive(Debug)]
pub struct Port {
    /// Id of the port: a new one for each connection.
    pub id: u64,
    /// Name that the card gave, the node's.
    pub name: String,
    /// Address leased by DHCP to the card.
    pub leased: Option<Ipv4Addr>,
    /// Frames and bytes from the card.
    pub received: [u64; 2],
    /// Frames and bytes to the card.
    pub sent: [u64; 2],
    /// Frames for the card that were dropped because it did not read.
    pub dropped: u64,
    /// Malformed packets from the card.
    pub invalid: u64,
    /// The congested port for which this one is not read.
    pub held_for: Option<u64>,
    socket: OwnedFd,
    queue: VecDeque<Box<[u8]>>,
    queued_bytes: usize,
    pace: Pace,
}

impl Port {
    /// A port for a card that has said its name; `socket` is watched by the poller already, for reading.
    pub fn new(id: u64, name: String, socket: OwnedFd) -> Port {
        Port {
            id,
            name,
            leased: None,
            received: [0; 2],
            sent: [0; 2],
            dropped: 0,
            invalid: 0,
            held_for: None,
            socket,
            queue: VecDeque::new(),
            queued_bytes: 0,
            pace: Pace::Free,
        }
    }

    /// Next packet of the card into `buffer`: its length, which is more than the buffer's if it was cut off, or 0 if
    /// the card has gone.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let (_, len) = rustix::net::recv(&self.socket, buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
        Ok(len)
    }

    /// Give a packet to the card, or let it wait for it.
    pub fn send(&mut self, packet: &[u8], poller: &Poller, now: Instant) -> Sent {
        if self.queue.is_empty() {
            match rustix::net::send(&self.socket, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => {
                    self.count(packet.len());
                    return Sent::Now;
                }
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => {}
                // The card has gone; the end of its connection is read soon.
                Err(_) => {
                    self.dropped = self.dropped.saturating_add(1);
                    return Sent::Dropped;
                }
            }
        }
        if self.queue.len() >= QUEUE_PACKETS || self.queued_bytes.saturating_add(packet.len()) > QUEUE_BYTES {
            self.dropped = self.dropped.saturating_add(1);
            return Sent::Dropped;
        }
        self.queued_bytes = self.queued_bytes.saturating_add(packet.len());
        self.queue.push_back(packet.into());
        if self.pace == Pace::Free {
            self.pace = Pace::Congested(now);
            self.watch(poller);
        }
        Sent::Queued
    }

    /// Send what waits, as far as the card reads; whether nothing waits any more.
    pub fn drain(&mut self, poller: &Poller) -> bool {
        while let Some(packet) = self.queue.front() {
            let len = packet.len();
            match rustix::net::send(&self.socket, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return false,
                Ok(_) => self.count(len),
                Err(_) => self.dropped = self.dropped.saturating_add(1),
            }
            self.queue.pop_front();
            self.queued_bytes = self.queued_bytes.saturating_sub(len);
        }
        if self.pace != Pace::Free {
            self.pace = Pace::Free;
            self.queue.shrink_to_fit();
            self.watch(poller);
        }
        true
    }

    /// Whether senders should wait: packets wait already, and have not done so for too long.
    pub fn congested(&self) -> bool {
        matches!(self.pace, Pace::Congested(_))
    }

    /// When the patience with a congested card ends.
    pub fn deadline(&self) -> Option<Instant> {
        match self.pace {
            Pace::Congested(since) => Some(since + PATIENCE),
            _ => None,
        }
    }

    /// Lose the patience with a card that has been congested for too long; whether that happened now.
    pub fn give_up(&mut self, now: Instant) -> bool {
        let over = self.deadline().is_some_and(|deadline| now >= deadline);
        if over {
            self.pace = Pace::Stuck;
        }
        over
    }

    /// Stop or go on reading the card.
    pub fn hold(&mut self, held_for: Option<u64>, poller: &Poller) {
        if self.held_for != held_for {
            self.held_for = held_for;
            self.watch(poller);
        }
    }

    fn watch(&self, poller: &Poller) {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.held_for.is_none());
        flags.set(EventFlags::OUT, self.pace != Pace::Free);
        if let Err(e) = poller.modify(&self.socket, Token::Card(self.id), flags) {
            log::warn(format_args!("card {}: cannot watch its socket: {e}", self.name));
        }
    }

    fn count(&mut self, len: usize) {
        let [frames, bytes] = &mut self.sent;
        *frames = frames.saturating_add(1);
        *bytes = bytes.saturating_add(len.saturating_sub(crate::frame::HEADER_LEN) as u64);
    }
}
