//! The host's resolvers: the `nameserver` lines of resolv.conf(5), read again when the file has changed, and its search
//! domains.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use super::search;

/// Most resolvers that are asked, as in the C library.
const MAX: usize = 3;
/// Time between two looks at the file.
const LOOK: Duration = Duration::from_secs(1);
/// For how long one that did not answer is asked after the others.
const SILENCE: Duration = Duration::from_secs(60);

/// The list, as it was last read.
#[derive(Debug)]
pub struct Resolvers {
    path: PathBuf,
    port: u16,
    list: Vec<SocketAddr>,
    search: Vec<String>,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
    /// Those that did not answer, and until when they come last.
    silent: BTreeMap<SocketAddr, Instant>,
}

impl Resolvers {
    /// The resolvers that the file at `path` names, asked at `port`.
    pub fn new(path: PathBuf, port: u16) -> Resolvers {
        let (list, search, silent) = (Vec::new(), Vec::new(), BTreeMap::new());
        Resolvers { path, port, list, search, modified: None, looked: None, silent }
    }

    /// The resolvers, in the order in which they are to be asked: that of the file, but for those that are silent.
    pub fn list(&mut self, now: Instant) -> Vec<SocketAddr> {
        self.look(now);
        let (silent, mut list): (Vec<_>, Vec<_>) =
            self.list.iter().partition(|resolver| self.silent.contains_key(resolver));
        list.extend(silent);
        list
    }

    /// The host's search domains.
    pub fn search(&mut self, now: Instant) -> &[String] {
        self.look(now);
        &self.search
    }

    /// Read the file if it has changed.
    fn look(&mut self, now: Instant) {
        if self.looked.is_none_or(|then| now.saturating_duration_since(then) >= LOOK) {
            self.looked = Some(now);
            let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
            if modified.is_none() || modified != self.modified {
                self.modified = modified;
                let text = std::fs::read_to_string(&self.path).unwrap_or_default();
                self.list = parse(&text, self.port);
                self.search = search::parse(&text);
            }
            self.silent.retain(|resolver, until| *until > now && self.list.contains(resolver));
        }
    }

    /// A resolver has not answered in time.
    pub fn has_not_answered(&mut self, resolver: SocketAddr, now: Instant) {
        if self.list.contains(&resolver) {
            self.silent.insert(resolver, now + SILENCE);
        }
    }

    /// A resolver has answered.
    pub fn has_answered(&mut self, resolver: SocketAddr) {
        self.silent.remove(&resolver);
    }
}

fn parse(text: &str, port: u16) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            match address.split_once('%') {
                Some((address, scope)) => {
                    let (address, scope) = (address.parse::<Ipv6Addr>().ok()?, interface(scope)?);
                    Some(SocketAddrV6::new(address, port, 0, scope).into())
                }
                None => Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, port)),
            }
        })
        .take(MAX)
        .collect()
}

/// The number of an interface that a link-local address is on, by number or name.
fn interface(scope: &str) -> Option<u32> {
    let by_name = || {
        let name = (!scope.contains('/')).then_some(scope)?;
        std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
    };
    scope.parse().ok().or_else(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_again_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut resolvers = Resolvers::new(path.clone(), 53);
        let now = Instant::now();
        assert!(resolvers.list(now).is_empty());
        std::fs::write(
            &path,
            "# a comment\nsearch lan\nnameserver 192.0.2.1\nnameserver fe80::1%none\nnameserver ::1\nnameserver fe80::1%lo\n",
        )
        .unwrap();
        assert!(resolvers.list(now).is_empty(), "not looked at twice a second");
        assert_eq!(resolvers.search(now + LOOK), ["lan"]);
        assert_eq!(
            resolvers.list(now + LOOK),
            [
                "192.0.2.1:53".parse().unwrap(),
                "[::1]:53".parse().unwrap(),
                SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 1).into()
            ]
        );
    }

    #[test]
    fn one_that_does_not_answer_is_asked_last_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        let mut resolvers = Resolvers::new(path, 53);
        let [one, two] = ["192.0.2.1:53", "192.0.2.2:53"].map(|text| text.parse::<SocketAddr>().unwrap());
        let now = Instant::now();
        assert_eq!(resolvers.list(now), [one, two]);
        resolvers.has_not_answered(one, now);
        assert_eq!(resolvers.list(now), [two, one]);
        resolvers.has_answered(one);
        assert_eq!(resolvers.list(now), [one, two]);
        resolvers.has_not_answered(one, now);
        assert_eq!(resolvers.list(now + SILENCE), [one, two]);
    }
}
