//! A socket of the host that sends a node's datagrams or echo requests as a router would: with the time to live that is left
//! of theirs, cut on the way only if they may be, and the node is told what others say of them.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto,
        sockopt::{self, Ipv4PathMtuDiscovery},
    },
};
use smoltcp::wire::{Icmpv4DstUnreachable, Ipv4Packet};

use super::{
    error_queue::{self, Report},
    seen_as,
};
use crate::{icmp_error::IcmpError, lan::Lan};

/// Bytes that are kept of the last packet, for errors about it.
const QUOTE: usize = 128;
/// ICMP types that are errors of routers and hosts (RFC 792): unreachable, time exceeded, parameter problem.
const ERRORS: [u8; 3] = [3, 11, 12];
/// Errors that are taken from one socket before others have their turn.
const BURST: usize = 64;

/// Room in bytes for datagrams on their way, in each direction: fifty of 8 KiB at once, each of which costs the kernel 16 KiB
/// and more. It counts everything twice.
const ROOM: usize = 1 << 20;

/// The socket.
#[derive(Debug)]
pub struct Datagrams {
    socket: OwnedFd,
    is_echo: bool,
    /// The other end's address, and as the node sees it.
    real: Ipv4Addr,
    outside: Ipv4Addr,
    /// What the socket is set to.
    ttl: u8,
    dont_frag: Option<bool>,
    /// Beginning of the packet that was sent last.
    last: Vec<u8>,
}

impl Datagrams {
    /// A socket for UDP datagrams to `real`.
    pub fn udp(real: SocketAddrV4, outside: Ipv4Addr) -> Result<Datagrams, Errno> {
        Datagrams::connect(None, real, outside)
    }

    /// A socket for echo requests to `real`: EACCES where the host does not allow any (icmp(7)).
    pub fn echo(real: Ipv4Addr, outside: Ipv4Addr) -> Result<Datagrams, Errno> {
        Datagrams::connect(Some(ipproto::ICMP), SocketAddrV4::new(real, 0), outside)
    }

    fn connect(
        protocol: Option<rustix::net::Protocol>,
        real: SocketAddrV4,
        outside: Ipv4Addr,
    ) -> Result<Datagrams, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, protocol)?;
        make_room(&socket);
        error_queue::listen(&socket, true)?;
        rustix::net::connect(&socket, &real)?;
        let (is_echo, real) = (protocol.is_some(), *real.ip());
        Ok(Datagrams { socket, is_echo, real, outside, ttl: 0, dont_frag: None, last: Vec::new() })
    }

    /// The socket, for the poller.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Send what a packet of the node carries.
    pub fn send(&mut self, packet: &Ipv4Packet<&[u8]>, payload: &[u8], lan: &mut Lan) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut sent = self.set_up(packet).and_then(|()| rustix::net::send(&self.socket, payload, flags));
        // An error about earlier packets ends this call, too, and once.
        if !matches!(sent, Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS)) && self.pass_errors(lan) {
            sent = rustix::net::send(&self.socket, payload, flags);
        }
        self.last.clear();
        self.last.extend(packet.as_ref().iter().take(QUOTE));
        match sent {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => {}
            Err(Errno::MSGSIZE) => {
                let mtu = sockopt::ip_mtu(&self.socket).ok().and_then(|mtu| u16::try_from(mtu).ok());
                lan.send_error(lan.gateway(), IcmpError::too_long(mtu.unwrap_or(0)), packet.as_ref());
            }
            Err(e) => lan.send_unreachable(packet, reason(e)),
        }
    }

    /// Next datagram into `buffer`: its length, or none if there is none now.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        for _ in 0..BURST {
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((len, _)) => return Some(len),
                Err(Errno::AGAIN) => return None,
                // It is in the error queue, too.
                Err(_) => {}
            }
        }
        None
    }

    /// Tell the node what others say of its packets. Whether there was anything.
    pub fn pass_errors(&mut self, lan: &mut Lan) -> bool {
        for n in 0..BURST {
            let Some(report) = error_queue::next(&self.socket) else { return n > 0 };
            if ERRORS.contains(&report.kind) {
                let from = seen_as(report.offender, self.real, self.outside, &self.socket, lan);
                let error = IcmpError { kind: report.kind, code: report.code, mtu: report.mtu };
                lan.send_error(from, error, &self.packet_of(&report));
            }
        }
        true
    }

    /// Beginning of the packet that an error is about: the last one, as far as is known.
    fn packet_of(&self, report: &Report) -> Vec<u8> {
        let mut packet = self.last.clone();
        let header = packet.first().map_or(0, |first| usize::from(first & 15).saturating_mul(4));
        // An echo request is quoted with its sequence number, and many of one flow may be under way.
        if let Some(room) = packet.get_mut(header.saturating_add(6)..header.saturating_add(8))
            && let Some(number) = report.about.get(6..8)
            && self.is_echo
        {
            room.copy_from_slice(number);
        }
        packet
    }

    /// Set the socket to what a packet's header says.
    fn set_up(&mut self, packet: &Ipv4Packet<&[u8]>) -> Result<(), Errno> {
        let ttl = packet.hop_limit().saturating_sub(1);
        if ttl != self.ttl {
            sockopt::set_ip_ttl(&self.socket, ttl.into())?;
            self.ttl = ttl;
        }
        if self.dont_frag != Some(packet.dont_frag()) {
            let discovery = match packet.dont_frag() {
                true => Ipv4PathMtuDiscovery::DO,
                false => Ipv4PathMtuDiscovery::DONT,
            };
            sockopt::set_ip_mtu_discover(&self.socket, discovery)?;
            self.dont_frag = Some(packet.dont_frag());
        }
        Ok(())
    }
}

/// Make room for datagrams that come at once: as much as root gets, or else as the host gives to all (`net.core.rmem_max`,
/// `net.core.wmem_max`).
pub fn make_room(socket: impl AsFd) {
    if sockopt::set_socket_recv_buffer_size_force(&socket, ROOM).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, ROOM);
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, ROOM).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&socket, ROOM);
    }
}

/// The ICMP code for what the host says.
pub fn reason(error: Errno) -> Icmpv4DstUnreachable {
    match error {
        Errno::HOSTUNREACH | Errno::HOSTDOWN => Icmpv4DstUnreachable::HostUnreachable,
        Errno::ACCESS | Errno::PERM => Icmpv4DstUnreachable::NetProhibited,
        _ => Icmpv4DstUnreachable::NetUnreachable,
    }
}
