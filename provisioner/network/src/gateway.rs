//! The gateway: what is done with the packets that nodes send to it or through it.

use std::{
    net::SocketAddrV4,
    time::{Instant, SystemTime},
};

use smoltcp::wire::{DHCP_SERVER_PORT, Icmpv4DstUnreachable, IpProtocol, Ipv4Packet, UdpPacket};

use crate::{
    cache::Cache,
    dhcp::{self, Dhcp},
    dns::{
        self,
        relay::Relay,
        resolvers::Resolvers,
        zone::{Verdict, Zone},
    },
    forward::Forwards,
    fragment::Reassembly,
    frame::{ARP, Frame, IPV4},
    hosts::Hosts,
    icmp_error::IcmpError,
    lan::Lan,
    nat::{
        Outside,
        icmp::IcmpFlows,
        stack::Stack,
        tcp::{Names, TcpFlows},
        udp::UdpFlows,
    },
    ntp,
};

/// Everything that lives on the gateway.
pub struct Gateway {
    /// The nodes.
    pub hosts: Hosts,
    /// TCP flows.
    pub tcp: TcpFlows,
    /// UDP flows.
    pub udp: UdpFlows,
    /// ICMP flows.
    pub icmp: IcmpFlows,
    /// Port forwards.
    pub forwards: Forwards,
    /// DNS queries for the host's resolvers.
    pub relay: Relay,
    /// The host's resolvers.
    pub resolvers: Resolvers,
    dhcp: Dhcp,
    fragments: Reassembly,
    domain: String,
}

impl Gateway {
    /// A gateway for the lab of that name. `descriptors` is the number of sockets that its flows may have together,
    /// `seed` makes its TCP sequence numbers hard to guess.
    pub fn new(
        lab: &str,
        hosts: Hosts,
        outside: &Outside,
        cache: Option<Cache>,
        descriptors: usize,
        seed: u64,
        lan: &mut Lan,
    ) -> Gateway {
        let domain = format!("{}.lab", lab.to_ascii_lowercase());
        Gateway {
            hosts,
            tcp: TcpFlows::new(Stack::new(lan, seed), outside.clone(), cache, descriptors / 4 * 3),
            udp: UdpFlows::new(outside.clone(), descriptors / 8),
            icmp: IcmpFlows::new(outside.clone()),
            forwards: Forwards::default(),
            relay: Relay::default(),
            resolvers: Resolvers::new(outside.resolv_conf.clone(), outside.dns_port),
            dhcp: Dhcp::new(domain.clone()),
            fragments: Reassembly::default(),
            domain,
        }
    }

    /// Number of flows through the gateway.
    pub fn flows(&self) -> usize {
        [self.tcp.count(), self.udp.count(), self.icmp.count(), self.forwards.count(), self.relay.under_way()]
            .into_iter()
            .fold(0, usize::saturating_add)
    }

    /// Take a frame for the gateway, which came in at `port`.
    pub fn input(&mut self, port: u64, frame: &Frame, lan: &mut Lan) {
        match frame.ethertype {
            ARP => lan.arp(frame.payload(), frame.source),
            IPV4 => self.packet(port, frame, frame.payload(), lan),
            _ => {}
        }
    }

    /// Let all flows that have something to do, do it.
    pub fn run(&mut self, lan: &mut Lan) {
        let zone = Zone { domain: &self.domain, hosts: &self.hosts, cidr: lan.cidr };
        self.tcp.run(&mut Names { zone, resolvers: &mut self.resolvers }, lan);
    }

    /// When [`Gateway::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        [
            self.tcp.deadline(),
            self.udp.deadline(),
            self.icmp.deadline(),
            self.forwards.deadline(),
            self.relay.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Do what is due.
    pub fn expire(&mut self, lan: &mut Lan) {
        self.tcp.expire(lan.now);
        self.udp.expire(lan.now);
        self.icmp.expire(lan.now);
        self.forwards.expire(lan.now);
        self.relay.expire(&mut self.resolvers, lan);
    }

    /// Whether a packet for the outside has come to the end of its time to live here: the gateway is a hop (RFC 1812
    /// §5.3.1).
    fn is_over(packet: &Ipv4Packet<&[u8]>, lan: &mut Lan) -> bool {
        let over = packet.hop_limit() <= 1 && packet.dst_addr() != lan.gateway();
        if over {
            lan.send_error(lan.gateway(), IcmpError::TIME_EXCEEDED, packet.as_ref());
        }
        over
    }

    /// Take an IPv4 packet, which came in `frame` or in it and others.
    fn packet(&mut self, port: u64, frame: &Frame, bytes: &[u8], lan: &mut Lan) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        if packet.version() != 4 || packet.header_len() < 20 {
            return;
        }
        if packet.more_frags() || packet.frag_offset() != 0 {
            let through = frame.destination.is_unicast() && lan.is_node(packet.src_addr());
            if through && let Some(whole) = self.fragments.add(port, &packet, lan.now) {
                self.packet(port, frame, &whole, lan);
            }
            return;
        }
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        if packet.next_header() == IpProtocol::Udp
            && let Ok(datagram) = UdpPacket::new_checked(packet.payload())
        {
            if datagram.dst_port() == DHCP_SERVER_PORT && (to.is_broadcast() || to == lan.gateway()) {
                return self.dhcp(port, frame, &datagram, lan);
            }
            if lan.is_node(from) && frame.destination.is_unicast() {
                lan.heard(from, frame.source);
                self.udp(&packet, &datagram, lan);
            }
            return;
        }
        // Nobody but a node of this subnet can be answered; and what nodes send to each other is the switch's.
        if !lan.is_node(from) || !frame.destination.is_unicast() || lan.is_node(to) {
            return;
        }
        lan.heard(from, frame.source);
        if Gateway::is_over(&packet, lan) {
            return;
        }
        match packet.next_header() {
            IpProtocol::Tcp => self.tcp.input(&packet, lan),
            IpProtocol::Icmp if to == lan.gateway() => {
                self.forwards.refused(&packet, lan);
                self.icmp.input(&packet, lan);
            }
            IpProtocol::Icmp => self.icmp.input(&packet, lan),
            _ => lan.send_unreachable(&packet, Icmpv4DstUnreachable::ProtoUnreachable),
        }
    }

    fn udp(&mut self, packet: &Ipv4Packet<&[u8]>, datagram: &UdpPacket<&[u8]>, lan: &mut Lan) {
        let to = packet.dst_addr();
        if lan.is_node(to) || Some(to) == lan.cidr.broadcast() {
            return;
        }
        if Gateway::is_over(packet, lan) {
            return;
        }
        if to != lan.gateway() {
            return self.udp.input(packet, datagram, lan);
        }
        if datagram.dst_port() == dns::PORT {
            let guest = SocketAddrV4::new(packet.src_addr(), datagram.src_port());
            let zone = Zone { domain: &self.domain, hosts: &self.hosts, cidr: lan.cidr };
            match zone.decide(datagram.payload()) {
                Verdict::Answer(answer) => {
                    lan.send_udp(SocketAddrV4::new(lan.gateway(), dns::PORT), guest, &answer);
                }
                Verdict::Relay => self.relay.ask(guest, datagram.payload(), &mut self.resolvers, lan),
                Verdict::Drop => {}
            }
        } else if datagram.dst_port() == ntp::PORT {
            if let Some(answer) = ntp::answer(datagram.payload(), SystemTime::now()) {
                let guest = SocketAddrV4::new(packet.src_addr(), datagram.src_port());
                lan.send_udp(SocketAddrV4::new(lan.gateway(), ntp::PORT), guest, &answer);
            }
        } else if !self.forwards.input(packet, datagram, lan.now) {
            lan.send_unreachable(packet, Icmpv4DstUnreachable::PortUnreachable);
        }
    }

    fn dhcp(&mut self, port: u64, frame: &Frame, datagram: &UdpPacket<&[u8]>, lan: &mut Lan) {
        let search = self.resolvers.search(lan.now);
        let answer = self.dhcp.handle(datagram.payload(), frame.source, &self.hosts, search, lan);
        if let dhcp::Answer::Lease(ip) = answer
            && let Some(port) = lan.switch.port(port)
            // A container's card behind the node's is not the node.
            && self.hosts.by_name(&port.name).is_none_or(|host| host.ip == ip)
        {
            port.leased = Some(ip);
        }
    }
}
