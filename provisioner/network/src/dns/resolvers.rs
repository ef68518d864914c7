//! The host's resolvers: the `nameserver` lines of resolv.conf(5), read again when the file has changed.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

/// Most resolvers that are asked, as in the C library.
const MAX: usize = 3;
/// Time between two looks at the file.
const LOOK: Duration = Duration::from_secs(1);

/// The list, as it was last read.
#[derive(Debug)]
pub struct Resolvers {
    path: PathBuf,
    port: u16,
    list: Vec<SocketAddr>,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
}

impl Resolvers {
    /// The resolvers that the file at `path` names, asked at `port`.
    pub fn new(path: PathBuf, port: u16) -> Resolvers {
        Resolvers { path, port, list: Vec::new(), modified: None, looked: None }
    }

    /// The resolvers, in the order in which they are to be asked.
    pub fn list(&mut self, now: Instant) -> &[SocketAddr] {
        if self.looked.is_none_or(|then| now.saturating_duration_since(then) >= LOOK) {
            self.looked = Some(now);
            let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
            if modified.is_none() || modified != self.modified {
                self.modified = modified;
                self.list = parse(&std::fs::read_to_string(&self.path).unwrap_or_default(), self.port);
            }
        }
        &self.list
    }
}

fn parse(text: &str, port: u16) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, port))
        })
        .take(MAX)
        .collect()
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
            "# a comment\nsearch lan\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver ::1\n",
        )
        .unwrap();
        assert!(resolvers.list(now).is_empty(), "not looked at twice a second");
        assert_eq!(
            resolvers.list(now + LOOK),
            ["192.0.2.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]
        );
    }
}
