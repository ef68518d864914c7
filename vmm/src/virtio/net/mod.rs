//! Network device (virtio 1.3 §5.1): a card joined to `lab-net` by a socket that carries one frame a packet, behind
//! its virtio-net header, so that offloads pass through untouched. `link` is the socket, `receive` and `transmit`
//! move frames between it and guest memory without a copy of ours, `offload` helps guests that do without offloads.

mod link;
mod offload;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Error, Interrupt, VirtioDevice, Working,
    counters::Counters,
    queue::{COMMON_FEATURES, DeviceQueue, Given, read_config},
    worker::{BACK_END, Fault, Handler, Poll, Worker},
};
use crate::config::NetConfig;
use link::Link;
use receive::Receiver;
use transmit::Transmitter;

const QUEUE_SIZES: [u16; 2] = [512, 512];
const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const SOCKET: u64 = BACK_END;
const TIMER: u64 = BACK_END + 1;

/// Length of `struct virtio_net_hdr_v1` (virtio 1.3 §5.1.6), in front of every frame.
const HEADER: usize = 12;
/// Longest packet: header, Ethernet header with a VLAN tag, and an IP packet of 65535 bytes.
const MAX_PACKET: usize = HEADER + 18 + 65535;

const FEATURES: u64 = COMMON_FEATURES
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6;

/// Index of each counter: frames and bytes sent by the guest, frames and bytes received by it.
const SENT: usize = 0;
const RECEIVED: usize = 2;

/// A network card.
pub struct Net {
    name: String,
    config: NetConfig,
    mac: [u8; 6],
    counters: Arc<Counters<4>>,
    joined: Arc<AtomicBool>,
    worker: Option<Worker<NetHandler>>,
}

impl Net {
    /// Makes a card. `lab-net` need not be there yet; the card joins it while a driver uses the card.
    pub fn new(name: &str, config: &NetConfig) -> Result<Self, Error> {
        let mac = parse_mac(&config.mac).ok_or_else(|| {
            Error::Device(format!(
                "network card {}: {:?} is not a MAC address of one card, such as 52:54:00:12:34:56",
                config.port, config.mac
            ))
        })?;
        Ok(Self {
            name: name.to_owned(),
            config: config.clone(),
            mac,
            counters: Arc::default(),
            joined: Arc::default(),
            worker: None,
        })
    }

    /// Frames and bytes sent by the guest, frames and bytes received by it; headers of virtio don't count.
    pub fn counters(&self) -> Arc<Counters<4>> {
        Arc::clone(&self.counters)
    }

    /// Whether the card is joined to `lab-net`: what the guest sees as its link.
    pub fn joined(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.joined)
    }

    fn handler(&self, given: Given<2>) -> NetHandler {
        let Given { memory, features, queues: [receive, transmit], interrupt, .. } = given;
        NetHandler {
            receiver: Receiver::new(receive, features, Arc::clone(&self.counters)),
            transmitter: Transmitter::new(transmit, Arc::clone(&self.counters)),
            memory,
            link: Link::new(&self.config),
            joined: Arc::clone(&self.joined),
            interrupt,
        }
    }
}

/// A unicast address, `52:54:00:aa:bb:cc`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| if byte.len() == 2 { u8::from_str_radix(byte, 16).ok() } else { None })
        .collect::<Option<_>>()?;
    let mac: [u8; 6] = bytes.try_into().ok()?;
    (mac != [0; 6] && mac[0] & 1 == 0).then_some(mac)
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        1
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_net_config: mac, status.
        let status = if self.joined.load(Ordering::Relaxed) { VIRTIO_NET_S_LINK_UP as u8 } else { 0 };
        let [a, b, c, d, e, f] = self.mac;
        read_config(&[a, b, c, d, e, f, status, 0], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.reset();
        let given = Given::new(&self.name, activation)?;
        let interrupt = given.interrupt.clone();
        // The guest of a snapshot had a link: it need not hear of one that is back at once.
        let restored = given.restored;
        self.joined.store(restored, Ordering::Relaxed);
        self.worker = Some(Worker::spawn(&self.name, Arc::clone(&interrupt), self.handler(given))?);
        if restored {
            // It may also have had none.
            interrupt.signal_config();
        }
        Ok(())
    }

    fn worker(&mut self) -> Option<&mut dyn Working> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Working)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        self.joined.store(false, Ordering::Relaxed);
    }
}

struct NetHandler {
    memory: GuestMemoryMmap,
    link: Link,
    receiver: Receiver,
    transmitter: Transmitter,
    joined: Arc<AtomicBool>,
    interrupt: Arc<dyn Interrupt>,
}

impl NetHandler {
    fn receive(&mut self) -> Result<(), Fault> {
        self.receiver.work(&self.memory, &mut self.link)?;
        self.show_link();
        Ok(())
    }

    fn transmit(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.transmitter.work(&self.memory, &mut self.link, poll)?;
        self.show_link();
        Ok(())
    }

    /// Tells the guest if the link came up or went down.
    fn show_link(&self) {
        let up = self.link.is_up();
        if self.joined.swap(up, Ordering::Relaxed) != up {
            self.interrupt.signal_config();
        }
    }
}

impl Handler for NetHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.receiver.queue.start(&self.memory, poll)?;
        self.transmitter.queue.start(&self.memory, poll)?;
        self.link.start(poll).map_err(|source| Fault::Io { action: "make a timer", source })?;
        self.show_link();
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Fault> {
        match token {
            RECEIVE => self.receive(),
            TRANSMIT => self.transmit(poll),
            SOCKET => {
                self.link.note(events);
                self.receive()?;
                self.transmit(poll)
            }
            _ => {
                self.link.retry(poll);
                self.show_link();
                Ok(())
            }
        }
    }

    fn queues(&mut self) -> Vec<&mut DeviceQueue> {
        vec![&mut self.receiver.queue, &mut self.transmitter.queue]
    }

    fn put_back(&mut self) {
        self.receiver.put_back(&self.memory);
        self.transmitter.put_back(&self.memory);
    }
}
