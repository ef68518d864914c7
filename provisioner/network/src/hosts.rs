//! The lab's nodes: their names, MAC addresses and fixed IP addresses, checked once.

use std::{collections::HashMap, net::Ipv4Addr};

use smoltcp::wire::EthernetAddress;

use crate::{config::Host, lan::Lan};

/// Most nodes of a lab.
pub const MAX_HOSTS: usize = 1024;

/// Why a list of nodes was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More than [`MAX_HOSTS`].
    #[error("{0} nodes are more than the {MAX_HOSTS} that one network can have")]
    TooMany(usize),
    /// Not a host name.
    #[error("node name {0:?} is not a host name: use letters, digits and `-`, at most 63")]
    Name(String),
    /// Not a MAC address of a card.
    #[error("node {name}: {mac:?} is not the MAC address of a card: write it as 52:54:00:aa:bb:cc")]
    Mac {
        /// The node.
        name: String,
        /// What was given.
        mac: String,
    },
    /// Not an address for a node.
    #[error("node {name}: {ip} is not an address for a node in {subnet}, whose gateway is {gateway}")]
    Address {
        /// The node.
        name: String,
        /// What was given.
        ip: Ipv4Addr,
        /// The lab's subnet.
        subnet: String,
        /// The gateway.
        gateway: Ipv4Addr,
    },
    /// Two nodes share a name, a MAC address or an IP address.
    #[error("nodes {first} and {second} both have {what}")]
    Duplicate {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// What they share.
        what: String,
    },
}

/// The nodes, by everything that they are looked up by.
#[derive(Debug, Default)]
pub struct Hosts {
    hosts: Vec<(Host, EthernetAddress)>,
    names: HashMap<String, usize>,
    macs: HashMap<EthernetAddress, usize>,
    ips: HashMap<Ipv4Addr, usize>,
}

impl Hosts {
    /// Check a list of nodes.
    pub fn new(hosts: Vec<Host>, lan: &Lan) -> Result<Hosts, Error> {
        if hosts.len() > MAX_HOSTS {
            return Err(Error::TooMany(hosts.len()));
        }
        let mut table = Hosts::default();
        for host in hosts {
            let Host { name, mac, ip } = host.clone();
            if !is_host_name(&name) {
                return Err(Error::Name(name));
            }
            let Some(address) = mac.parse::<EthernetAddress>().ok().filter(EthernetAddress::is_unicast)
            else {
                return Err(Error::Mac { name, mac });
            };
            if !lan.is_node(ip) {
                let subnet = lan.cidr.network().to_string();
                return Err(Error::Address { name, ip, subnet, gateway: lan.gateway() });
            }
            let index = table.hosts.len();
            let taken = [
                table.names.insert(name.to_ascii_lowercase(), index).map(|n| (n, format!("the name {name}"))),
                table.macs.insert(address, index).map(|n| (n, format!("the MAC address {mac}"))),
                table.ips.insert(ip, index).map(|n| (n, format!("the address {ip}"))),
            ];
            if let Some((other, what)) = taken.into_iter().flatten().next() {
                let first = table.hosts.get(other).map(|(host, _)| host.name.clone()).unwrap_or_default();
                return Err(Error::Duplicate { first, second: name, what });
            }
            table.hosts.push((host, address));
        }
        Ok(table)
    }

    /// The node of that name; upper and lower case are the same.
    pub fn by_name(&self, name: &str) -> Option<&Host> {
        self.get(self.names.get(&name.to_ascii_lowercase()))
    }

    /// The node with that MAC address.
    pub fn by_mac(&self, mac: EthernetAddress) -> Option<&Host> {
        self.get(self.macs.get(&mac))
    }

    /// The node with that IP address.
    pub fn by_ip(&self, ip: Ipv4Addr) -> Option<&Host> {
        self.get(self.ips.get(&ip))
    }

    fn get(&self, index: Option<&usize>) -> Option<&Host> {
        self.hosts.get(*index?).map(|(host, _)| host)
    }
}

fn is_host_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::Ipv4Cidr;

    use super::*;

    fn host(name: &str, mac: &str, ip: [u8; 4]) -> Host {
        Host { name: name.into(), mac: mac.into(), ip: ip.into() }
    }

    #[test]
    fn wrong_lists_are_refused_in_words() {
        let lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 1, 0, 1), 24)).unwrap();
        let good = host("w1", "52:54:00:00:00:01", [10, 1, 0, 11]);
        let cases = [
            (
                host("w_2", "52:54:00:00:00:02", [10, 1, 0, 12]),
                "node name \"w_2\" is not a host name: use letters, digits and `-`, at most 63",
            ),
            (
                host("w2", "52:54:00", [10, 1, 0, 12]),
                "node w2: \"52:54:00\" is not the MAC address of a card: write it as 52:54:00:aa:bb:cc",
            ),
            (
                host("w2", "ff:ff:ff:ff:ff:ff", [10, 1, 0, 12]),
                "node w2: \"ff:ff:ff:ff:ff:ff\" is not the MAC address of a card: write it as 52:54:00:aa:bb:cc",
            ),
            (
                host("w2", "52:54:00:00:00:02", [10, 1, 0, 1]),
                "node w2: 10.1.0.1 is not an address for a node in 10.1.0.0/24, whose gateway is 10.1.0.1",
            ),
            (
                host("w2", "52:54:00:00:00:02", [10, 1, 0, 255]),
                "node w2: 10.1.0.255 is not an address for a node in 10.1.0.0/24, whose gateway is 10.1.0.1",
            ),
            (host("W1", "52:54:00:00:00:02", [10, 1, 0, 12]), "nodes w1 and W1 both have the name W1"),
            (
                host("w2", "52:54:00:00:00:01", [10, 1, 0, 12]),
                "nodes w1 and w2 both have the MAC address 52:54:00:00:00:01",
            ),
            (
                host("w2", "52:54:00:00:00:02", [10, 1, 0, 11]),
                "nodes w1 and w2 both have the address 10.1.0.11",
            ),
        ];
        for (bad, message) in cases {
            assert_eq!(Hosts::new(vec![good.clone(), bad], &lan).unwrap_err().to_string(), message);
        }
        let hosts = Hosts::new(vec![good.clone()], &lan).unwrap();
        assert_eq!(hosts.by_name("W1"), Some(&good));
        assert_eq!(hosts.by_ip(good.ip), Some(&good));
    }
}
