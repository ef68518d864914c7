//! The DHCP server (RFC 2131): a node gets the address that the lab's file gives it, any other card one that is
//! free. Leases are long, and kept only here: an address belongs to a MAC address for as long as the network lives, or
//! until the card has given it back and another has need of it.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
};

use crate::{dns, hosts::Hosts, lan::Lan};

/// Length of a lease in seconds: a year.
const LEASE_SECONDS: u32 = 365 * 24 * 3600;
/// Most cards that the lab's file does not know.
const MAX_GUESTS: usize = 1024;
/// For how long nobody gets an address that a client has declined, since it is somebody's already.
const DECLINED: Duration = Duration::from_secs(600);
/// Most addresses that are left out for that.
const MAX_DECLINED: usize = 256;

const HOST_NAME: u8 = 12;
const DOMAIN_NAME: u8 = 15;
const NTP_SERVERS: u8 = 42;
const REQUESTED_IP: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER_IDENTIFIER: u8 = 54;
const PARAMETERS: u8 = 55;
const CLIENT_IDENTIFIER: u8 = 61;
const DOMAIN_SEARCH: u8 = 119;
/// Offset of the flags field, and its BROADCAST bit.
const FLAGS: std::ops::Range<usize> = 10..12;
const BROADCAST: u8 = 0x80;

/// The server.
#[derive(Debug)]
pub struct Dhcp {
    domain: String,
    guests: HashMap<EthernetAddress, Lease>,
    /// Addresses that were declined, and until when they are left out.
    declined: HashMap<Ipv4Addr, Instant>,
}

/// The address of a card that the lab's file does not know.
#[derive(Debug)]
struct Lease {
    ip: Ipv4Addr,
    /// From then on, another card gets the address if no other is left. What is only offered ends at once.
    end: Instant,
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
        Dhcp { domain, guests: HashMap::new(), declined: HashMap::new() }
    }

    /// Take a client's message, which came from `station`, and send the answer. `search` are the host's search domains:
    /// who asks for such gets them behind the lab's own.
    pub fn handle(
        &mut self,
        message: &[u8],
        station: EthernetAddress,
        hosts: &Hosts,
        search: &[String],
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
                Some(ip) if ip == asked => {
                    self.end_at(client, ip, lan.now + Duration::from_secs(LEASE_SECONDS.into()));
                    (DhcpMessageType::Ack, ip)
                }
                _ => (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
            },
            DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
            DhcpMessageType::Release => {
                self.end_at(client, request.client_ip(), lan.now);
                return Answer::None;
            }
            DhcpMessageType::Decline => {
                self.decline(client, asked, lan.now);
                return Answer::None;
            }
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
        let wants = |kind: u8| !refused && option(PARAMETERS).is_some_and(|wanted| wanted.contains(&kind));
        let time = lan.gateway().octets();
        if wants(NTP_SERVERS) {
            additional.push(DhcpOption { kind: NTP_SERVERS, data: &time });
        }
        let domains = dns::search::option(&self.domain, search);
        if !search.is_empty() && wants(DOMAIN_SEARCH) {
            additional.push(DhcpOption { kind: DOMAIN_SEARCH, data: &domains });
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

    /// A card has found that its address is used by another (RFC 2131 §4.3.3).
    fn decline(&mut self, client: EthernetAddress, ip: Ipv4Addr, now: Instant) {
        if self.guests.get(&client).is_some_and(|lease| lease.ip == ip) {
            self.guests.remove(&client);
            self.declined.retain(|_, until| *until > now);
            if self.declined.len() < MAX_DECLINED {
                self.declined.insert(ip, now + DECLINED);
            }
        }
    }

    /// A card that has that address keeps it up to then.
    fn end_at(&mut self, client: EthernetAddress, ip: Ipv4Addr, end: Instant) {
        if let Some(lease) = self.guests.get_mut(&client).filter(|lease| lease.ip == ip) {
            lease.end = end;
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
        if let Some(lease) = self.guests.get(&client)
            && hosts.by_ip(lease.ip).is_none()
        {
            return Some(lease.ip);
        }
        self.guests.remove(&client);
        let usable = |ip: &Ipv4Addr| {
            if self.declined.get(ip).is_some_and(|until| *until > lan.now) {
                return false;
            }
            let heard = lan.neighbors.lookup(*ip, lan.now);
            lan.is_node(*ip) && hosts.by_ip(*ip).is_none() && heard.is_none_or(|station| station == client)
        };
        let taken: HashSet<Ipv4Addr> = self.guests.values().map(|lease| lease.ip).collect();
        // Otherwise from the end of the subnet, far from where people number their nodes.
        let last = u32::from(lan.cidr.broadcast()?).checked_sub(1)?;
        let first = u32::from(lan.cidr.network().address()).checked_add(1)?;
        let mut all = std::iter::once(asked).chain((first..=last).rev().map(Ipv4Addr::from));
        let free = if self.guests.len() < MAX_GUESTS {
            all.find(|ip| usable(ip) && !taken.contains(ip))
        } else {
            None
        };
        let ip = match free {
            Some(ip) => ip,
            // Cards that come for a short time often go without a word.
            None => {
                let mut ended: Vec<_> = self
                    .guests
                    .iter()
                    .filter(|(_, lease)| lease.end <= lan.now && usable(&lease.ip))
                    .collect();
                ended.sort_by_key(|(_, lease)| lease.end);
                let oldest = *ended.first()?.0;
                self.guests.remove(&oldest)?.ip
            }
        };
        self.guests.insert(client, Lease { ip, end: lan.now });
        Some(ip)
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
        assert_eq!(address(2, [10, 0, 0, 4]), Some([10, 0, 0, 5].into()), "kept");
    }

    /// What is answered to a card, which wants an address or has it.
    fn ask(dhcp: &mut Dhcp, lan: &mut Lan, n: u16, message_type: DhcpMessageType, ip: [u8; 4]) -> Answer {
        let message = DhcpRepr {
            message_type,
            transaction_id: 1,
            secs: 0,
            client_hardware_address: card(n),
            client_ip: ip.into(),
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: None,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut DhcpPacket::new_unchecked(bytes.as_mut_slice())).unwrap();
        lan.now += Duration::from_secs(1);
        dhcp.handle(&bytes, card(n), &Hosts::default(), &[], lan)
    }

    #[test]
    fn what_is_offered_or_given_back_is_given_again() {
        use DhcpMessageType::{Discover, Release, Request};
        let mut lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 29)).unwrap();
        let mut dhcp = Dhcp::new("test.lab".into());
        let lease = |last| Answer::Lease([10, 0, 0, last].into());
        let mut ask = |n, kind, last| ask(&mut dhcp, &mut lan, n, kind, [10, 0, 0, last]);
        for n in 2..7 {
            assert_eq!(ask(n, Discover, 0), Answer::Reply);
        }
        // Offered were 6, 5, 4, 3 and 2; the first two are taken.
        assert_eq!((ask(2, Request, 6), ask(3, Request, 5)), (lease(6), lease(5)));
        assert_eq!((ask(12, Request, 4), ask(13, Request, 3)), (lease(4), lease(3)));
        assert_eq!(ask(14, Request, 2), lease(2));
        assert_eq!(ask(7, Discover, 0), Answer::None, "the subnet is full");
        assert_eq!(ask(2, Release, 5), Answer::None, "that is another's");
        assert_eq!(ask(7, Discover, 0), Answer::None);
        assert_eq!(ask(2, Release, 6), Answer::None);
        assert_eq!(ask(2, Request, 6), lease(6), "it is still the same card's");
        assert_eq!((ask(3, Release, 5), ask(7, Request, 5)), (Answer::None, lease(5)));
        assert_eq!(ask(3, Discover, 0), Answer::None);
        lan.now += Duration::from_secs(LEASE_SECONDS.into());
        assert_eq!(
            dhcp.address_of(card(3), [0; 4].into(), &Hosts::default(), &lan),
            Some([10, 0, 0, 4].into())
        );
    }

    #[test]
    fn what_is_declined_is_nobody_s_for_a_while() {
        use DhcpMessageType::{Decline, Discover, Request};
        let mut lan = Lan::new(Ipv4Cidr::new(Ipv4Addr::new(10, 0, 0, 1), 29)).unwrap();
        let mut dhcp = Dhcp::new("test.lab".into());
        let lease = |last| Answer::Lease([10, 0, 0, last].into());
        let mut ask = |n, kind, last| ask(&mut dhcp, &mut lan, n, kind, [10, 0, 0, last]);
        assert_eq!((ask(2, Discover, 0), ask(2, Request, 6)), (Answer::Reply, lease(6)));
        assert_eq!(ask(3, Decline, 6), Answer::None, "it is another's");
        assert_eq!(ask(2, Request, 6), lease(6));
        assert_eq!(ask(2, Decline, 6), Answer::None);
        assert_eq!((ask(2, Discover, 6), ask(2, Request, 6)), (Answer::Reply, Answer::Reply), "refused");
        assert_eq!(ask(2, Request, 5), lease(5));
        lan.now += DECLINED;
        assert_eq!(
            dhcp.address_of(card(3), [10, 0, 0, 6].into(), &Hosts::default(), &lan),
            Some([10, 0, 0, 6].into())
        );
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
            Dhcp::new("test.lab".into()).handle(&bytes, card(1), &Hosts::default(), &["corp.example".into()], &mut lan);
        }
    }
}
