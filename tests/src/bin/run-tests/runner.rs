//! All tests, one after the other, as far as the time goes.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    place::Place,
    record::Record,
    schedule::{self, Candidate, Speed},
    table::Row,
    tally::{Said, Tally, Verdict, judge, span},
    watch::{self, End, Limits, Ran, Signals},
};

/// What a test needs that can't run, in seconds.
const CANNOT_RUN_S: f64 = 1.0;

/// A test function.
#[derive(Debug, Clone)]
pub struct Test {
    /// What is known of it.
    pub row: Row,
    /// The program that it is in.
    pub program: PathBuf,
    /// Its name there.
    pub function: String,
}

/// How long tests may run.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// When the last is stopped.
    pub end: Instant,
    /// How long one may go on without getting on where the factor is 1, or less.
    pub hang: Duration,
    /// How long one has to end by itself once it is stopped.
    pub grace: Duration,
}

/// The tests that have not run yet, and what became of the others.
pub struct Runner<'p> {
    /// Those to come, in the order in which they have their place.
    pub tests: Vec<Test>,
    /// Where they run.
    pub place: &'p Place,
    /// What they took before.
    pub record: Record,
    /// How slow the machine is.
    pub speed: Speed,
    /// How long they may run.
    pub times: Times,
    /// What became of those that have run.
    pub tally: Tally,
    /// Takes each line that is to be told.
    pub say: &'p mut dyn FnMut(&str),
}

impl Runner<'_> {
    /// Runs the tests that the time suffices for, and says which it does not suffice for. False if this program was
    /// told to end.
    pub fn run(&mut self, signals: &Signals) -> bool {
        loop {
            if signals.have_come() {
                return false;
            }
            let left_s = self.left_s();
            let candidates: Vec<_> = self.tests.iter().map(|test| self.candidate(test)).collect();
            let Some(index) = schedule::next(&candidates, left_s) else { break };
            let test = self.tests.remove(index);
            let needs_s = candidates.get(index).map_or(0.0, |candidate| candidate.needs_s);
            (self.say)(&format!(
                "=== {} (needs about {} here, {} are left)",
                test.row.name,
                span(needs_s),
                span(left_s)
            ));
            if !self.run_one(&test, signals) {
                return false;
            }
        }
        let left_s = self.left_s();
        for test in std::mem::take(&mut self.tests) {
            let needs_s = self.candidate(&test).needs_s;
            let why = format!("needs about {} here, {} are left", span(needs_s), span(left_s));
            (self.say)(&format!("SKIPPED: {}: {why}", test.row.name));
            self.tally.add(&test.row.name, &Verdict::Skipped(why), None);
        }
        true
    }

    fn left_s(&self) -> f64 {
        self.times.end.saturating_duration_since(Instant::now()).as_secs_f64()
    }

    fn candidate(&self, test: &Test) -> Candidate {
        let needs_s = match test.row.can_run() {
            true => self.record.seconds(&test.row) * self.speed.factor(),
            false => CANNOT_RUN_S,
        };
        Candidate { needs_s, essential: test.row.essential }
    }

    /// Runs a test; false if this program was told to end meanwhile.
    fn run_one(&mut self, test: &Test, signals: &Signals) -> bool {
        if let Err(why) = self.place.prepare(self.times.end, signals) {
            (self.say)(&format!("the emulated host does not start: {why}"));
        }
        let hang = self.times.hang.mul_f64(self.speed.factor().max(1.0));
        let limits = Limits { end: self.times.end, hang, grace: self.times.grace };
        let mut said = Said::default();
        let say = &mut *self.say;
        let ran = watch::run(&mut command(test, self.place), limits, Some(signals), &mut |line| {
            said.line(line);
            say(line);
        });
        let verdict = match &ran {
            Ok(ran) => match judge(ran, &said, hang) {
                Some(verdict) => verdict,
                None => return false,
            },
            Err(error) => Verdict::Failed(format!("cannot be run: {error}")),
        };
        let took_s = ran.as_ref().map_or(0.0, |ran| ran.took.as_secs_f64());
        let told = match &verdict {
            Verdict::Passed => "passed".to_owned(),
            Verdict::Failed(why) => format!("FAILED: {why}"),
            Verdict::Skipped(why) => format!("skipped: {why}"),
        };
        (self.say)(&format!("--- {}: {took_s:.0} s: {told}", test.row.name));
        self.tally.add(&test.row.name, &verdict, Some(took_s));
        if let Ok(ran) = &ran {
            self.learn(test, &verdict, ran);
        }
        let ended_by_itself = ran.is_ok_and(|ran| matches!(ran.end, End::Exited(status) if status.success()));
        if !ended_by_itself && let Err(why) = self.place.clean() {
            (self.say)(&format!("what {} left: {why}", test.row.name));
        }
        true
    }

    fn learn(&mut self, test: &Test, verdict: &Verdict, ran: &Ran) {
        let took_s = ran.took.as_secs_f64();
        let kept = match (verdict, ran.end) {
            (Verdict::Passed, _) => {
                self.speed.learn(took_s, self.record.seconds(&test.row));
                self.record.took(&test.row, took_s, self.speed.factor())
            }
            (Verdict::Skipped(_), End::Late) => self.record.took_more(&test.row, took_s, self.speed.factor()),
            _ => Ok(()),
        };
        if let Err(error) = kept {
            (self.say)(&format!("cannot keep what {} took: {error}", test.row.name));
        }
    }
}

fn command(test: &Test, place: &Place) -> Command {
    let mut command = Command::new(&test.program);
    command
        .args(["--exact", &test.function, "--nocapture", "--test-threads=1"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .env("LAB_HOME", &place.home)
        .env("LAB_TEST_SCRATCH", &place.scratch);
    command
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GOOD: &str = "echo 'test result: ok. 1 passed; 0 failed'";
    const LONG: Duration = Duration::from_secs(1000);

    /// A home with a `lab` that writes down what it is told, and scripts that stand for tests.
    struct StandIns {
        dir: tempfile::TempDir,
        place: Place,
    }

    impl StandIns {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            let place = Place { lab: path("lab"), home: path("home"), scratch: path("scratch") };
            for folder in [place.home.join("labs"), place.scratch.clone()] {
                fs::create_dir_all(folder).unwrap();
            }
            let stand_ins = Self { dir, place };
            let calls = stand_ins.dir.path().join("calls").display().to_string();
            stand_ins.script("lab", &format!("echo \"$@\" >> {calls}\ncase $2 in ls) echo [] ;; esac"));
            stand_ins
        }

        fn script(&self, name: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            // Written by another process: a child of another test of this one might have it open when it is run.
            let mut write = Command::new("sh");
            write
                .args(["-c", "printf '#!/bin/sh\n%s\n' \"$1\" >\"$0\" && chmod 755 \"$0\""])
                .arg(&path)
                .arg(text);
            assert!(write.status().unwrap().success());
            path
        }

        fn test(&self, name: &str, seconds: f64, script: &str) -> Test {
            let row = Row { seconds, ..Row::unknown(name) };
            Test { row, program: self.script(name, script), function: name.into() }
        }

        /// Tests on a machine that is as slow as that of the table.
        fn runner<'s>(
            &'s self,
            tests: Vec<Test>,
            end: Duration,
            hang: Duration,
            say: &'s mut dyn FnMut(&str),
        ) -> Runner<'s> {
            Runner {
                tests,
                place: &self.place,
                record: Record::read(Some(self.dir.path().join("record"))),
                speed: Speed::of_boot(schedule::BOOT_S),
                times: Times { end: Instant::now() + end, hang, grace: Duration::from_secs(10) },
                tally: Tally::default(),
                say,
            }
        }

        /// Runs tests; the counts, the failures and all that was told.
        fn run(&self, tests: Vec<Test>, end: Duration, hang: Duration) -> (Vec<usize>, Vec<String>, String) {
            let mut told = String::new();
            let mut say = |line: &str| {
                told += line;
                told += "\n";
            };
            let mut runner = self.runner(tests, end, hang, &mut say);
            let (signals, _none) = Signals::by_hand();
            assert!(runner.run(&signals));
            let result = runner.tally.result();
            let mut lines = result.lines().map(str::to_owned);
            let counts = lines.next().unwrap();
            (counts.split(' ').map(|count| count.parse().unwrap()).collect(), lines.collect(), told)
        }

        /// What `lab` was told.
        fn calls(&self) -> String {
            fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default()
        }
    }

    #[test]
    fn what_fits_runs_and_what_does_not_is_skipped() {
        let all = StandIns::new();
        let ran = all.dir.path().join("ran");
        let test = |name: &str, seconds: f64| {
            all.test(name, seconds, &format!("echo {name} $1 $2 >> {}; {GOOD}", ran.display()))
        };
        let tests = vec![test("long", 500.0), test("short", 5.0), test("too_long", 2000.0)];
        let (counts, _, told) = all.run(tests, LONG, LONG);
        assert_eq!(counts, [2, 0, 1]);
        assert!(told.contains("\nSKIPPED: too_long: needs about "), "{told}");
        assert_eq!(fs::read_to_string(&ran).unwrap(), "short --exact short\nlong --exact long\n");
        assert_eq!(all.calls(), "", "nothing was left to be removed");
        // What was seen here counts the next time.
        assert!(Record::read(Some(all.dir.path().join("record"))).seconds(&test("long", 500.0).row) < 100.0);
    }

    #[test]
    fn a_test_that_fails_or_crashes_is_a_failure_and_what_it_left_is_removed() {
        let all = StandIns::new();
        let scratch = all.place.scratch.display();
        let tests = vec![
            all.test("fails", 1.0, &format!("mkdir -p {scratch}/of/it; exit 101")),
            all.test("crashes", 2.0, "kill -SEGV $$"),
            all.test("cannot", 3.0, &format!("echo 'SKIPPED: it: no'; {GOOD}")),
            all.test("runs_nothing", 4.0, "echo 'test result: ok. 0 passed; 0 failed'"),
        ];
        let (counts, failures, _) = all.run(tests, LONG, LONG);
        assert_eq!(counts, [0, 3, 1]);
        assert_eq!(failures[..2], ["fails: ended with status 101", "crashes: ended by signal 11"]);
        assert_eq!(fs::read_dir(&all.place.scratch).unwrap().count(), 0);
        assert!(all.calls().contains("ls -o json"), "{}", all.calls());
    }

    #[test]
    fn what_overruns_is_skipped_if_it_gets_on_and_failed_if_it_hangs() {
        let all = StandIns::new();
        let hangs = all.test("hangs", 1.0, "while :; do echo 'a  boot: 1 s: same'; sleep 0.1; done");
        let good = all.test("good", 2.0, GOOD);
        let (counts, failures, _) = all.run(vec![hangs, good], LONG, Duration::from_secs(3));
        assert_eq!(counts, [1, 1, 0], "another comes after it");
        assert_eq!(failures, ["hangs: hung: no progress for 3 s; the last was: a  boot: 1 s: same"]);

        let gets_on = all.test("gets_on", 1.0, "while :; do echo a step; sleep 0.1; done");
        let next = all.test("next", 500.0, GOOD);
        let (counts, _, told) = all.run(vec![gets_on, next], Duration::from_secs(5), LONG);
        assert_eq!(counts, [0, 0, 2]);
        assert!(
            told.contains("skipped: was still getting on when there was no more time: a step, "),
            "{told}"
        );
        assert!(all.calls().contains("ls -o json"), "what it left was looked for");
    }

    #[test]
    fn on_a_signal_nothing_more_is_run() {
        let all = StandIns::new();
        let (signals, sender) = Signals::by_hand();
        drop(sender);
        let mut say = |_: &str| ();
        let mut runner = all.runner(vec![all.test("good", 1.0, GOOD)], LONG, LONG, &mut say);
        assert!(!runner.run(&signals));
        assert_eq!(runner.tally.result(), "0 0 0\n");
    }

    /// What `lab ls` tells of a lab of a test, and of somebody else's.
    fn listed(all: &StandIns) -> String {
        let labfile = all.place.scratch.join("of it/lab.toml").display().to_string();
        serde_json::json!([{"name": "a", "labfile": labfile}, {"name": "b", "labfile": "/b/lab.toml"}])
            .to_string()
    }

    #[test]
    fn what_a_test_left_in_an_emulated_host_goes_with_that() {
        let all = StandIns::new();
        let home = |below: &str| all.place.home.join(below);
        let other = all.place.scratch.join("other/host");
        for folder in ["labs/.build-1", "labs/a", "kept/a", "labs/b", "kept/b", "host"] {
            fs::create_dir_all(home(folder)).unwrap();
        }
        fs::create_dir_all(&other).unwrap();
        let calls = all.dir.path().join("calls").display().to_string();
        all.script("lab", &format!("echo \"$@\" >> {calls}\ncase $2 in ls) echo '{}' ;; esac", listed(&all)));
        all.run(vec![all.test("fails", 1.0, "exit 1")], LONG, LONG);
        let stop = "-q host stop --force\n";
        assert_eq!(all.calls(), format!("-q host start\n{stop}{stop}-q ls -o json\n"));
        assert!(!home("labs/.build-1").exists() && !home("labs/a").exists() && !home("kept/a").exists());
        assert!(home("labs/b").exists() && home("kept/b").exists() && !other.exists());
    }

    #[test]
    fn labs_that_a_test_left_are_destroyed() {
        let all = StandIns::new();
        let path = |name: &str| all.dir.path().join(name).display().to_string();
        let (calls, left) = (path("calls"), path("left"));
        fs::write(&left, listed(&all)).unwrap();
        let script = format!(
            "echo \"$@\" >> {calls}\ncase \"$*\" in *ls*) cat {left} ;; *--forget) echo [] > {left} ;; esac"
        );
        all.script("lab", &script);
        all.run(vec![all.test("fails", 1.0, "exit 1")], LONG, LONG);
        let destroy = format!("-q -f {}/of it/lab.toml destroy --yes", all.place.scratch.display());
        let ls = "-q ls -o json";
        assert_eq!(all.calls(), format!("{ls}\n{destroy} --all-forks\n{ls}\n{destroy} --forget\n{ls}\n"));
    }
}
