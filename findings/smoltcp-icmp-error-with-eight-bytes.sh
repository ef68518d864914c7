#!/bin/bash
# smoltcp 0.14.0 (crates.io): an ICMP error that quotes the IP header and the first eight bytes of the packet that it is about,
# which is what RFC 792 asks for and what many hosts and routers send.
#
# A good guess: `Icmpv4Repr::parse` takes it. Its own comment says that eight bytes are enough.
# Seen: it is malformed, as is everything that quotes less than the whole packet: the quoted IP header is looked at as that of
# a packet that must be there up to its total length. The same error with the whole datagram behind it is taken. So a stack
# built on it hears of closed ports and of routers on the way only if the packet was very short.
#
# Needs cargo. Builds in a temporary folder, says OK if all is as told.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "icmp-error"
version = "0.0.0"
edition = "2024"
[dependencies]
smoltcp = { version = "=0.14.0", default-features = false, features = ["std", "medium-ip", "proto-ipv4", "socket-icmp"] }
TOML
cat > src/main.rs <<'RUST'
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket};

/// "Port unreachable" about a datagram of 100 bytes, of which `quoted` bytes follow the IP header.
fn is_taken(quoted: usize) -> bool {
    let (from, to) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let header = Ipv4Repr { src_addr: from, dst_addr: to, next_header: IpProtocol::Udp, payload_len: 108, hop_limit: 64 };
    let mut packet = vec![0; 128];
    header.emit(&mut Ipv4Packet::new_unchecked(&mut packet), &ChecksumCapabilities::default());
    let mut datagram = UdpPacket::new_unchecked(&mut packet[20..]);
    datagram.set_src_port(40000);
    datagram.set_dst_port(33434);
    datagram.set_len(108);
    datagram.fill_checksum(&from.into(), &to.into());
    let mut error = vec![3, 3, 0, 0, 0, 0, 0, 0];
    error.extend(&packet[..20 + quoted]);
    Icmpv4Packet::new_unchecked(&mut error).fill_checksum();
    let error = Icmpv4Packet::new_checked(error.as_slice()).unwrap();
    Icmpv4Repr::parse(&error, &ChecksumCapabilities::default()).is_ok()
}

fn main() {
    println!("{} {} {}", is_taken(8), is_taken(107), is_taken(108));
}
RUST
seen=$(cargo run -q --release)
echo "taken with 8, 107 and 108 of 108 bytes quoted: $seen"
[ "$seen" = "false false true" ] || { echo "not as told"; exit 1; }
echo OK
