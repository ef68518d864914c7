//! What a network has to say while it runs: lines on standard error. Who started it may be gone, with the other end
//! of that; nothing is lost then but the words.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io::Write,
    time::{Duration, Instant},
};

/// Time between two lines about the same.
const MINUTE: Duration = Duration::from_secs(60);
/// Most things that are counted at once; of others nothing is said.
const MAX: usize = 64;

/// Say something.
pub fn warn(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "lab-net: {message}");
}

/// What may happen very often, at a node's wish: it is said at once, and then each minute, with how often it was.
#[derive(Debug, Default)]
pub struct Notices {
    /// Since when each is counted, and how often it was since.
    counts: BTreeMap<String, (Instant, u64)>,
}

impl Notices {
    /// That happened.
    pub fn happened(&mut self, what: impl Display, now: Instant) {
        let what = what.to_string();
        if let Some((_, count)) = self.counts.get_mut(&what) {
            *count = count.saturating_add(1);
        } else if self.counts.len() < MAX {
            warn(&what);
            self.counts.insert(what, (now, 0));
        }
    }

    /// When [`Notices::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.counts.values().map(|(since, _)| *since + MINUTE).min()
    }

    /// Say how often it was, where a minute is over.
    pub fn expire(&mut self, now: Instant) {
        for line in self.take_due(now) {
            warn(line);
        }
    }

    fn take_due(&mut self, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        self.counts.retain(|what, (since, count)| {
            if now.saturating_duration_since(*since) < MINUTE {
                return true;
            }
            // What has not happened again is forgotten.
            let again = *count > 0;
            if again {
                lines.push(format!("{what} ({count} times more in a minute)"));
            }
            (*since, *count) = (now, 0);
            again
        });
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_counted_and_not_repeated() {
        let (mut notices, mut now) = (Notices::default(), Instant::now());
        assert_eq!(notices.deadline(), None);
        (0..1000).for_each(|_| notices.happened("it rains", now));
        assert_eq!(notices.deadline(), Some(now + MINUTE));
        assert!(notices.take_due(now).is_empty());
        now += MINUTE;
        assert_eq!(notices.take_due(now), ["it rains (999 times more in a minute)"]);
        notices.happened("it rains", now);
        now += MINUTE;
        assert_eq!(notices.take_due(now), ["it rains (1 times more in a minute)"]);
        now += MINUTE;
        assert!(notices.take_due(now).is_empty() && notices.deadline().is_none());
        (0..1000).for_each(|n| notices.happened(n, now));
        assert_eq!(notices.counts.len(), MAX);
    }
}
