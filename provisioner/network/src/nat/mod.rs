//! Address translation: what nodes send to the world outside goes through sockets of the host, one a flow. Which
//! addresses there are outside is [`Outside`]'s to say; [`tcp`] ends connections on its own TCP stack ([`stack`], [`splice`], [`connect`])
//! and joins their bytes, [`udp`] and [`icmp`] pass datagrams and echo requests on ([`datagrams`]). What becomes of any of
//! them on its way is known from the sockets' error queues ([`error_queue`]).

pub mod connect;
pub mod datagrams;
pub mod error_queue;
pub mod icmp;
pub mod splice;
pub mod stack;
pub mod tcp;
pub mod udp;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsFd,
    path::PathBuf,
};

use crate::lan::Lan;

/// The world outside of the lab, as it is reached through the host.
#[derive(Debug, Clone)]
pub struct Outside {
    /// The file with the host's resolvers.
    pub resolv_conf: PathBuf,
    /// The port where they are asked.
    pub dns_port: u16,
    /// Addresses that are really others: a test's or a benchmark's server on the loopback, for one, which nodes
    /// cannot reach by its own address.
    pub detours: HashMap<Ipv4Addr, Ipv4Addr>,
}

impl Default for Outside {
    /// The host's resolvers, and no detours.
    fn default() -> Outside {
        Outside {
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            dns_port: crate::dns::PORT,
            detours: HashMap::new(),
        }
    }
}

impl Outside {
    /// The host's address for a destination of a node; none if nodes may not go there: the host's loopback, and what
    /// is no single host's address.
    pub fn resolve(&self, destination: Ipv4Addr) -> Option<Ipv4Addr> {
        if let Some(detour) = self.detours.get(&destination) {
            return Some(*detour);
        }
        let [first, ..] = destination.octets();
        let refused = first == 0 || destination.is_loopback() || first >= 224;
        (!refused).then_some(destination)
    }
}

/// As whom a node sees the sender of an ICMP error about what it sent to `outside`, which is really `real` and is reached
/// by `socket`. The host itself is the gateway for nodes, and so is who has an address of the lab's subnet there.
pub fn seen_as(
    offender: Ipv4Addr,
    real: Ipv4Addr,
    outside: Ipv4Addr,
    socket: impl AsFd,
    lan: &Lan,
) -> Ipv4Addr {
    if offender == real {
        return outside;
    }
    let local = rustix::net::getsockname(socket).ok().and_then(|name| SocketAddrV4::try_from(name).ok());
    let is_host = local.is_some_and(|local| *local.ip() == offender);
    if is_host || lan.cidr.contains_addr(&offender) { lan.gateway() } else { offender }
}

/// The two ends of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The node's end.
    pub guest: SocketAddrV4,
    /// The other end, as the node sees it.
    pub outside: SocketAddrV4,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_do_not_reach_the_hosts_loopback() {
        let mut outside = Outside::default();
        let answers = [
            ([127, 0, 0, 1], false),
            ([127, 255, 0, 1], false),
            ([0, 0, 0, 0], false),
            ([224, 0, 0, 251], false),
            ([255, 255, 255, 255], false),
            ([192, 0, 2, 1], true),
            ([10, 0, 0, 1], true),
        ];
        for (ip, allowed) in answers {
            assert_eq!(outside.resolve(ip.into()).is_some(), allowed, "{ip:?}");
        }
        outside.detours.insert([198, 51, 100, 1].into(), Ipv4Addr::LOCALHOST);
        assert_eq!(outside.resolve([198, 51, 100, 1].into()), Some(Ipv4Addr::LOCALHOST));
    }
}
