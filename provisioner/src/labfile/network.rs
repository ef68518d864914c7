//! The lab's subnet and which addresses of it may be used.

use std::net::Ipv4Addr;

use super::{
    diagnostic::visible,
    file::{At, NetworkTable},
    report::Report,
    topology::Network,
};

/// The subnet of a labfile that gives none.
const DEFAULT: Network =
    Network { subnet: Ipv4Addr::new(192, 168, 100, 0), prefix: 24, gateway: Ipv4Addr::new(192, 168, 100, 1) };

/// The network, if its subnet is one.
pub fn resolve(table: &NetworkTable, report: &mut Report<'_>) -> Option<Network> {
    let mut network = match &table.subnet {
        None => DEFAULT,
        Some(text) => match subnet(text.get()) {
            Ok(network) => network,
            Err((message, help)) => {
                report.error(Some(text.span()), "network.subnet", message, help);
                return None;
            }
        },
    };
    if let Some(text) = &table.gateway
        && let Some(gateway) = address(text, "network.gateway", report)
    {
        match network.refusal(gateway) {
            None => network.gateway = gateway,
            Some(why) => {
                let message = format!("the gateway can't have {gateway}: {why}");
                report.error(Some(text.span()), "network.gateway", message, network.advice());
            }
        }
    }
    Some(network)
}

/// The subnet that a text is, else what is wrong and what would be right.
pub fn subnet(text: &str) -> Result<Network, (String, String)> {
    let shown = visible(text);
    let general = "write an IPv4 network and its prefix's length, such as \"192.168.1.0/24\"".to_owned();
    let Some((address, prefix)) = text.split_once('/') else {
        return Err((format!("`{shown}` has no prefix length"), general));
    };
    let Ok(address) = address.parse::<Ipv4Addr>() else {
        return Err((format!("`{shown}` is not a subnet"), general));
    };
    let prefix = match prefix.parse::<u8>() {
        Ok(prefix @ 8..=29) => prefix,
        _ => {
            return Err((
                format!("the prefix length of `{shown}` is out of range"),
                "8 to 29 are possible".to_owned(),
            ));
        }
    };
    let subnet = Ipv4Addr::from_bits(address.to_bits() & mask(prefix));
    if subnet != address {
        return Err((
            format!("`{shown}` is an address in a subnet"),
            format!("the subnet is \"{subnet}/{prefix}\""),
        ));
    }
    let private = "private networks are 10.0.0.0/8, 172.16.0.0/12 and 192.168.0.0/16".to_owned();
    match subnet.octets() {
        [0, ..] => Err((format!("`{shown}` is reserved: it means \"this network\""), private)),
        [127, ..] => Err((format!("`{shown}` is every machine's own loopback network"), private)),
        [224..=239, ..] => Err((format!("`{shown}` is for multicast"), private)),
        [240..=255, ..] => Err((format!("`{shown}` is reserved"), private)),
        _ => Ok(Network { subnet, prefix, gateway: Ipv4Addr::from_bits(subnet.to_bits() | 1) }),
    }
}

/// The IPv4 address at a key; what isn't one is reported.
pub fn address(text: &At<String>, key: &str, report: &mut Report<'_>) -> Option<Ipv4Addr> {
    let parsed = text.get().parse().ok();
    if parsed.is_none() {
        let message = format!("`{}` is not an IPv4 address", visible(text.get()));
        report.error(
            Some(text.span()),
            key,
            message,
            "write four numbers from 0 to 255, such as \"192.168.1.10\"",
        );
    }
    parsed
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32u32.saturating_sub(u32::from(prefix))).unwrap_or(0)
}

impl Network {
    /// The last address, which means every node.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.subnet.to_bits() | !mask(self.prefix))
    }

    /// Whether an address belongs to the subnet.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.subnet.to_bits()
    }

    /// Why nothing in the lab can have this address, if so. The gateway's own is not looked at.
    pub fn refusal(&self, address: Ipv4Addr) -> Option<String> {
        if !self.contains(address) {
            return Some(format!("it is outside the subnet {}/{}", self.subnet, self.prefix));
        }
        if address == self.subnet {
            return Some("it is the subnet's own address".to_owned());
        }
        (address == self.broadcast()).then(|| "it is the subnet's broadcast address".to_owned())
    }

    /// Addresses that nodes may have, in the order in which they are given out: from .10 where the subnet has 32
    /// addresses or more, so that low ones stay free for fixed ones.
    pub fn automatic(&self) -> impl Iterator<Item = Ipv4Addr> + use<> {
        let (first, last) =
            (self.subnet.to_bits().saturating_add(1), self.broadcast().to_bits().saturating_sub(1));
        let start = if self.prefix <= 27 { first.saturating_add(9) } else { first };
        let gateway = self.gateway;
        (start..=last).chain(first..start).map(Ipv4Addr::from_bits).filter(move |address| *address != gateway)
    }

    /// Which addresses are possible.
    pub fn advice(&self) -> String {
        let (first, last) =
            (self.subnet.to_bits().saturating_add(1), self.broadcast().to_bits().saturating_sub(1));
        format!("{} to {} are possible", Ipv4Addr::from_bits(first), Ipv4Addr::from_bits(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn automatic_addresses() {
        let network = subnet("10.1.0.0/24").unwrap();
        let given: Vec<_> = network.automatic().collect();
        assert_eq!(given[0], Ipv4Addr::new(10, 1, 0, 10));
        assert_eq!(given.len(), 253);
        let small = subnet("10.1.0.8/29").unwrap();
        let given: Vec<_> = small.automatic().map(|address| address.octets()[3]).collect();
        assert_eq!(given, [10, 11, 12, 13, 14]);
        assert_eq!(small.broadcast(), Ipv4Addr::new(10, 1, 0, 15));
    }
}
