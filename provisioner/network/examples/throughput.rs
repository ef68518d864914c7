//! How fast frames cross a network, between mock cards in this process: `cargo run --release --example throughput`.
//! Beside the rate stands what the network's own thread could do if it had nobody to wait for.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    io::{Read, Write},
    net::{SocketAddrV4, TcpListener},
    time::{Duration, Instant},
};

use common::{Guest, Lab, OUTSIDE, mac, packet};
use rustix::net::{RecvFlags, SendFlags};

const BYTES: usize = 2 << 30;

/// CPU time of the network's thread.
fn cpu() -> Duration {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if std::fs::read_to_string(path.join("comm")).unwrap().trim() == "network" {
            let stat = std::fs::read_to_string(path.join("schedstat")).unwrap();
            return Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap());
        }
    }
    panic!("no thread of that name");
}

fn report(what: &str, bytes: usize, frames: Option<usize>, run: impl FnOnce()) {
    let (start, cpu_before) = (Instant::now(), cpu());
    run();
    let (time, cpu) = (start.elapsed().as_secs_f64(), (cpu() - cpu_before).as_secs_f64());
    let gbit = bytes as f64 * 8.0 / 1e9;
    print!("{what:<34} {:6.1} Gbit/s   {:6.1} Gbit a CPU second", gbit / time, gbit / cpu);
    match frames {
        Some(frames) => println!("   {:6.2} us a frame", cpu * 1e6 / frames as f64),
        None => println!(),
    }
}

fn card_to_card(size: usize) {
    let lab = Lab::start();
    let (a, b) = (lab.card("a"), lab.card("b"));
    lab.wait_for("the cards", |status| status.ports.len() == 2);
    common::send(&b, &packet(mac(1), mac(2), 0x88b5, b"hello"));
    common::receive(&a, common::LIMIT).unwrap();
    let frame = packet(mac(2), mac(1), 0x88b5, &vec![0; size - 26]);
    let count = (BYTES / size).min(300_000);
    report(&format!("card to card, {size} bytes"), count * size, Some(count), || {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..count {
                    rustix::net::send(&a, &frame, SendFlags::empty()).unwrap();
                }
            });
            let mut buffer = vec![0; 70000];
            for _ in 0..count {
                rustix::net::recv(&b, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
            }
        });
    });
}

/// What the same system calls cost without a network: a packet into a socket and out of it.
fn sockets_alone(size: usize) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let (frame, mut buffer) = (vec![0; size], vec![0; 70000]);
    let (start, count) = (Instant::now(), 50_000);
    for _ in 0..count {
        rustix::net::send(&a, &frame, SendFlags::empty()).unwrap();
        rustix::net::recv(&b, buffer.as_mut_slice(), RecvFlags::empty()).unwrap();
    }
    let time = start.elapsed().as_secs_f64();
    println!("in and out of a socket, {size} bytes: {:.2} us a frame", time * 1e6 / f64::from(count));
}

fn guest_to_host() {
    let lab = Lab::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = SocketAddrV4::new(OUTSIDE, listener.local_addr().unwrap().port());
    let mut guest: Guest = lab.guest(10);
    let (handle, _) = guest.connected(address);
    let (mut stream, _) = listener.accept().unwrap();
    let data = vec![7; 1 << 20];
    report("node to host, one TCP stream", BYTES, None, || {
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut buffer = vec![0; 1 << 18];
                let mut got = 0;
                while got < BYTES {
                    got += stream.read(&mut buffer).unwrap();
                }
            });
            let mut left = BYTES;
            guest.until("all to be sent", |guest| {
                let socket = guest.tcp(handle);
                while left > 0 && socket.can_send() {
                    left -= socket.send_slice(&data[..left.min(data.len())]).unwrap();
                }
                (left == 0 && socket.send_queue() == 0).then_some(())
            });
        });
    });
}

fn host_to_guest() {
    let lab = Lab::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = SocketAddrV4::new(OUTSIDE, listener.local_addr().unwrap().port());
    let mut guest: Guest = lab.guest(10);
    let (handle, _) = guest.connected(address);
    let (mut stream, _) = listener.accept().unwrap();
    report("host to node, one TCP stream", BYTES, None, || {
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let data = vec![7; 1 << 18];
                for _ in 0..BYTES / data.len() {
                    stream.write_all(&data).unwrap();
                }
            });
            let mut got = 0;
            guest.until("all to be received", |guest| {
                while let Ok(len @ 1..) = guest.tcp(handle).recv(|bytes| (bytes.len(), bytes.len())) {
                    got += len;
                }
                (got >= BYTES).then_some(())
            });
        });
    });
}

fn main() {
    if std::env::args().any(|argument| argument == "tcp") {
        guest_to_host();
        return host_to_guest();
    }
    for size in [65_549, 1526, 90] {
        sockets_alone(size);
        card_to_card(size);
    }
    guest_to_host();
    host_to_guest();
}
