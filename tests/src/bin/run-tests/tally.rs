//! What became of the tests, and what is told of it.

use std::{os::unix::process::ExitStatusExt, time::Duration};

use crate::watch::{End, Ran};

/// How many of the longest tests are named at the end.
const LONGEST: usize = 10;

/// What became of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has proved what it is for.
    Passed,
    /// It has not, for this reason.
    Failed(String),
    /// It could not, for this reason.
    Skipped(String),
}

/// What a test said of itself.
#[derive(Debug, Default)]
pub struct Said {
    skipped: Option<String>,
    has_run: bool,
}

impl Said {
    /// Takes note of a line.
    pub fn line(&mut self, line: &str) {
        // The first follows what the program of tests says of it.
        let line = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
            .map_or(line, |(_, said)| said);
        if let Some(why) = line.strip_prefix("SKIPPED: ") {
            self.skipped = Some(why.into());
        }
        self.has_run |= line.starts_with("test result: ok. 1 passed;");
    }
}

/// Judges a test that may go on for `hang` without getting on; `None` if this program was told to end.
pub fn judge(ran: &Ran, said: &Said, hang: Duration) -> Option<Verdict> {
    let hung = || {
        let idle = span(ran.idle.as_secs_f64());
        Verdict::Failed(format!("hung: no progress for {idle}; the last was: {}", ran.last))
    };
    Some(match ran.end {
        End::Interrupted => return None,
        End::Hung => hung(),
        End::Late if ran.idle >= hang => hung(),
        End::Late => Verdict::Skipped(format!(
            "was still getting on when there was no more time: {}, {} s ago; it needs more than {} here",
            ran.last,
            ran.idle.as_secs(),
            span(ran.took.as_secs_f64())
        )),
        End::Exited(status) => match (status.code(), &said.skipped) {
            (Some(0), Some(why)) => Verdict::Skipped(why.clone()),
            (Some(0), None) if said.has_run => Verdict::Passed,
            (Some(0), None) => Verdict::Failed("no test of this name has run".into()),
            (Some(code), _) => Verdict::Failed(format!("ended with status {code}")),
            (None, _) => Verdict::Failed(format!("ended by signal {}", status.signal().unwrap_or(0))),
        },
    })
}

/// What became of all.
#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    skipped: usize,
    failures: Vec<String>,
    times: Vec<(f64, String)>,
}

impl Tally {
    /// Counts a test. `seconds` is what it took, if it has run.
    pub fn add(&mut self, name: &str, verdict: &Verdict, seconds: Option<f64>) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Skipped(_) => self.skipped += 1,
            Verdict::Failed(why) => self.failures.push(format!("{name}: {why}")),
        }
        self.times.extend(seconds.map(|seconds| (seconds, name.to_owned())));
    }

    /// Whether nothing has failed.
    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    /// The ten longest tests, a line each.
    pub fn longest(&self) -> Vec<String> {
        let mut times: Vec<_> = self.times.iter().collect();
        times.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        times.iter().take(LONGEST).map(|(seconds, name)| format!("{seconds:7.0} s  {name}")).collect()
    }

    /// For scripts/test: numbers of those that passed, failed and were skipped, then a line for each that failed.
    pub fn result(&self) -> String {
        let mut text = format!("{} {} {}\n", self.passed, self.failures.len(), self.skipped);
        for failure in &self.failures {
            text += failure;
            text += "\n";
        }
        text
    }
}

/// A time in words.
pub fn span(seconds: f64) -> String {
    if seconds < 100.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    const HANG: Duration = Duration::from_secs(600);

    fn judged(end: End, idle_s: u64, lines: &[&str]) -> Verdict {
        let mut said = Said::default();
        lines.iter().for_each(|line| said.line(line));
        let took = Duration::from_secs(1000);
        let ran = Ran { end, took, last: "a  boot".into(), idle: Duration::from_secs(idle_s) };
        judge(&ran, &said, HANG).unwrap()
    }

    #[test]
    fn a_test_that_has_ended_is_judged_by_its_status_and_what_it_said() {
        let status = |wait| End::Exited(ExitStatus::from_raw(wait));
        let good = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(judged(status(0), 0, &[good]), Verdict::Passed);
        assert_eq!(
            judged(status(0), 0, &["SKIPPED: a thing: not here", good]),
            Verdict::Skipped("a thing: not here".into())
        );
        let first = "test a_thing ... SKIPPED: a thing: not here";
        assert_eq!(judged(status(0), 0, &[first, good]), Verdict::Skipped("a thing: not here".into()));
        // What a command of the test says is indented.
        assert_eq!(judged(status(0), 0, &["  SKIPPED: a thing", good]), Verdict::Passed);
        let none = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out";
        assert!(matches!(judged(status(0), 0, &[none]), Verdict::Failed(_)));
        let failed = judged(status(101 << 8), 0, &["SKIPPED: a thing", good]);
        assert_eq!(failed, Verdict::Failed("ended with status 101".into()));
        assert_eq!(judged(status(11), 0, &[good]), Verdict::Failed("ended by signal 11".into()));
    }

    #[test]
    fn a_test_that_was_stopped_has_hung_or_was_getting_on() {
        let Verdict::Failed(why) = judged(End::Hung, 600, &[]) else { panic!() };
        assert_eq!(why, "hung: no progress for 10 min; the last was: a  boot");
        let Verdict::Skipped(why) = judged(End::Late, 20, &[]) else { panic!() };
        assert!(why.contains("a  boot, 20 s ago; it needs more than 17 min"), "{why}");
        assert!(matches!(judged(End::Late, 600, &[]), Verdict::Failed(_)));
    }

    #[test]
    fn all_is_counted_and_the_ten_longest_are_named() {
        let mut tally = Tally::default();
        assert!(tally.is_good());
        for number in 0..12 {
            tally.add(&format!("t{number}"), &Verdict::Passed, Some(f64::from(number)));
        }
        tally.add("bad", &Verdict::Failed("why".into()), Some(100.0));
        tally.add("late", &Verdict::Skipped("no time".into()), None);
        assert!(!tally.is_good());
        assert_eq!(tally.result(), "12 1 1\nbad: why\n");
        let longest = tally.longest();
        assert_eq!(longest.len(), 10);
        assert_eq!((&*longest[0], &*longest[9]), ("    100 s  bad", "      3 s  t3"));
    }
}
