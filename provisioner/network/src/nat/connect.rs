//! How a node's connection to the outside is begun by the host, and how the node hears that it failed.

use std::{
    net::SocketAddrV4,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, sockopt},
};
use smoltcp::wire::{Icmpv4DstUnreachable, Ipv4Packet};

use super::{Outside, error_queue, seen_as};
use crate::{icmp_error::IcmpError, lan::Lan};

/// Begin a connection, whose packets have that time to live: what was left of the SYN's of the node.
pub fn connect(to: SocketAddrV4, ttl: u8) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_ip_ttl(&socket, ttl.into())?;
    error_queue::listen(&socket, true)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(e) => Err(e),
    }
}

/// Tell a node why the host could not connect. Whether that is all that it is to hear: a SYN whose time to live has ended
/// on the way was not refused by anybody.
pub fn tell_why(
    error: Errno,
    to: SocketAddrV4,
    socket: impl AsFd,
    syn: &[u8],
    outside: &Outside,
    lan: &mut Lan,
) -> bool {
    let Ok(packet) = Ipv4Packet::new_checked(syn) else { return false };
    if let Some(report) = error_queue::next(&socket) {
        let real = outside.resolve(*to.ip()).unwrap_or(*to.ip());
        let from = seen_as(report.offender, real, *to.ip(), &socket, lan);
        lan.send_error(from, IcmpError { kind: report.kind, code: report.code, mtu: 0 }, syn);
        return report.kind == IcmpError::TIME_EXCEEDED.kind;
    }
    if let Some(reason) = unreachable(error) {
        lan.send_unreachable(&packet, reason);
    }
    false
}

/// The ICMP code for what the host says; none where a reset says it.
pub fn unreachable(error: Errno) -> Option<Icmpv4DstUnreachable> {
    match error {
        Errno::NETUNREACH | Errno::NETDOWN => Some(Icmpv4DstUnreachable::NetUnreachable),
        Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT => Some(Icmpv4DstUnreachable::HostUnreachable),
        Errno::ACCESS | Errno::PERM => Some(Icmpv4DstUnreachable::NetProhibited),
        _ => None,
    }
}
