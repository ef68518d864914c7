//! Waits of tests: each has a limit, and tells every half minute what is waited for and what was last seen.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// How often it is told.
const PAUSE: Duration = Duration::from_secs(30);

/// How many waits there are. What they ask again and again is not worth a line each time.
static WAITS: AtomicUsize = AtomicUsize::new(0);

/// Whether somebody asks again and again.
pub fn is_asking() -> bool {
    WAITS.load(Ordering::Relaxed) > 0
}

/// Something that is waited for.
pub struct Waiting {
    what: String,
    since: Instant,
    limit: Duration,
    told: Duration,
}

impl Waiting {
    /// Begins to wait, for this long.
    pub fn new(what: impl Into<String>, limit: Duration) -> Self {
        WAITS.fetch_add(1, Ordering::Relaxed);
        Self { what: what.into(), since: Instant::now(), limit, told: Duration::ZERO }
    }

    /// Whether the time is over, having seen this.
    pub fn is_over(&mut self, seen: &str) -> bool {
        let waited = self.since.elapsed();
        if waited >= self.told + PAUSE {
            self.told = waited;
            eprintln!("    {}", line(&self.what, waited, seen));
        }
        waited >= self.limit
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The form in which `lab` tells of an action that goes on: said again, it is no progress.
fn line(what: &str, waited: Duration, seen: &str) -> String {
    let last = seen.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    format!("waiting for {what}: {} s: {last}", waited.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_tells_what_it_has_seen_last() {
        let told = line("a page", Duration::from_secs(61), "first\n  not yet\n\n");
        assert_eq!(told, "waiting for a page: 61 s: not yet");
        assert_eq!(line("it", Duration::from_secs(30), ""), "waiting for it: 30 s: ");
    }

    #[test]
    fn it_is_over_at_its_limit() {
        let mut short = Waiting::new("nothing", Duration::ZERO);
        assert!(is_asking() && short.is_over(""));
        assert!(!Waiting::new("nothing", Duration::from_secs(1000)).is_over(""));
    }
}
