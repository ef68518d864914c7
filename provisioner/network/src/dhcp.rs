//! The DHCP server (RFC 2131): a node gets the address that the lab's file gives it, any other card one that is
//! free. Leases are long, and kept only here: an address belongs to a MAC address for as long as the network lives.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddrV4},
};

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
};

use crate::{hosts::Hosts, lan::Lan};

/// Length of a lease in seconds: a year.
const LEASE_SECONDS: u32 = 365 * 24 * 3600;
/// Most cards that the lab's file does not know.
const MAX_GUESTS: usize = 1024;

const HOST_NAME: u8 = 12;
const DOMAIN_NAME: u8 = 15;
const REQUESTED_IP: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER_IDENTIFIER: u8 = 54;
const CLIENT_IDENTIFIER: u8 = 61;
/// Offset of the flags field, and its BROADCAST bit.
const FLAGS: std::ops::Range<usize> = 10..12;
const BROADCAST: u8 = 0x80;

/// The server.
#[derive(Debug)]
pub struct Dhcp {
    domain: String,
    guests: HashMap<EthernetAddress, Ipv4Addr>,
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nothing.
    None,
    /// Something that gives no address: an offer, a refusal, parameters.
    Reply,
    /// A lease.
    Lease(Ipv4Addr),
}

impl Dhcp {
    /// A server for the domain `LAB.lab`.
    pub fn new(domain: String) -> Dhcp {
        Dhcp { domain, guests: HashMap::new() }
    }

    /// Take a client's message, which came from `station`, and send the answer.
    pub fn handle(
        &mut self,
        message: &[u8],
        station: EthernetAddress,
        hosts: &Hosts,
        lan: &mut Lan,
    ) -> Answer {
        let Ok(request) = DhcpPacket::new_checked(message) else { return Answer::None };
        let client = request.client_hardware_address();
        // Requests through relays are not for this network.
        if u8::from(request.opcode()) != 1 || client != station || !request.relay_agent_ip().is_unspecified()
        {
            return Answer::None;
        }
        let option =
            |kind: u8| request.options().find(|option| option.kind == kind).map(|option| option.data);
        let address = |kind: u8| match option(kind) {
            Some(&[a, b, c, d]) => Some(Ipv4Addr::new(a, b, c, d)),
            _ => None,
        };
        let Some(&[kind]) = option(MESSAGE_TYPE) else { return Answer::None };
        if address(SERVER_IDENTIFIER).is_some_and(|server| server != lan.gateway()) {
            return Answer::None;
        }
        let asked = address(REQUESTED_IP).unwrap_or(request.client_ip());
        let (message_type, ip) = match DhcpMessageType::from(kind) {
            DhcpMessageType::Discover => match self.address_of(client, asked, hosts, lan) {
                Some(ip) => (DhcpMessageType::Offer, ip),
                None => return Answer::None,
            },
            DhcpMessageType::Request => match self.address_of(client, asked, hosts, lan) {
                Some(ip) if ip == asked => (DhcpMessageType::Ack, ip),
                _ => (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
            },
            DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
            _ => return Answer::None,
        };
        let refused = message_type == DhcpMessageType::Nak;
        let name = hosts.by_mac(client).map(|host| host.name.clone());
        let mut additional = Vec::new();
        if let Some(name) = name.as_ref().filter(|_| !refused) {
            additional.push(DhcpOption { kind: HOST_NAME, data: name.as_bytes() });
        }
        if !refused {
            additional.push(DhcpOption { kind: DOMAIN_NAME, data: self.domain.as_bytes() });
        }
        if let Some(data) = option(CLIENT_IDENTIFIER) {
            // RFC 6842: it is sent back.
            additional.push(DhcpOption { kind: CLIENT_IDENTIFIER, data });
        }
        let gateway = lan.gateway();
        let broadcast =
            message.get(FLAGS).and_then(|flags| flags.first()).is_some_and(|b| b & BROADCAST != 0);
        let reply = DhcpRepr {
            message_type,
            transaction_id: request.transaction_id(),
            secs: 0,
            client_hardware_address: client,
            client_ip: request.client_ip(),
            your_ip: ip,
            server_ip: gateway,
            router: (!refused).then_some(gateway),
            subnet_mask: (!refused).then_some(lan.cidr.netmask()),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(gateway),
            parameter_request_list: None,
            dns_servers: (!refused).then(|| [gateway].into_iter().collect()),
            max_size: None,
            lease_duration: (!refused && !ip.is_unspecified()).then_some(LEASE_SECONDS),
            renew_duration: None,
            rebind_duration: None,
            additional_options: &additional,
        };
        // RFC 2131 §4.1 says where an answer goes. BOOTP's minimum of 300 bytes is still asked for by some clients.
        let mut bytes = vec![0; reply.buffer_len().max(300)];
        if reply.emit(&mut DhcpPacket::new_unchecked(bytes.as_mut_slice())).is_err() {
            return Answer::None;
        }
        let (to, station) = if !request.client_ip().is_unspecified() && !refused {
            (request.client_ip(), client)
        } else if broadcast || refused {
            (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST)
        } else {
            (ip, client)
        };
        let from = SocketAddrV4::new(gateway, DHCP_SERVER_PORT);
        let Some(len) = lan.lay_udp(from, SocketAddrV4::new(to, DHCP_CLIENT_PORT), &bytes) else {
            return Answer::None;
        };
        lan.send_to_station(station, len);
        match message_type {
            DhcpMessageType::Ack if !ip.is_unspecified() => Answer::Lease(ip),
            _ => Answer::Reply,
        }
    }

    /// The address that belongs to a card, found now if it has none yet: the one that it asks for if that is free.
    fn address_of(
        &mut self,
        client: EthernetAddress,
        asked: Ipv4Addr,
        hosts: &Hosts,
        lan: &Lan,
    ) -> Option<Ipv4Addr> {
        if let Some(host) = hosts.by_mac(client) {
            self.guests.remove(&client);
            return Some(host.ip);
        }
        if let Some(ip) = self.guests.get(&client)
            && hosts.by_ip(*ip).is_none()
        {
            return Some(*ip);
        }
        self.guests.remove(&client);
        if self.guests.len() >= MAX_GUESTS {
            return None;
        }
        let taken: HashSet<Ipv4Addr> = self.guests.values().copied().collect();
        let free = |ip: &Ipv4Addr| {
            let heard = lan.neighbors.lookup(*ip, lan.now);
            lan.is_node(*ip)
                && hosts.by_ip(*ip).is_none()
                && !taken.contains(ip)
                && heard.is_none_or(|station| station == client)
        };
        // Otherwise from the end of the subnet, far from where people number their nodes.
        let last = u32::from(lan.cidr.broadcast()?).checked_sub(1)?;
        let first = u32::from(lan.cidr.network().address()).checked_add(1)?;
        let found = std::iter::once(asked).chain((first..=last).rev().map(Ipv4Addr::from)).find(free)?;
        self.guests.insert(client, found);
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::Ipv4Cidr;

    use super::*;

    fn card(n: u16) -> EthernetAddress {
        let [a, b] = n.to_be_bytes();
        EthernetAddress([2, 0, 0, 0, a, b])
    }

    #[test]
    fn unknown_cards_get_what_is_free_and_keep_it() {
        let lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 29)).unwrap();
        let host = crate::config::Host {
            name: "w1".into(),
            mac: card(1).to_string().replace('-', ":"),
            ip: Ipv4Addr::new(10, 0, 0, 6),
        };
        let hosts = Hosts::new(vec![host], &lan).unwrap();
        let mut dhcp = Dhcp::new("test.lab".into());
        let mut address = |n, asked: [u8; 4]| dhcp.address_of(card(n), asked.into(), &hosts, &lan);
        assert_eq!(address(1, [0; 4]), Some([10, 0, 0, 6].into()), "the file's");
        assert_eq!(address(2, [0; 4]), Some([10, 0, 0, 5].into()));
        assert_eq!(address(3, [10, 0, 0, 2]), Some([10, 0, 0, 2].into()), "asked for, and free");
        assert_eq!(address(4, [10, 0, 0, 2]), Some([10, 0, 0, 4].into()), "asked for, but taken");
        assert_eq!(address(5, [10, 0, 0, 1]), Some([10, 0, 0, 3].into()), "the gateway's is never free");
        assert_eq!(address(6, [0; 4]), None, "the subnet is full");
        assert_eq!(address(2, [10, 0, 0, 4]), Some([10, 0, 0, 5].into()), "kept");
    }

    proptest! {
        #[test]
        fn random_messages_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 24)).unwrap();
            if let [op, _, _, _, rest @ ..] = bytes.as_mut_slice() {
                *op = 1;
                if let Some(chaddr) = rest.get_mut(24..30) {
                    chaddr.copy_from_slice(card(1).as_bytes());
                }
                if let Some(relay) = rest.get_mut(20..24) {
                    relay.fill(0);
                }
                if let Some(options) = rest.get_mut(236..239) {
                    options.copy_from_slice(&[53, 1, 1]);
                }
            }
            Dhcp::new("test.lab".into()).handle(&bytes, card(1), &Hosts::default(), &mut lan);
        }
    }
}
