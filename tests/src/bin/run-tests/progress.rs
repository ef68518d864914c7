//! Whether a test gets on, by what it prints: each line is a step forward, but for one that only says again what goes
//! on.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// What a test has printed, and when it last got on.
pub struct Progress {
    /// The last line that was a step forward.
    last: String,
    /// When that was.
    at: Instant,
    /// What each action that goes on said last.
    said: HashMap<String, String>,
}

impl Progress {
    /// Of a test that begins now.
    pub fn new() -> Self {
        Self { last: "nothing".into(), at: Instant::now(), said: HashMap::new() }
    }

    /// Takes note of a line.
    pub fn line(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if let Some((action, said)) = heartbeat(line) {
            let before = self.said.insert(action.into(), said.into());
            if before.is_some_and(|before| before == said) {
                return;
            }
        }
        self.last = line.into();
        self.at = Instant::now();
    }

    /// The last line that was a step forward.
    pub fn last(&self) -> &str {
        &self.last
    }

    /// How long it has not got on.
    pub fn idle(&self) -> Duration {
        self.at.elapsed()
    }
}

/// Parts of a line like `master  kubernetes/init: 90 s: the last that was said`: what goes on, and what it said. The
/// second may be missing.
fn heartbeat(line: &str) -> Option<(&str, &str)> {
    line.match_indices(": ").find_map(|(at, colon)| {
        let (action, rest) = (&line[..at], &line[at + colon.len()..]);
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let counted = rest.len() < line.len() - at - colon.len();
        let said =
            rest.strip_prefix(" s").filter(|said| counted && (said.is_empty() || said.starts_with(": ")));
        said.map(|said| (action, said.trim_start_matches(": ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_has_an_action_and_what_it_said() {
        let parts = heartbeat("master  kubernetes/init: 90 s: wait: for it");
        assert_eq!(parts, Some(("master  kubernetes/init", "wait: for it")));
        assert_eq!(heartbeat("lab: master  boot: 30 s"), Some(("lab: master  boot", "")));
        for other in
            ["✓ master       boot (1.9 s)", "error: s: x", "took: 12 seconds", "exit status: 0 after 1.2 s"]
        {
            assert_eq!(heartbeat(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_only_said_again_is_no_progress() {
        let mut progress = Progress::new();
        let mut got_on = |line: &str| {
            progress.last = "none".into();
            progress.line(line);
            progress.last != "none"
        };
        assert!(got_on("  master  kubernetes/init: 30 s: pulling"));
        assert!(!got_on("  master  kubernetes/init: 60 s: pulling"));
        assert!(got_on("  worker  kubernetes/init: 60 s: pulling"));
        assert!(!got_on("  master  kubernetes/init: 90 s: pulling"));
        assert!(got_on("  master  kubernetes/init: 120 s: starting"));
        assert!(!got_on("  "));
        assert!(got_on("a line") && got_on("a line"), "a line that is no heartbeat");
    }
}
