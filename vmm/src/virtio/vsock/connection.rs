//! One stream: its state, its credit in both directions (virtio 1.3 §5.10.6.3), and what it has to say to the guest.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use super::packet::{HEADER, HOST, Header, NO_RECEIVE, NO_SEND, STREAM, operation};
use crate::virtio::segments::{Pieces, Segments};

/// Bytes from the guest that are kept for a host that does not read, and what the guest is told of it.
pub(super) const BUFFER: usize = 128 << 10;
/// The guest is told of room when it has grown by this much.
pub(super) const WORTH_TELLING: u32 = BUFFER as u32 / 4;

/// Who is at the host's end.
pub(super) enum Peer {
    /// Another process.
    Stream(UnixStream),
    /// Nobody any more.
    Gone,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Opened by the host: the guest must be asked.
    Asking,
    /// The guest was asked.
    Asked,
    /// Opened by the guest: it must be answered.
    Answering,
    /// Both sides know of it.
    Open,
    /// The guest must be told that it is over, and then nothing is left to do.
    Resetting,
    /// The guest has forgotten it; the host still gets what was sent before.
    Draining,
    /// Nothing is left to do.
    Over,
}

/// A connection.
pub(super) struct Connection {
    pub host_port: u32,
    pub guest_port: u32,
    pub peer: Peer,
    pub phase: Phase,
    /// Whether it is in the muxer's list of those with something to say.
    pub queued: bool,
    /// Whether the stream may have data; edge-triggered.
    pub readable: bool,
    /// Whether room in the stream is waited for.
    pub waits_for_room: bool,
    /// From the guest, not taken by the host yet.
    outgoing: Vec<u8>,
    /// Bytes of the guest that the host has taken, modulo 2^32, and how many the guest knows of.
    forwarded: u32,
    forwarded_told: u32,
    /// The guest asked how much it may send.
    credit_asked: bool,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest says it has room for, and has taken.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The guest was asked for credit.
    credit_requested: bool,
    /// Directions that the guest has ended, as flags of SHUTDOWN.
    guest_ended: u32,
    /// Directions that the host has ended, and what the guest was told of that.
    host_ended: u32,
    host_ended_told: u32,
    cid: u64,
}

impl Connection {
    /// A new connection between the host's end and a port of the guest.
    pub fn new(cid: u64, host_port: u32, guest_port: u32, stream: UnixStream, phase: Phase) -> Self {
        Self {
            host_port,
            guest_port,
            peer: Peer::Stream(stream),
            phase,
            queued: false,
            readable: true,
            waits_for_room: false,
            outgoing: Vec::new(),
            forwarded: 0,
            forwarded_told: 0,
            credit_asked: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            credit_requested: false,
            guest_ended: 0,
            host_ended: 0,
            host_ended_told: 0,
            cid,
        }
    }

    /// Takes in what every packet of the guest says about its room.
    pub fn credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = header.forwarded;
        if self.room() > 0 {
            self.credit_requested = false;
        }
    }

    /// Bytes that the guest has room for.
    fn room(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way) as usize
    }

    /// The guest wants to know its credit.
    pub fn ask_credit(&mut self) {
        self.credit_asked = true;
    }

    /// Data from the guest.
    pub fn receive(&mut self, mut data: Segments<'_>) {
        if self.phase != Phase::Open
            || self.guest_ended & NO_SEND != 0
            || self.outgoing.len() + data.len() > BUFFER
        {
            // More than it was allowed to.
            self.reset();
            return;
        }
        let length = data.len() as u32;
        match &self.peer {
            // It was told that nobody receives it.
            _ if self.host_ended & NO_RECEIVE != 0 => self.forwarded = self.forwarded.wrapping_add(length),
            Peer::Gone => {}
            Peer::Stream(stream) => {
                if self.outgoing.is_empty() {
                    // SAFETY: the memory that `data` comes from is borrowed longer than the pieces live.
                    let pieces = unsafe { Pieces::new(&data) };
                    let sent = send(stream, pieces.list());
                    data.take(self.account(sent));
                    if self.host_ended & NO_RECEIVE != 0 {
                        self.forwarded = self.forwarded.wrapping_add(length);
                        return;
                    }
                }
                let mut rest = vec![0; data.len()];
                data.read(&mut rest);
                self.outgoing.extend(rest);
            }
        }
    }

    /// Hands the stream what was kept for it.
    pub fn flush(&mut self) {
        if let Peer::Stream(stream) = &self.peer
            && !self.outgoing.is_empty()
        {
            let piece = libc::iovec {
                iov_base: self.outgoing.as_ptr().cast_mut().cast(),
                iov_len: self.outgoing.len(),
            };
            let sent = send(stream, &[piece]);
            let count = self.account(sent).min(self.outgoing.len());
            self.outgoing.drain(..count);
        }
        if self.outgoing.is_empty() {
            self.outgoing = Vec::new();
            self.end_directions();
        }
    }

    /// Notes how much the stream took. If it takes nothing any more, what is kept for it is dropped.
    fn account(&mut self, sent: io::Result<usize>) -> usize {
        match sent {
            Ok(count) => {
                self.forwarded = self.forwarded.wrapping_add(count as u32);
                count
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(_) => {
                self.forwarded = self.forwarded.wrapping_add(self.outgoing.len() as u32);
                self.outgoing = Vec::new();
                self.host_ended |= NO_RECEIVE;
                0
            }
        }
    }

    /// Whether there is something that the stream has not taken.
    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The host's end is closed in both directions; what it sent before is still read.
    pub fn hang_up(&mut self) {
        self.host_ended |= NO_RECEIVE;
        self.readable = true;
        self.outgoing = Vec::new();
        if self.phase == Phase::Draining {
            self.phase = Phase::Over;
        } else if matches!(self.phase, Phase::Asking | Phase::Asked) || self.guest_ended & NO_RECEIVE != 0 {
            // Nobody waits for an answer, or neither end wants any more.
            self.reset();
        }
    }

    /// The guest ended directions.
    pub fn end(&mut self, flags: u32) {
        self.guest_ended |= flags & (NO_SEND | NO_RECEIVE);
        if self.outgoing.is_empty() {
            self.end_directions();
        }
    }

    /// Carries out what the guest ended, when the host has all that it sent.
    fn end_directions(&mut self) {
        if self.phase == Phase::Draining {
            self.phase = Phase::Over;
            return;
        }
        if self.guest_ended == NO_SEND | NO_RECEIVE {
            // "When both are set, a RST confirms" (virtio 1.3 §5.10.6.6).
            self.reset();
        } else if let Peer::Stream(stream) = &self.peer {
            // Errors mean that the other end is gone, which the next read or write tells too.
            if self.guest_ended & NO_SEND != 0 {
                let _ = stream.shutdown(std::net::Shutdown::Write);
            }
            if self.guest_ended & NO_RECEIVE != 0 {
                let _ = stream.shutdown(std::net::Shutdown::Read);
            }
        }
    }

    /// Ends the connection: the guest will be told.
    pub fn reset(&mut self) {
        if self.phase != Phase::Over {
            self.phase = Phase::Resetting;
            self.peer = Peer::Gone;
            self.outgoing = Vec::new();
        }
    }

    /// The guest has ended the connection.
    pub fn forget(&mut self) {
        if self.has_outgoing() {
            self.phase = Phase::Draining;
        } else {
            self.peer = Peer::Gone;
            self.phase = Phase::Over;
        }
    }

    /// Whether both ends have said all, and only the guest's last word is missing.
    pub fn is_closing(&self) -> bool {
        matches!(self.peer, Peer::Gone)
    }

    /// Whether there is something to say to the guest. Data may turn out not to be there.
    pub fn has_news(&self) -> bool {
        match self.phase {
            Phase::Asking | Phase::Answering | Phase::Resetting => true,
            Phase::Asked | Phase::Draining | Phase::Over => false,
            Phase::Open => {
                (self.may_read() && (self.room() > 0 || !self.credit_requested))
                    || self.host_ended != self.host_ended_told
                    || self.credit_asked
                    || self.forwarded.wrapping_sub(self.forwarded_told) >= WORTH_TELLING
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable
            && matches!(self.peer, Peer::Stream(_))
            && self.host_ended & NO_SEND == 0
            && self.guest_ended & NO_RECEIVE == 0
    }

    /// Writes the next packet for the guest into `buffer`, which is longer than a header. Returns its length; nothing
    /// if there is nothing to say after all.
    pub fn tell(&mut self, mut buffer: Segments<'_>) -> Option<usize> {
        let header = buffer.take(HEADER);
        let (operation, flags, length) = match self.phase {
            Phase::Asked | Phase::Draining | Phase::Over => return None,
            Phase::Asking => {
                self.phase = Phase::Asked;
                (operation::REQUEST, 0, 0)
            }
            Phase::Answering => {
                self.phase = Phase::Open;
                (operation::RESPONSE, 0, 0)
            }
            Phase::Resetting => {
                self.phase = Phase::Over;
                (operation::RESET, 0, 0)
            }
            Phase::Open => self.tell_open(buffer)?,
        };
        self.credit_asked = false;
        self.forwarded_told = self.forwarded;
        let packet = Header {
            source_cid: HOST,
            destination_cid: self.cid,
            source_port: self.host_port,
            destination_port: self.guest_port,
            length: length as u32,
            kind: STREAM,
            operation,
            flags,
            buffer: BUFFER as u32,
            forwarded: self.forwarded,
        };
        header.write(vm_memory::ByteValued::as_slice(&packet));
        Some(HEADER + length)
    }

    fn tell_open(&mut self, mut buffer: Segments<'_>) -> Option<(u16, u32, usize)> {
        if self.may_read() {
            let room = buffer.take(self.room());
            if !room.is_empty() {
                if let Some(length) = self.read(&room) {
                    self.sent = self.sent.wrapping_add(length as u32);
                    return Some((operation::DATA, 0, length));
                }
            } else if !self.credit_requested {
                self.credit_requested = true;
                return Some((operation::CREDIT_REQUEST, 0, 0));
            }
        }
        if self.host_ended != self.host_ended_told {
            self.host_ended_told = self.host_ended;
            if self.host_ended == NO_SEND | NO_RECEIVE {
                self.peer = Peer::Gone;
            }
            return Some((operation::SHUTDOWN, self.host_ended, 0));
        }
        let due = self.credit_asked || self.forwarded.wrapping_sub(self.forwarded_told) >= WORTH_TELLING;
        due.then_some((operation::CREDIT_UPDATE, 0, 0))
    }

    /// Reads from the stream; nothing if there is nothing now, or no more at all.
    fn read(&mut self, room: &Segments<'_>) -> Option<usize> {
        let Peer::Stream(stream) = &self.peer else { return None };
        // SAFETY: the memory that `room` comes from is borrowed longer than the pieces live.
        let pieces = unsafe { Pieces::new(room) };
        // SAFETY: as above; the kernel checks the rest.
        let count =
            unsafe { libc::readv(stream.as_raw_fd(), pieces.list().as_ptr(), pieces.list().len() as i32) };
        match usize::try_from(count) {
            Ok(0) => {
                self.readable = false;
                self.host_ended |= NO_SEND;
                None
            }
            Ok(count) => Some(count),
            Err(_) => {
                match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.readable = false,
                    _ => {
                        self.readable = false;
                        self.host_ended |= NO_SEND | NO_RECEIVE;
                    }
                }
                None
            }
        }
    }
}

/// Sends what the stream has room for.
fn send(stream: &UnixStream, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeroes are a valid, empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    // SAFETY: the message's pieces live as long as this call.
    let sent = unsafe {
        libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
