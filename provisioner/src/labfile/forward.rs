//! Forwards: `[BIND_IP:]HOST_PORT:[GUEST_IP:]GUEST_PORT[/udp]`, ports being numbers or ranges `a-b`.

use std::{collections::HashMap, net::Ipv4Addr};

use lab_net::config::{Forward, Protocol};

use super::{
    diagnostic::visible,
    file::At,
    report::Report,
    topology::{Network, Node},
};

/// Most ports that a lab forwards; each is a socket.
const MAX: usize = 1024;

/// One line of a `forward` list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    bind: Ipv4Addr,
    host: (u16, u16),
    guest_ip: Option<Ipv4Addr>,
    guest: (u16, u16),
    protocol: Protocol,
}

/// Reads a forward.
///
/// # Errors
/// What is wrong, and what would be right.
pub fn parse(text: &str) -> Result<Rule, (String, String)> {
    let shown = visible(text);
    let form = "write \"HOST_PORT:GUEST_PORT\", such as \"8080:80\"; in full \"[BIND_IP:]HOST_PORT:[GUEST_IP:]GUEST_PORT[/udp]\"";
    let (ends, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ends, "tcp")) => (ends, Protocol::Tcp),
        Some((ends, "udp")) => (ends, Protocol::Udp),
        Some((_, other)) => {
            return Err((
                format!("`{}` is not a protocol", visible(other)),
                "end it in /tcp or /udp".to_owned(),
            ));
        }
    };
    let parts: Vec<&str> = ends.split(':').collect();
    let (bind, host, guest_ip, guest) = match parts.as_slice() {
        [host, guest] => (None, *host, None, *guest),
        [bind, host, guest] if bind.contains('.') => (Some(*bind), *host, None, *guest),
        [host, guest_ip, guest] => (None, *host, Some(*guest_ip), *guest),
        [bind, host, guest_ip, guest] => (Some(*bind), *host, Some(*guest_ip), *guest),
        _ => return Err((format!("`{shown}` is not a forward"), form.to_owned())),
    };
    let address = |text: &str| {
        text.parse::<Ipv4Addr>()
            .map_err(|_| (format!("`{}` is not an IPv4 address", visible(text)), form.to_owned()))
    };
    let rule = Rule {
        bind: bind.map_or(Ok(Ipv4Addr::LOCALHOST), address)?,
        host: ports(host)?,
        guest_ip: guest_ip.map(address).transpose()?,
        guest: ports(guest)?,
        protocol,
    };
    if rule.host.1 - rule.host.0 != rule.guest.1 - rule.guest.0 {
        let count = |(first, last): (u16, u16)| u32::from(last - first) + 1;
        let message =
            format!("`{shown}` leads {} host ports to {} guest ports", count(rule.host), count(rule.guest));
        return Err((message, "both ranges need the same length".to_owned()));
    }
    Ok(rule)
}

/// The forwards that a text means for the node with this address: as in a labfile's `forward` list.
///
/// # Errors
/// What is wrong, and what would be right.
pub fn parse_forward(text: &str, ip: Ipv4Addr) -> Result<Vec<Forward>, String> {
    let rule = parse(text).map_err(|(message, help)| format!("{message}; {help}"))?;
    if usize::from(rule.host.1 - rule.host.0) >= MAX {
        return Err(format!("this would forward more than {MAX} ports; forward fewer: each takes a socket"));
    }
    rule.expand(0, ip).ok_or_else(|| format!("the host ports of `{}` would be above 65535", visible(text)))
}

fn ports(text: &str) -> Result<(u16, u16), (String, String)> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port @ 1..) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err((
            format!("`{}` is not a port", visible(text)),
            "ports are 1 to 65535, ranges `a-b`".to_owned(),
        )),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err((format!("the range {first}-{last} runs backwards"), format!("write {last}-{first}")));
    }
    Ok((first, last))
}

impl Rule {
    /// The forwards for the node with this address that is the `index`-th (from 0) of its kind; `None` where its host
    /// ports would be above 65535.
    fn expand(&self, index: usize, ip: Ipv4Addr) -> Option<Vec<Forward>> {
        let count = u32::from(self.host.1 - self.host.0) + 1;
        let shift = count.checked_mul(u32::try_from(index).ok()?)?;
        let first = u16::try_from(u32::from(self.host.0).checked_add(shift)?).ok()?;
        first.checked_add(self.host.1 - self.host.0)?;
        let guest_ip = self.guest_ip.unwrap_or(ip);
        let forward = |(host_port, guest_port)| Forward {
            bind: self.bind,
            host_port,
            guest_ip,
            guest_port,
            protocol: self.protocol,
        };
        Some((first..=u16::MAX).zip(self.guest.0..=self.guest.1).map(forward).collect())
    }
}

/// Host ports that are taken already, and how many.
#[derive(Default)]
pub struct Taken {
    ports: HashMap<(Protocol, u16), Vec<(Ipv4Addr, String)>>,
    count: usize,
}

impl Taken {
    /// Adds the forwards of a node's table to the node; what is wrong with them is reported. `key` is that of the
    /// list.
    pub fn add(
        &mut self,
        node: &mut Node,
        index: usize,
        list: &[At<String>],
        key: &str,
        network: Option<&Network>,
        report: &mut Report<'_>,
    ) {
        for (position, text) in list.iter().enumerate() {
            let mut fail = |message: String, help: String| {
                report.error(Some(text.span()), &format!("{key}[{position}]"), message, help);
            };
            let rule = match parse(text.get()) {
                Ok(rule) => rule,
                Err((message, help)) => {
                    fail(message, help);
                    continue;
                }
            };
            if let (Some(ip), Some(network)) = (rule.guest_ip, network)
                && let Some(why) = network.refusal(ip)
            {
                fail(format!("nothing in the lab can have {ip}: {why}"), network.advice());
                continue;
            }
            let ports = usize::from(rule.host.1 - rule.host.0) + 1;
            self.count = self.count.saturating_add(ports);
            if self.count > MAX {
                fail(
                    format!("this would forward more than {MAX} ports"),
                    "forward fewer: each takes a socket".to_owned(),
                );
                return;
            }
            let Some(forwards) = rule.expand(index, node.ip) else {
                let message = format!("the host ports of `{}` would be above 65535", node.name);
                fail(
                    message,
                    "each further node of a table takes the next host ports: begin lower".to_owned(),
                );
                continue;
            };
            for forward in forwards {
                match self.claim(&forward, &node.name) {
                    None => node.forwards.push(forward),
                    Some(other) => {
                        let who = match other == node.name {
                            true => format!("twice by `{other}`"),
                            false => format!("by `{other}` and by `{}`", node.name),
                        };
                        let protocol = if forward.protocol == Protocol::Udp { "/udp" } else { "" };
                        let message = format!("host port {}{protocol} is forwarded {who}", forward.host_port);
                        fail(message, "take another host port".to_owned());
                        break;
                    }
                }
            }
        }
    }

    /// Takes a host port; the node that has it already, if one has.
    fn claim(&mut self, forward: &Forward, node: &str) -> Option<String> {
        let owners = self.ports.entry((forward.protocol, forward.host_port)).or_default();
        let collides =
            |bind: Ipv4Addr| bind == forward.bind || bind.is_unspecified() || forward.bind.is_unspecified();
        if let Some((_, owner)) = owners.iter().find(|(bind, _)| collides(*bind)) {
            return Some(owner.clone());
        }
        owners.push((forward.bind, node.to_owned()));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms() {
        let ip = Ipv4Addr::new(10, 0, 0, 9);
        let one = |text: &str| parse(text).unwrap().expand(0, ip).unwrap()[0].clone();
        assert_eq!(one("8080:80").bind, Ipv4Addr::LOCALHOST);
        assert_eq!(one("8080:80").guest_ip, ip);
        assert_eq!(one("0.0.0.0:8080:80").bind, Ipv4Addr::UNSPECIFIED);
        assert_eq!(one("8080:10.0.0.3:80").guest_ip, Ipv4Addr::new(10, 0, 0, 3));
        assert_eq!(one("127.0.0.2:53:10.0.0.3:5353/udp").protocol, Protocol::Udp);
        let range = parse("8000-8002:80-82").unwrap();
        let ports = |index| {
            range.expand(index, ip).unwrap().iter().map(|f| (f.host_port, f.guest_port)).collect::<Vec<_>>()
        };
        assert_eq!(ports(0), [(8000, 80), (8001, 81), (8002, 82)]);
        assert_eq!(ports(1), [(8003, 80), (8004, 81), (8005, 82)]);
        assert_eq!(parse("65535:80").unwrap().expand(1, ip), None);
        assert_eq!(parse("1-65535:1-65535").unwrap().expand(0, ip).unwrap().len(), 65535);
    }
}
