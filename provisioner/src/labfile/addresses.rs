//! Addresses that overlap: the lab's network, its nodes, and what stacks use for containers, services and load balancers.

use std::{
    net::Ipv4Addr,
    ops::{Range, RangeInclusive},
    path::Path,
};

use super::{
    diagnostic::visible,
    file::{At, File},
    network::subnet,
    report::Report,
    shape::join,
    topology::{Network, Node},
};
use crate::stack::{self, Addresses};

/// A network that a stack uses.
struct Claim {
    /// Addresses, as numbers.
    range: RangeInclusive<u32>,
    /// As people read it: the network, what it is for, and whose it is.
    shown: String,
    /// Where the labfile gives it, with its key; `None` where it is the stack's own choice.
    place: Option<(Range<usize>, String)>,
    /// The stack's name in the labfile.
    stack: Range<usize>,
}

/// Reports what overlaps.
pub fn check(file: &File, folder: &Path, network: &Network, nodes: &[Node], report: &mut Report<'_>) {
    let lab = Claim {
        range: network.subnet.to_bits()..=network.broadcast().to_bits(),
        shown: format!("the lab's network {}/{}", network.subnet, network.prefix),
        place: file.network.subnet.as_ref().map(|subnet| (subnet.span(), "network.subnet".to_owned())),
        stack: 0..0,
    };
    let mut claims = vec![lab];
    let mut tables: Vec<_> = file.stack.iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    for (name, table) in tables {
        let Some(Ok(definition)) = stack::find(name.get(), folder) else { continue };
        let whose = format!("stack `{}`", definition.name);
        let mut add = |text: &str, description: &str, place: Option<(Range<usize>, String)>| {
            let found = subnet(text)?;
            claims.push(Claim {
                range: found.subnet.to_bits()..=found.broadcast().to_bits(),
                shown: format!("{} ({description}, {whose})", visible(text)),
                place,
                stack: name.span(),
            });
            Ok(())
        };
        for option in &definition.options {
            let Some(addresses) = option.addresses else { continue };
            let given = table.iter().find(|(key, _)| *key.get() == option.name).map(|(_, value)| value);
            let text = given.map(|value| value.get().to_string()).or_else(|| option.default.clone());
            let Some(text) = text.filter(|text| !text.is_empty()) else { continue };
            let key = join(&join("stack", &definition.name), &option.name);
            let wrong = match addresses {
                Addresses::Own => add(&text, &option.description, given.map(|at| (at.span(), key.clone()))),
                Addresses::Lab => of_lab(&text, network, nodes),
            };
            if let Err((message, help)) = wrong {
                report.error(Some(given.map_or(name.span(), At::span)), &key, message, help);
            }
        }
        for own in &definition.subnets {
            if let Err((message, help)) = add(&own.subnet, &own.description, None) {
                report.error(Some(name.span()), &join("stack", &definition.name), message, help);
            }
        }
    }
    overlaps(&claims, report);
}

/// Reports each network that overlaps an earlier one, where the labfile gives one of the two.
fn overlaps(claims: &[Claim], report: &mut Report<'_>) {
    for (index, claim) in claims.iter().enumerate() {
        let meets = |other: &&Claim| {
            claim.range.start() <= other.range.end() && other.range.start() <= claim.range.end()
        };
        for other in claims.iter().take(index).filter(meets) {
            let (span, key) = claim.place.clone().or_else(|| other.place.clone()).unwrap_or_else(|| {
                // Two of stacks' own.
                (claim.stack.clone(), "stack".to_owned())
            });
            let message = format!("{} overlaps {}", claim.shown, other.shown);
            report.error(Some(span), &key, message, "take a network that has no address in common with it");
        }
    }
}

/// What is wrong with addresses of the lab's network that no node is to have.
fn of_lab(text: &str, network: &Network, nodes: &[Node]) -> Result<(), (String, String)> {
    for part in text.split(',').map(str::trim) {
        let shown = visible(part);
        let Some(range) = range(part) else {
            let help = "write the first and the last address, such as \"192.168.1.11-192.168.1.19\"";
            return Err((format!("`{shown}` is no range of addresses"), help.to_owned()));
        };
        let ends = [*range.start(), *range.end()].map(Ipv4Addr::from_bits);
        if !ends.iter().all(|end| network.contains(*end)) {
            let message =
                format!("`{shown}` is not within the lab's network {}/{}", network.subnet, network.prefix);
            return Err((message, network.advice()));
        }
        if range.contains(&network.gateway.to_bits()) {
            let message = format!("`{shown}` holds the gateway's address {}", network.gateway);
            return Err((message, network.advice()));
        }
        if let Some(node) = nodes.iter().find(|node| range.contains(&node.ip.to_bits())) {
            let message = format!("`{shown}` holds {}, the address of node `{}`", node.ip, node.name);
            let help = "take others; nodes without `ip` have the first free ones from .10 on";
            return Err((message, help.to_owned()));
        }
    }
    Ok(())
}

/// The addresses that `FROM-TO` or `ADDRESS/LENGTH` means, the latter as MetalLB reads it: all of them.
fn range(text: &str) -> Option<RangeInclusive<u32>> {
    let address = |text: &str| text.trim().parse::<Ipv4Addr>().ok().map(Ipv4Addr::to_bits);
    if let Some((from, to)) = text.split_once('-') {
        return address(from).zip(address(to)).filter(|(from, to)| from <= to).map(|(from, to)| from..=to);
    }
    let (first, length) = text.split_once('/')?;
    let host = u32::MAX.checked_shr(length.parse::<u32>().ok().filter(|length| *length <= 32)?).unwrap_or(0);
    address(first).map(|first| (first & !host)..=(first | host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let numbers =
            |from: [u8; 4], to: [u8; 4]| Some(Ipv4Addr::from(from).to_bits()..=Ipv4Addr::from(to).to_bits());
        assert_eq!(range("10.0.0.5-10.0.0.9"), numbers([10, 0, 0, 5], [10, 0, 0, 9]));
        assert_eq!(range("10.0.0.16/28"), numbers([10, 0, 0, 16], [10, 0, 0, 31]));
        assert_eq!(range("10.0.0.7/32"), numbers([10, 0, 0, 7], [10, 0, 0, 7]));
        for wrong in ["10.0.0.9-10.0.0.5", "10.0.0.1/33", "10.0.0.1", "x-y", ""] {
            assert_eq!(range(wrong), None, "{wrong}");
        }
    }
}
