//! Which MAC address has an IP address of the lab: what ARP said and what traffic shows, and the packets that wait
//! for an answer.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use smoltcp::wire::EthernetAddress;

/// For how long an address is believed after its station was last heard.
const FRESH: Duration = Duration::from_secs(60);
/// Time between two questions for the same address.
const RETRY: Duration = Duration::from_secs(1);
/// Questions before the packets that wait are dropped.
const TRIES: u8 = 3;
/// Most addresses that are known.
const MAX_KNOWN: usize = 4096;
/// Most addresses that are asked for at once.
const MAX_ASKED: usize = 256;
/// Most bytes of packets that wait for one address: fifty datagrams of 8 KiB fit, in fragments.
const MAX_WAITING: usize = 512 << 10;
/// Most bytes of packets that wait, for all addresses together.
const MAX_WAITING_TOGETHER: usize = 4 << 20;

#[derive(Debug)]
struct Known {
    mac: EthernetAddress,
    heard: Instant,
}

#[derive(Debug)]
struct Asked {
    last: Instant,
    tries: u8,
    waiting: Vec<Vec<u8>>,
    /// Their length together.
    bytes: usize,
}

/// The table.
#[derive(Debug, Default)]
pub struct Neighbors {
    known: HashMap<Ipv4Addr, Known>,
    purged: Option<Instant>,
    asked: HashMap<Ipv4Addr, Asked>,
}

impl Neighbors {
    /// The MAC address of `ip`.
    pub fn lookup(&self, ip: Ipv4Addr, now: Instant) -> Option<EthernetAddress> {
        let known = self.known.get(&ip)?;
        (now.saturating_duration_since(known.heard) < FRESH).then_some(known.mac)
    }

    /// `ip` was heard at `mac`. If that is news: the packets that waited for it.
    pub fn heard(&mut self, ip: Ipv4Addr, mac: EthernetAddress, now: Instant) -> Option<Vec<Vec<u8>>> {
        if let Some(known) = self.known.get_mut(&ip) {
            let fresh = now.saturating_duration_since(known.heard) < FRESH;
            let news = known.mac != mac || !fresh;
            *known = Known { mac, heard: now };
            if !news {
                return None;
            }
        } else {
            let purge = self.purged.is_none_or(|then| now.saturating_duration_since(then) >= RETRY);
            if self.known.len() >= MAX_KNOWN && purge {
                self.purged = Some(now);
                self.known.retain(|_, known| now.saturating_duration_since(known.heard) < FRESH);
            }
            if self.known.len() >= MAX_KNOWN {
                return None;
            }
            self.known.insert(ip, Known { mac, heard: now });
        }
        Some(self.asked.remove(&ip).map(|asked| asked.waiting).unwrap_or_default())
    }

    /// Somebody needs `ip`; a packet may wait for it. Whether to ask for it now.
    pub fn want(&mut self, ip: Ipv4Addr, packet: Option<&[u8]>, now: Instant) -> bool {
        if self.asked.len() >= MAX_ASKED && !self.asked.contains_key(&ip) {
            return false;
        }
        let mut ask = false;
        let together = self.asked.values().map(|asked| asked.bytes).fold(0, usize::saturating_add);
        let asked = self.asked.entry(ip).or_insert_with(|| {
            ask = true;
            Asked { last: now, tries: 1, waiting: Vec::new(), bytes: 0 }
        });
        if let Some(packet) = packet
            && asked.bytes.saturating_add(packet.len()) <= MAX_WAITING
            && together.saturating_add(packet.len()) <= MAX_WAITING_TOGETHER
        {
            asked.bytes = asked.bytes.saturating_add(packet.len());
            asked.waiting.push(packet.to_vec());
        }
        ask
    }

    /// The addresses that are asked for at the moment.
    pub fn wanted(&self) -> Vec<Ipv4Addr> {
        self.asked.keys().copied().collect()
    }

    /// These stations are gone.
    pub fn forget(&mut self, stations: &[EthernetAddress]) {
        self.known.retain(|_, known| !stations.contains(&known.mac));
    }

    /// When [`Neighbors::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.asked.values().map(|asked| asked.last + RETRY).min()
    }

    /// The addresses to ask for again, and those that never answered: they are given up, and their packets with them.
    pub fn expire(&mut self, now: Instant) -> (Vec<Ipv4Addr>, Vec<Ipv4Addr>) {
        let over = |asked: &Asked| asked.tries >= TRIES && now.saturating_duration_since(asked.last) >= RETRY;
        let absent = self.asked.extract_if(|_, asked| over(asked)).map(|(ip, _)| ip).collect();
        let mut again = Vec::new();
        for (ip, asked) in &mut self.asked {
            if now.saturating_duration_since(asked.last) >= RETRY {
                asked.last = now;
                asked.tries = asked.tries.saturating_add(1);
                again.push(*ip);
            }
        }
        (again, absent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    #[test]
    fn packets_wait_for_the_answer() {
        let (mut table, now) = (Neighbors::default(), Instant::now());
        assert_eq!(table.lookup(IP, now), None);
        assert!(table.want(IP, Some(b"one"), now));
        assert!(!table.want(IP, Some(b"two"), now));
        assert_eq!(table.heard(IP, MAC, now), Some(vec![b"one".to_vec(), b"two".to_vec()]));
        assert_eq!(table.lookup(IP, now), Some(MAC));
        assert_eq!(table.lookup(IP, now + FRESH), None);
    }

    #[test]
    fn questions_are_repeated_and_then_given_up() {
        let (mut table, mut now) = (Neighbors::default(), Instant::now());
        table.want(IP, Some(b"one"), now);
        for _ in 1..TRIES {
            assert_eq!(table.expire(now), (vec![], vec![]));
            now += RETRY;
            assert_eq!(table.deadline(), Some(now));
            assert_eq!(table.expire(now), (vec![IP], vec![]));
        }
        assert_eq!(table.expire(now + RETRY), (vec![], vec![IP]));
        assert_eq!(table.deadline(), None);
    }

    #[test]
    fn a_flood_of_addresses_is_bounded() {
        let (mut table, now) = (Neighbors::default(), Instant::now());
        for n in 0..100_000u32 {
            table.heard(Ipv4Addr::from(n), MAC, now);
            table.want(Ipv4Addr::from(n), Some(&[0; 64]), now);
        }
        assert_eq!(table.known.len(), MAX_KNOWN);
        assert_eq!(table.asked.len(), MAX_ASKED);
    }

    #[test]
    fn a_flood_of_packets_is_bounded() {
        let (mut table, now) = (Neighbors::default(), Instant::now());
        for n in 0..20u32 {
            for _ in 0..1000 {
                table.want(Ipv4Addr::from(n), Some(&[0; 1500]), now);
            }
        }
        let bytes: Vec<usize> = table.asked.values().map(|asked| asked.waiting.concat().len()).collect();
        assert_eq!(*bytes.iter().max().unwrap(), MAX_WAITING / 1500 * 1500);
        assert!((MAX_WAITING_TOGETHER - 1500..=MAX_WAITING_TOGETHER).contains(&bytes.iter().sum()));
    }
}
