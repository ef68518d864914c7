//! The learning switch: which card has which MAC address, and who gets a frame. The gateway is one more station of
//! it, which has no port.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use smoltcp::wire::EthernetAddress;

use crate::{
    frame::{Frame, HEADER_LEN},
    poller::Poller,
    port::{Port, Sent},
};

/// Most addresses that are remembered for one port.
const ADDRESSES_PER_PORT: usize = 256;
/// Most ports.
pub const MAX_PORTS: usize = 256;
/// A station that has been silent for so long is forgotten.
const AGE: Duration = Duration::from_secs(300);

#[derive(Debug)]
struct Station {
    port: u64,
    seen: Instant,
}

/// The switch.
#[derive(Debug)]
pub struct Switch {
    gateway: EthernetAddress,
    ports: BTreeMap<u64, Port>,
    stations: HashMap<EthernetAddress, Station>,
    drained: bool,
}

impl Switch {
    /// A switch without ports; `gateway` is the gateway's address.
    pub fn new(gateway: EthernetAddress) -> Switch {
        Switch { gateway, ports: BTreeMap::new(), stations: HashMap::new(), drained: false }
    }

    /// Join a card. A port of the same name is replaced: the addresses that are gone with it.
    pub fn join(&mut self, port: Port, poller: &Poller) -> Vec<EthernetAddress> {
        let old: Vec<u64> = self.ports.values().filter(|p| p.name == port.name).map(|p| p.id).collect();
        let gone = old.into_iter().flat_map(|id| self.leave(id, poller)).collect();
        self.ports.insert(port.id, port);
        gone
    }

    /// Forget a card and its addresses, which are returned.
    pub fn leave(&mut self, id: u64, poller: &Poller) -> Vec<EthernetAddress> {
        if self.ports.remove(&id).is_none() {
            return Vec::new();
        }
        self.release(id, poller);
        self.stations.extract_if(|_, station| station.port == id).map(|(address, _)| address).collect()
    }

    /// All ports, in the order in which they were joined.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.values()
    }

    /// A port.
    pub fn port(&mut self, id: u64) -> Option<&mut Port> {
        self.ports.get_mut(&id)
    }

    /// Take a frame from port `from` and give it to whom it is for. Tells whether it is for the gateway, too.
    pub fn forward(&mut self, from: u64, frame: &Frame, poller: &Poller, now: Instant) -> bool {
        if frame.source == self.gateway {
            return false;
        }
        if let Some(Port { received: [frames, bytes], .. }) = self.ports.get_mut(&from) {
            *frames = frames.saturating_add(1);
            *bytes = bytes.saturating_add(frame.packet().len().saturating_sub(HEADER_LEN) as u64);
        }
        self.learn(from, frame.source, now);
        if frame.destination == self.gateway {
            return true;
        }
        if !frame.destination.is_unicast() {
            self.flood(Some(from), frame.packet(), poller, now);
            return frame.destination.is_broadcast();
        }
        match self.station(frame.destination, now) {
            // A bridge inside the guest has delivered it already.
            Some(port) if port == from => {}
            Some(id) => {
                let sent = match self.ports.get_mut(&id) {
                    Some(port) => (port.send(frame.packet(), poller, now), port.congested()),
                    None => return false,
                };
                if sent == (Sent::Queued, true)
                    && let Some(port) = self.ports.get_mut(&from)
                {
                    port.hold(Some(id), poller);
                }
            }
            None => self.flood(Some(from), frame.packet(), poller, now),
        }
        false
    }

    /// Send a packet of the gateway to a station.
    pub fn send(&mut self, destination: EthernetAddress, packet: &[u8], poller: &Poller, now: Instant) {
        if let Some(id) = self.station(destination, now) {
            if let Some(port) = self.ports.get_mut(&id) {
                port.send(packet, poller, now);
            }
        } else {
            self.flood(None, packet, poller, now);
        }
    }

    /// Whether a packet for that station should wait, because its card does not read.
    pub fn congested(&self, destination: EthernetAddress, now: Instant) -> bool {
        let port = self.station(destination, now).and_then(|id| self.ports.get(&id));
        port.is_some_and(Port::congested)
    }

    /// The card of a port can take more.
    pub fn writable(&mut self, id: u64, poller: &Poller) {
        if let Some(port) = self.ports.get_mut(&id)
            && port.drain(poller)
        {
            self.release(id, poller);
        }
    }

    /// When [`Switch::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.ports.values().filter_map(Port::deadline).min()
    }

    /// Stop waiting for cards that have not read for too long.
    pub fn expire(&mut self, now: Instant, poller: &Poller) {
        let given_up: Vec<u64> =
            self.ports.values_mut().filter_map(|port| port.give_up(now).then_some(port.id)).collect();
        for id in given_up {
            self.release(id, poller);
        }
    }

    /// Whether a port has become free since this was last asked: who waited may send again.
    pub fn take_drained(&mut self) -> bool {
        std::mem::take(&mut self.drained)
    }

    fn release(&mut self, id: u64, poller: &Poller) {
        self.drained = true;
        for port in self.ports.values_mut().filter(|port| port.held_for == Some(id)) {
            port.hold(None, poller);
        }
    }

    fn learn(&mut self, from: u64, source: EthernetAddress, now: Instant) {
        if let Some(station) = self.stations.get_mut(&source) {
            *station = Station { port: from, seen: now };
            return;
        }
        // Only a new address is worth counting the port's others.
        if self.stations.values().filter(|station| station.port == from).count() >= ADDRESSES_PER_PORT {
            self.stations.retain(|_, station| {
                station.port != from || now.saturating_duration_since(station.seen) < AGE
            });
            if self.stations.values().filter(|station| station.port == from).count() >= ADDRESSES_PER_PORT {
                return;
            }
        }
        self.stations.insert(source, Station { port: from, seen: now });
    }

    fn station(&self, address: EthernetAddress, now: Instant) -> Option<u64> {
        let station = self.stations.get(&address)?;
        (now.saturating_duration_since(station.seen) < AGE).then_some(station.port)
    }

    fn flood(&mut self, from: Option<u64>, packet: &[u8], poller: &Poller, now: Instant) {
        for port in self.ports.values_mut().filter(|port| Some(port.id) != from) {
            port.send(packet, poller, now);
        }
    }
}
