#!/bin/bash
# smoltcp 0.14.0 (crates.io): a peer has closed its side, reads slowly, and is still to get what was written before our close.
#
# A good guess: `close()` right after the last write only adds a FIN behind it; whether the socket is in CLOSE-WAIT or in
# LAST-ACK, a peer that has read, and says that there is room again, gets the next bytes at once.
# Seen: in LAST-ACK an ACK that acknowledges nothing new is answered and dropped before its window is looked at. So after each
# full window nothing is sent until a zero-window probe, a second later: 64 KiB through a window of 4 KiB take 15 s and more,
# of the simulated clock. Closed once the peer has acknowledged everything, the same takes none.
#
# Needs cargo. Builds in a temporary folder, says OK if all is as told.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "last-ack"
version = "0.0.0"
edition = "2024"
[dependencies]
smoltcp = { version = "=0.14.0", default-features = false, features = ["std", "medium-ip", "proto-ipv4", "socket-tcp"] }
TOML
cat > src/main.rs <<'RUST'
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use std::{cell::RefCell, collections::VecDeque, rc::Rc};

type Queue = Rc<RefCell<VecDeque<Vec<u8>>>>;
struct Wire { from: Queue, to: Queue }
struct Rx(Vec<u8>);
struct Tx(Queue);
impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R { f(&self.0) }
}
impl phy::TxToken for Tx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.borrow_mut().push_back(packet);
        result
    }
}
impl phy::Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx;
    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx)> {
        Some((Rx(self.from.borrow_mut().pop_front()?), Tx(self.to.clone())))
    }
    fn transmit(&mut self, _: Instant) -> Option<Tx> { Some(Tx(self.to.clone())) }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ip, 1500);
        capabilities
    }
}
struct End { wire: Wire, interface: Interface, sockets: SocketSet<'static>, handle: SocketHandle }
impl End {
    fn new(address: u8, from: &Queue, to: &Queue, room: usize) -> Self {
        let mut wire = Wire { from: from.clone(), to: to.clone() };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|list| list.push(IpCidr::new(IpAddress::v4(10, 0, 0, address), 24)).unwrap());
        let mut socket = Socket::new(SocketBuffer::new(vec![0; room]), SocketBuffer::new(vec![0; 64 << 10]));
        socket.set_ack_delay(None);
        let mut sockets = SocketSet::new(vec![]);
        let handle = sockets.add(socket);
        Self { wire, interface, sockets, handle }
    }
    fn tcp(&mut self) -> &mut Socket<'static> { self.sockets.get_mut(self.handle) }
    fn poll(&mut self, now: Instant) { self.interface.poll(now, &mut self.wire, &mut self.sockets); }
}

/// Milliseconds until a peer that has closed has got 64 KiB, which it reads whenever its 4 KiB are full.
fn run(close_at_once: bool) -> i64 {
    let (a, b) = (Queue::default(), Queue::default());
    let (mut peer, mut we) = (End::new(1, &a, &b, 4 << 10), End::new(2, &b, &a, 4 << 10));
    we.tcp().listen(7).unwrap();
    let handle = peer.handle;
    let (context, socket) = (peer.interface.context(), peer.sockets.get_mut::<Socket>(handle));
    socket.connect(context, (IpAddress::v4(10, 0, 0, 2), 7), 4000).unwrap();
    let (mut now, mut got, mut written, mut closed) = (Instant::ZERO, 0, false, false);
    while got < 64 << 10 {
        for _ in 0..50 {
            peer.poll(now);
            we.poll(now);
        }
        if peer.tcp().state() == State::Established { peer.tcp().close(); continue }
        if we.tcp().state() == State::CloseWait && !written {
            assert_eq!(we.tcp().send_slice(&[1; 64 << 10]), Ok(64 << 10));
            written = true;
            if close_at_once { we.tcp().close(); closed = true }
            continue;
        }
        if written && !closed && we.tcp().send_queue() == 0 { we.tcp().close(); closed = true }
        let waiting = peer.tcp().recv_queue();
        if waiting > 0 {
            peer.tcp().recv(|bytes| (bytes.len(), ())).unwrap();
            got += waiting - peer.tcp().recv_queue();
            continue;
        }
        // Nothing moves: the clock goes on to what is due next.
        let due = [&mut peer, &mut we].into_iter().filter_map(|end| end.interface.poll_at(now, &end.sockets)).min();
        now = due.expect("nothing is due").max(now + smoltcp::time::Duration::from_millis(1));
    }
    now.total_millis()
}

fn main() { println!("{} {}", run(true), run(false)); }
RUST
cargo run -q --release > out 2> log || { cat log; exit 1; }
read -r at_once later < out
echo "smoltcp 0.14.0: closed at once $at_once ms, closed once everything was taken $later ms"
[ "$at_once" -ge 10000 ] && [ "$later" -lt 1000 ] || { echo "CHANGED"; exit 1; }
echo "OK"
