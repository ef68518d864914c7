//! The lab's side of the gateway: how an IP packet gets to a node. Everything that talks to nodes does it through
//! here, with one buffer for what is being sent.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Instant,
};

use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        ArpOperation, ArpPacket, ArpRepr, EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Cidr,
        Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
    },
};

use crate::{
    frame::{ARP, ETHERNET_LEN, HEADER_LEN, IPV4, MAX_PACKET, Offload, write_headers},
    icmp_error::Allowance,
    log::Notices,
    neighbor::Neighbors,
    poller::Poller,
    port::Port,
    switch::Switch,
};

/// Longest IP packet on the lab's wire in bytes.
pub const MTU: usize = 1500;
/// Where the IP packet starts in the send buffer.
const HEADERS: usize = HEADER_LEN + ETHERNET_LEN;
const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

/// How a node can be reached at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Packets are taken.
    Open,
    /// Its card does not read, or nobody knows its address yet: [`Lan::take_opened`] tells when to try again.
    Blocked,
}

/// The wire, as the gateway sees it.
#[derive(Debug)]
pub struct Lan {
    /// The event loop's epoll.
    pub poller: Poller,
    /// Time of the events that are being handled.
    pub now: Instant,
    /// The switch.
    pub switch: Switch,
    /// Addresses of nodes.
    pub neighbors: Neighbors,
    /// The gateway's own address, with the subnet's prefix.
    pub cidr: Ipv4Cidr,
    /// How many ICMP errors may be sent.
    pub errors: Allowance,
    /// What is said of it now and then.
    pub notices: Notices,
    mac: EthernetAddress,
    buffer: Box<[u8]>,
    identification: u16,
    last_id: u64,
    opened: bool,
}

impl Lan {
    /// A wire with nothing on it but the gateway.
    pub fn new(cidr: Ipv4Cidr) -> std::io::Result<Lan> {
        let [a, b, c, d] = cidr.address().octets();
        // Locally administered, and unlike those that lab gives to cards (52:54:…).
        let mac = EthernetAddress([0x52, 0x55, a, b, c, d]);
        let now = Instant::now();
        Ok(Lan {
            poller: Poller::new()?,
            now,
            switch: Switch::new(mac),
            neighbors: Neighbors::default(),
            cidr,
            errors: Allowance::new(now),
            notices: Notices::default(),
            mac,
            buffer: vec![0; MAX_PACKET].into_boxed_slice(),
            identification: 0,
            last_id: 0,
            opened: false,
        })
    }

    /// The gateway's own address.
    pub fn gateway(&self) -> Ipv4Addr {
        self.cidr.address()
    }

    /// Whether a node can have that address: in the subnet, and not the network's, the broadcast's or the gateway's.
    pub fn is_node(&self, ip: Ipv4Addr) -> bool {
        self.cidr.contains_addr(&ip)
            && ip != self.cidr.network().address()
            && Some(ip) != self.cidr.broadcast()
            && ip != self.gateway()
    }

    /// An id that was never given before.
    pub fn new_id(&mut self) -> u64 {
        self.last_id = self.last_id.wrapping_add(1);
        self.last_id
    }

    /// Join a card. A port of the same name is replaced. Who is wanted may be there: it has not heard the question yet.
    pub fn join(&mut self, port: Port) {
        let gone = self.switch.join(port, &self.poller);
        self.neighbors.forget(&gone);
        for ip in self.neighbors.wanted() {
            self.ask(ip);
        }
    }

    /// Forget a card and where its addresses were. A node that comes back is asked for, and a connection to it goes on when
    /// it answers; a SYN that nobody has heard would only be repeated after seconds.
    pub fn leave(&mut self, id: u64) {
        let gone = self.switch.leave(id, &self.poller);
        self.neighbors.forget(&gone);
    }

    /// Whether a packet to `ip` could leave now. If nobody knows where `ip` is, it is asked for.
    pub fn path(&mut self, ip: Ipv4Addr) -> Path {
        match self.neighbors.lookup(ip, self.now) {
            Some(mac) if self.switch.congested(mac, self.now) => Path::Blocked,
            Some(_) => Path::Open,
            None => {
                if self.neighbors.want(ip, None, self.now) {
                    self.ask(ip);
                }
                Path::Blocked
            }
        }
    }

    /// Whether a path that was blocked may have opened since this was last asked.
    pub fn take_opened(&mut self) -> bool {
        std::mem::take(&mut self.opened) | self.switch.take_drained()
    }

    /// Room for an IP packet of `len` bytes, at most 65535, which [`Lan::send`] then sends.
    pub fn packet_mut(&mut self, len: usize) -> &mut [u8] {
        self.buffer.get_mut(HEADERS..HEADERS.saturating_add(len)).unwrap_or_default()
    }

    /// Send the first `len` bytes of [`Lan::packet_mut`] to a node, or to all of them.
    pub fn send(&mut self, ip: Ipv4Addr, len: usize, offload: Offload) {
        let end = HEADERS.saturating_add(len);
        if ip.is_broadcast() {
            self.transmit(EthernetAddress::BROADCAST, IPV4, len, offload);
        } else if let Some(mac) = self.neighbors.lookup(ip, self.now) {
            self.transmit(mac, IPV4, len, offload);
        } else if offload == Offload::None {
            // The packet waits for its station; a segment of TCP is only sent on a path that is open.
            let packet = self.buffer.get(HEADERS..end);
            if self.neighbors.want(ip, packet, self.now) {
                self.ask(ip);
            }
        }
    }

    /// Send the first `len` bytes of [`Lan::packet_mut`] to a station that has no IP address yet.
    pub fn send_to_station(&mut self, mac: EthernetAddress, len: usize) {
        self.transmit(mac, IPV4, len, Offload::None);
    }

    /// Lay a UDP datagram into the send buffer, where [`Lan::send`] finds it: the packet's length.
    pub fn lay_udp(&mut self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Option<usize> {
        let udp = UdpRepr { src_port: from.port(), dst_port: to.port() };
        let len = UDP_HEADER.checked_add(payload.len())?;
        let total = IP_HEADER.checked_add(len).filter(|total| *total <= 65535)?;
        self.lay_ip(*from.ip(), *to.ip(), IpProtocol::Udp, len);
        let mut packet = UdpPacket::new_unchecked(self.packet_mut(total).get_mut(IP_HEADER..)?);
        udp.emit(
            &mut packet,
            &(*from.ip()).into(),
            &(*to.ip()).into(),
            payload.len(),
            |room| room.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
        Some(total)
    }

    /// Send a UDP datagram to a node, in fragments where it is longer than the wire's packets.
    pub fn send_udp(&mut self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) {
        if let Some(len) = self.lay_udp(from, to, payload) {
            self.send_fragmented(*to.ip(), len);
        }
    }

    /// Send an ICMP message to a node.
    pub fn send_icmp(&mut self, from: Ipv4Addr, to: Ipv4Addr, message: &Icmpv4Repr) {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &ChecksumCapabilities::default());
        self.send_icmp_bytes(from, to, &bytes);
    }

    /// Send an ICMP message, which has its checksum, to a node.
    pub fn send_icmp_bytes(&mut self, from: Ipv4Addr, to: Ipv4Addr, message: &[u8]) {
        let total = IP_HEADER.saturating_add(message.len());
        if total > 65535 {
            return;
        }
        self.lay_ip(from, to, IpProtocol::Icmp, message.len());
        if let Some(room) = self.packet_mut(total).get_mut(IP_HEADER..) {
            room.copy_from_slice(message);
            self.send_fragmented(to, total);
        }
    }

    /// Handle an ARP packet: learn from it, and answer if it asks for the gateway.
    pub fn arp(&mut self, packet: &[u8], station: EthernetAddress) {
        let Ok(packet) = ArpPacket::new_checked(packet) else { return };
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        if source_hardware_addr != station {
            return;
        }
        if self.is_node(source_protocol_addr) {
            self.heard(source_protocol_addr, station);
        }
        if operation == ArpOperation::Request && target_protocol_addr == self.gateway() {
            let reply = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: self.mac,
                source_protocol_addr: target_protocol_addr,
                target_hardware_addr: source_hardware_addr,
                target_protocol_addr: source_protocol_addr,
            };
            self.send_arp(&reply, station);
        }
    }

    /// A node was heard: from `station` comes what `ip` sends.
    pub fn heard(&mut self, ip: Ipv4Addr, station: EthernetAddress) {
        if let Some(waiting) = self.neighbors.heard(ip, station, self.now) {
            self.opened = true;
            for packet in waiting {
                let len = packet.len();
                self.packet_mut(len).copy_from_slice(&packet);
                self.transmit(station, IPV4, len, Offload::None);
            }
        }
    }

    /// When [`Lan::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        [self.switch.deadline(), self.neighbors.deadline(), self.notices.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Do what is due: the addresses that nobody has answered for.
    pub fn expire(&mut self) -> Vec<Ipv4Addr> {
        self.switch.expire(self.now, &self.poller);
        self.notices.expire(self.now);
        let (again, absent) = self.neighbors.expire(self.now);
        for ip in again {
            self.ask(ip);
        }
        absent
    }

    fn ask(&mut self, ip: Ipv4Addr) {
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: self.mac,
            source_protocol_addr: self.gateway(),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: ip,
        };
        self.send_arp(&request, EthernetAddress::BROADCAST);
    }

    fn send_arp(&mut self, message: &ArpRepr, to: EthernetAddress) {
        // Not in the send buffer: a packet that waits for this answer may lie there.
        let mut packet = [0u8; HEADERS + 28];
        let (_, room) = packet.split_at_mut(HEADERS);
        message.emit(&mut ArpPacket::new_unchecked(room));
        write_headers(&mut packet, self.mac, to, ARP, Offload::None);
        self.switch.send(to, &packet, &self.poller, self.now);
    }

    fn transmit(&mut self, to: EthernetAddress, ethertype: u16, len: usize, offload: Offload) {
        write_headers(&mut self.buffer, self.mac, to, ethertype, offload);
        if let Some(packet) = self.buffer.get(..HEADERS.saturating_add(len)) {
            self.switch.send(to, packet, &self.poller, self.now);
        }
    }

    fn lay_ip(&mut self, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload_len: usize) {
        let header =
            Ipv4Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len, hop_limit: 64 };
        let room = self.packet_mut(IP_HEADER.saturating_add(payload_len));
        header.emit(&mut Ipv4Packet::new_unchecked(room), &ChecksumCapabilities::default());
    }

    /// Send what lies in the buffer, cut into fragments (RFC 791) if it is longer than the wire's packets.
    fn send_fragmented(&mut self, to: Ipv4Addr, len: usize) {
        const STEP: usize = (MTU - IP_HEADER) / 8 * 8;
        if len <= MTU {
            self.send(to, len, Offload::None);
            return;
        }
        let whole = self.packet_mut(len).to_vec();
        let Some((header, payload)) = whole.split_at_checked(IP_HEADER) else { return };
        self.identification = self.identification.wrapping_add(1);
        let count = payload.len().div_ceil(STEP);
        for (n, piece) in payload.chunks(STEP).enumerate() {
            let total = IP_HEADER.saturating_add(piece.len());
            let identification = self.identification;
            let room = self.packet_mut(total);
            let (head, body) = room.split_at_mut(IP_HEADER);
            head.copy_from_slice(header);
            body.copy_from_slice(piece);
            let mut packet = Ipv4Packet::new_unchecked(room);
            packet.set_total_len(u16::try_from(total).unwrap_or(u16::MAX));
            packet.set_ident(identification);
            packet.set_dont_frag(false);
            packet.set_more_frags(n.saturating_add(1) < count);
            packet.set_frag_offset(u16::try_from(n.saturating_mul(STEP)).unwrap_or(u16::MAX));
            packet.fill_checksum();
            self.send(to, total, Offload::None);
        }
    }
}
