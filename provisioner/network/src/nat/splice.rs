//! The host's side of a TCP flow, and how its bytes are joined with those of the node's side.

use std::{
    net::SocketAddrV4,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown},
};
use smoltcp::socket::tcp::{Socket, State};

use super::error_queue;
use crate::{control::Reply, poller::EventFlags};

/// Time for a node to answer a connection of the gateway.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Who opened a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opener {
    /// A node.
    Guest,
    /// A connection to a forward of the host.
    Forward,
    /// A control client, which is told how it went.
    Dial,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The host's side is being connected; the node's SYN waits for its answer.
    HostConnecting,
    /// The node's side is being connected; the host's side waits.
    GuestConnecting(Instant),
    /// Both sides are connected.
    Joined,
}

/// What a flow comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Going,
    /// Nothing is left to do.
    Finished,
    /// The host could not connect, for that reason.
    Unreachable(Errno),
}

/// The host's side.
#[derive(Debug)]
pub struct HostSide {
    socket: OwnedFd,
    opener: Opener,
    stage: Stage,
    node: SocketAddrV4,
    /// What a control client sent right behind its request.
    preface: Vec<u8>,
    /// What the node has sent and the host has not taken when both have closed: the stack may forget it any time.
    rest: Vec<u8>,
    readable: bool,
    writable: bool,
    hung_up: bool,
    read_done: bool,
    write_done: bool,
    /// The socket is broken. What it has said before is for the node, and then a reset.
    broken: bool,
}

impl HostSide {
    /// A flow that a node opened: `socket` is being connected.
    pub fn connecting(socket: OwnedFd, node: SocketAddrV4) -> HostSide {
        HostSide::new(socket, Opener::Guest, Stage::HostConnecting, node, Vec::new())
    }

    /// A flow to a node, for a connected `socket`. The node has so long to answer.
    pub fn accepted(
        socket: OwnedFd,
        (opener, patience): (Opener, Duration),
        node: SocketAddrV4,
        preface: Vec<u8>,
        now: Instant,
    ) -> HostSide {
        HostSide::new(socket, opener, Stage::GuestConnecting(now + patience), node, preface)
    }

    fn new(socket: OwnedFd, opener: Opener, stage: Stage, node: SocketAddrV4, preface: Vec<u8>) -> HostSide {
        HostSide {
            socket,
            opener,
            stage,
            node,
            preface,
            rest: Vec::new(),
            readable: false,
            writable: false,
            hung_up: false,
            read_done: false,
            write_done: false,
            broken: false,
        }
    }

    /// The socket, for the poller.
    pub fn socket(&self) -> impl AsFd + '_ {
        &self.socket
    }

    /// Whether the node's SYN is not to be answered yet.
    pub fn is_host_connecting(&self) -> bool {
        self.stage == Stage::HostConnecting
    }

    /// When [`HostSide::advance`] must be called again at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::GuestConnecting(deadline) => Some(deadline),
            _ => None,
        }
    }

    /// Nobody answers for the node's address: whether a connection of a forward waited for it, and does so no longer. A
    /// control client goes on waiting, as it may be for a node that starts.
    pub fn nobody_there(&mut self, now: Instant) -> bool {
        let waits = self.opener == Opener::Forward && matches!(self.stage, Stage::GuestConnecting(_));
        if waits {
            self.stage = Stage::GuestConnecting(now);
        }
        waits
    }

    /// The poller says what the socket is ready for (edge-triggered: it says so once).
    pub fn ready(&mut self, flags: EventFlags) {
        self.readable |=
            flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        self.writable |= flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
        self.hung_up |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
    }

    /// Do all that can be done now.
    pub fn advance(&mut self, tcp: &mut Socket<'_>, now: Instant) -> Outcome {
        if tcp.state() == State::Closed && tcp.remote_endpoint().is_none() || tcp.state() == State::Listen {
            return self.guest_is_gone();
        }
        if self.stage == Stage::HostConnecting {
            if !self.writable {
                return Outcome::Going;
            }
            self.stage = Stage::Joined;
            if let Ok(Err(e)) | Err(e) = rustix::net::sockopt::socket_error(&self.socket) {
                return Outcome::Unreachable(e);
            }
            // From now on one router's complaint is no reason to end it (RFC 1122 §4.2.3.9).
            let _ = error_queue::listen(&self.socket, false);
            tcp.pause_synack(false);
        }
        if let Stage::GuestConnecting(deadline) = self.stage {
            match tcp.state() {
                State::SynSent | State::SynReceived if now >= deadline => {
                    self.tell(&Reply::Error(format!(
                        "{} did not answer within {} seconds: is the node up, and does a firewall there drop it?",
                        self.node,
                        PATIENCE.as_secs()
                    )));
                    self.opener = Opener::Guest;
                    self.reset();
                    tcp.abort();
                    return Outcome::Going;
                }
                State::SynSent | State::SynReceived => return Outcome::Going,
                _ => {
                    self.stage = Stage::Joined;
                    self.tell(&Reply::Done);
                }
            }
        }
        if tcp.state() == State::Closed {
            // Aborted; the reset is still to be sent.
            return Outcome::Going;
        }
        if !self.broken && self.guest_to_host(tcp).is_err() {
            (self.broken, self.readable) = (true, true);
        }
        if self.host_to_guest(tcp).is_err() {
            (self.broken, self.read_done) = (true, true);
        }
        if !self.broken {
            self.take_rest(tcp);
        } else if self.read_done && tcp.send_queue() == 0 {
            self.rest.clear();
            tcp.abort();
        }
        Outcome::Going
    }

    /// Whether the node has closed for good, and the host has not yet taken all that it had sent.
    pub fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Whether the host's side has no more use for a flow whose node has closed, too.
    pub fn is_done(&self) -> bool {
        self.read_done && self.write_done
    }

    /// The node has reset the flow, refused it, or closed it for good.
    fn guest_is_gone(&mut self) -> Outcome {
        if let Stage::GuestConnecting(_) = self.stage {
            self.tell(&Reply::Error(format!("{} refused the connection", self.node)));
        }
        if self.has_rest() && self.send_rest().is_ok() {
            if self.has_rest() {
                return Outcome::Going;
            }
            self.write_done = rustix::net::shutdown(&self.socket, Shutdown::Write).is_ok();
        }
        Outcome::Finished
    }

    /// Take over what the stack holds for the host, once there comes no more.
    fn take_rest(&mut self, tcp: &mut Socket<'_>) {
        if matches!(tcp.state(), State::LastAck | State::Closing | State::TimeWait) {
            let rest = &mut self.rest;
            while tcp.can_recv() && tcp.recv(|bytes| (bytes.len(), rest.extend(&*bytes))).is_ok() {}
        }
    }

    fn send_rest(&mut self) -> Result<(), Errno> {
        while self.writable && self.has_rest() {
            match rustix::net::send(&self.socket, &self.rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.rest.drain(..sent.min(self.rest.len()))),
                Err(Errno::AGAIN) => self.writable = false,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn guest_to_host(&mut self, tcp: &mut Socket<'_>) -> Result<(), Errno> {
        self.send_rest()?;
        while self.writable && tcp.can_recv() {
            let socket = &self.socket;
            let sent = tcp.recv(|bytes| {
                match rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(sent) => (sent, Ok(())),
                    Err(e) => (0, Err(e)),
                }
            });
            match sent {
                Ok(Ok(())) => {}
                Ok(Err(Errno::AGAIN)) => self.writable = false,
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        let closed = matches!(
            tcp.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
        );
        if closed && !self.write_done && tcp.recv_queue() == 0 && !self.has_rest() {
            self.write_done = true;
            rustix::net::shutdown(&self.socket, Shutdown::Write)?;
        }
        Ok(())
    }

    fn host_to_guest(&mut self, tcp: &mut Socket<'_>) -> Result<(), Errno> {
        if !self.preface.is_empty() {
            let sent = tcp.send_slice(&self.preface).unwrap_or(0);
            self.preface.drain(..sent.min(self.preface.len()));
            if !self.preface.is_empty() {
                return Ok(());
            }
        }
        while self.readable && !self.read_done && tcp.can_send() {
            let (socket, hung_up) = (&self.socket, self.hung_up);
            let got = tcp.send(|room| {
                let len = room.len();
                match rustix::net::recv(socket, room, RecvFlags::DONTWAIT) {
                    Ok((got, _)) => (got, Ok((got, got < len))),
                    Err(e) => (0, Err(e)),
                }
            });
            match got {
                Ok(Ok((0, _))) => self.read_done = true,
                // Less than there was room for: nothing more is there, or the poller says so again (epoll(7)).
                Ok(Ok((_, true))) if !hung_up => self.readable = false,
                Ok(Ok(_)) => {}
                Ok(Err(Errno::AGAIN)) => self.readable = false,
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        // smoltcp 0.14 does not hear in LAST-ACK that a node has room again, and asks a second or more later: there
        // must be nothing left to send by then.
        let has_all = tcp.state() == State::Established || tcp.send_queue() == 0;
        if self.read_done && !self.broken && tcp.may_send() && has_all {
            tcp.close();
        }
        Ok(())
    }

    /// Tell a control client how its request went.
    fn tell(&self, reply: &Reply) {
        if self.opener == Opener::Dial
            && let Ok(mut line) = serde_json::to_vec(reply)
        {
            line.push(b'\n');
            // A client that has not even room for this line has gone wrong, and sees its connection end.
            let _ = rustix::net::send(&self.socket, &line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }

    /// Let the host's other end see a reset when the socket is closed.
    pub fn reset(&self) {
        if self.opener != Opener::Dial {
            let _ = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
        }
    }
}
