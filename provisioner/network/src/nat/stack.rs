//! The TCP stack that ends nodes' connections (smoltcp), with [`Lan`] as its wire. Every flow has a socket set of its
//! own, so that a packet costs the same however many flows there are. Segments go out larger than the wire's
//! packets, for the node's card to cut (virtio's segmentation offload), and come in as large.

use std::{
    net::Ipv4Addr,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use smoltcp::{
    iface::{Config, Interface, PollResult, SocketHandle, SocketSet},
    phy::{self, Checksum, Device, DeviceCapabilities, Medium, PacketMeta},
    socket::tcp::{Socket, SocketBuffer},
    wire::{HardwareAddress, IpCidr, IpProtocol, Ipv4Packet, TcpPacket},
};

use crate::{
    frame::Offload,
    lan::{Lan, MTU, Path},
};

/// Longest packet that the stack makes in bytes.
const MAX_IP_PACKET: usize = 65535;

/// A flow's socket.
#[derive(Debug)]
pub struct FlowSocket {
    set: SocketSet<'static>,
    handle: SocketHandle,
}

impl FlowSocket {
    /// A socket with that much room in bytes in each direction.
    pub fn new(room: usize) -> FlowSocket {
        let mut socket = Socket::new(SocketBuffer::new(vec![0; room]), SocketBuffer::new(vec![0; room]));
        socket.set_nagle_enabled(false);
        // Acknowledgements are sent once for all packets of a turn of the event loop.
        socket.set_ack_delay(None);
        socket.set_keep_alive(Some(smoltcp::time::Duration::from_secs(120)));
        socket.set_timeout(Some(smoltcp::time::Duration::from_secs(900)));
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        FlowSocket { set, handle }
    }

    /// The socket.
    pub fn tcp(&mut self) -> &mut Socket<'static> {
        self.set.get_mut(self.handle)
    }
}

/// What came of letting a flow's socket send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Egress {
    /// It has sent all that it may. It wants to be polled at that time.
    Idle(Option<Instant>),
    /// The node's card does not read, or the node is not found: it goes on when [`Lan::take_opened`] says so.
    Blocked,
    /// The stack could not cope with what the node had sent. The flow must be dropped.
    Broken,
}

/// The stack.
pub struct Stack {
    interface: Interface,
    start: Instant,
    nobody: SocketSet<'static>,
}

impl Stack {
    /// A stack on the gateway. `seed` makes its sequence numbers hard to guess.
    pub fn new(lan: &mut Lan, seed: u64) -> Stack {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let start = lan.now;
        let cidr = lan.cidr;
        let mut wire = Wire { lan, received: None, guest: Ipv4Addr::UNSPECIFIED };
        let mut interface = Interface::new(config, &mut wire, smoltcp::time::Instant::ZERO);
        interface.set_any_ip(true);
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::Ipv4(cidr));
        });
        Stack { interface, start, nobody: SocketSet::new(Vec::new()) }
    }

    /// Give a packet of a node to a flow. False if the stack could not cope with it: the flow must be dropped.
    pub fn ingress(
        &mut self,
        socket: &mut FlowSocket,
        lan: &mut Lan,
        packet: &[u8],
        guest: Ipv4Addr,
    ) -> bool {
        let now = self.time(lan.now);
        // The packet comes from a node, and the stack's asserts are its own: one flow's end is not the lab's.
        catch_unwind(AssertUnwindSafe(|| {
            let mut wire = Wire { lan, received: Some(packet), guest };
            self.interface.poll_ingress_single(now, &mut wire, &mut socket.set);
        }))
        .is_ok()
    }

    /// Answer a packet that belongs to no flow with a reset.
    pub fn refuse(&mut self, lan: &mut Lan, packet: &[u8], guest: Ipv4Addr) {
        let now = self.time(lan.now);
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let mut wire = Wire { lan, received: Some(packet), guest };
            self.interface.poll_ingress_single(now, &mut wire, &mut self.nobody);
        }));
    }

    /// Send what a flow has to send.
    pub fn egress(&mut self, socket: &mut FlowSocket, lan: &mut Lan, guest: Ipv4Addr) -> Egress {
        let now = self.time(lan.now);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                if self.interface.poll_at(now, &socket.set).is_none_or(|due| due > now) {
                    break;
                }
                if lan.path(guest) == Path::Blocked {
                    return Egress::Blocked;
                }
                let mut wire = Wire { lan, received: None, guest };
                if self.interface.poll_egress(now, &mut wire, &mut socket.set) == PollResult::None {
                    break;
                }
            }
            let due = self.interface.poll_at(now, &socket.set);
            Egress::Idle(due.map(|due| self.start + micros(due)))
        }));
        result.unwrap_or(Egress::Broken)
    }

    /// Begin a connection from the gateway's port `from` to a node.
    pub fn connect(
        &mut self,
        socket: &mut FlowSocket,
        lan: &Lan,
        from: u16,
        to: std::net::SocketAddrV4,
    ) -> bool {
        let local = (lan.gateway(), from);
        let remote = (*to.ip(), to.port());
        socket.set.get_mut::<Socket>(socket.handle).connect(self.interface.context(), remote, local).is_ok()
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.start).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

fn micros(time: smoltcp::time::Instant) -> std::time::Duration {
    std::time::Duration::from_micros(u64::try_from(time.total_micros()).unwrap_or(0))
}

/// The wire between the stack and one node.
struct Wire<'a> {
    lan: &'a mut Lan,
    received: Option<&'a [u8]>,
    guest: Ipv4Addr,
}

impl Device for Wire<'_> {
    type RxToken<'t>
        = Received<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Transmit<'t>
    where
        Self: 't;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        let packet = self.received.take()?;
        Some((Received(packet), Transmit { lan: self.lan, guest: self.guest, segment_size: 0 }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmit<'_>> {
        Some(Transmit { lan: self.lan, guest: self.guest, segment_size: 0 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // Nothing is lost or changed between a card and this process, and cards leave checksums to be completed.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.segmentation.tcpv4 = std::num::NonZeroUsize::new(MAX_IP_PACKET);
        capabilities
    }
}

struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Transmit<'a> {
    lan: &'a mut Lan,
    guest: Ipv4Addr,
    segment_size: u16,
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let packet = self.lan.packet_mut(len);
        let result = f(packet);
        let headers = prepare_checksum(packet);
        self.lan.send(self.guest, len, Offload::Tcp { segment_size: self.segment_size, headers });
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_size = meta.segmentation_offload_size.map_or(0, std::num::NonZeroU16::get);
    }
}

/// Put the pseudo header's sum in the place of a TCP segment's checksum, for the card to complete; the length of the
/// packet's headers.
fn prepare_checksum(packet: &mut [u8]) -> u16 {
    let Ok(ip) = Ipv4Packet::new_checked(&*packet) else { return 0 };
    let (from, to, header) = (ip.src_addr().octets(), ip.dst_addr().octets(), usize::from(ip.header_len()));
    let Some(tcp) = packet.get_mut(header..) else { return 0 };
    let pair = |a: u8, b: u8| u32::from(u16::from_be_bytes([a, b]));
    let mut sum = u32::from(u8::from(IpProtocol::Tcp)).wrapping_add(u32::try_from(tcp.len()).unwrap_or(0));
    for [a, b, c, d] in [from, to] {
        sum = sum.wrapping_add(pair(a, b)).wrapping_add(pair(c, d));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    let mut segment = TcpPacket::new_unchecked(tcp);
    segment.set_checksum(u16::try_from(sum).unwrap_or(0));
    u16::try_from(header).unwrap_or(0).saturating_add(segment.header_len().into())
}
