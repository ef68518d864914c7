//! Runs the end-to-end tests within a time, each test function by itself; scripts/test starts it.
//!
//! - `table`: what each test takes on the machine of docs/benchmarks.md
//! - `record`: what it took on this one
//! - `schedule`: how slow this machine is, and which test comes next
//! - `watch`, `progress`: one command, what it prints, and whether it gets on
//! - `tally`: what became of each
//! - `place`: LAB_HOME, and what is left there by a test that was ended
//! - `runner`: all of it, test by test

mod place;
mod progress;
mod record;
mod runner;
mod schedule;
mod table;
mod tally;
mod watch;

#[cfg(test)]
mod script;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use place::Place;
use record::Record;
use runner::{Runner, Test, Times};
use schedule::Speed;
use tally::{Tally, Verdict, span};
use watch::{End, Limits, Signals};

/// How long a test may go on without getting on where the factor is 1, or less.
const HANG: Duration = Duration::from_secs(600);
/// How long a test that is stopped has to end by itself.
const GRACE: Duration = Duration::from_secs(20);

/// How it is called.
const USAGE: &str = "usage: run-tests SECONDS RESULT (all tests; see scripts/test) | run-tests clean";

/// Why no test has run.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// In words.
    #[error("{0}")]
    Other(String),
    /// The table.
    #[error("tests/expected.toml: {0}")]
    Table(#[from] toml::de::Error),
    /// Something of this machine's.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the machine said.
        source: std::io::Error,
    },
    /// A program that lists or builds tests.
    #[error("{0} does not end as it should: its output is above")]
    Program(String),
    /// A signal.
    #[error("interrupted")]
    Interrupted,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let clean = || Place::from_env().and_then(|place| place.clean()).map_err(Error::Other);
    let done = match arguments[..] {
        ["clean"] => clean().map(|()| true),
        [seconds, result] => match seconds.parse() {
            // scripts/test cleans at its end, unless that was killed.
            Ok(seconds) => all(Duration::from_secs(seconds), Path::new(result)).or_else(|error| {
                clean()?;
                Err(error)
            }),
            Err(_) => Err(Error::Other(USAGE.into())),
        },
        _ => Err(Error::Other(USAGE.into())),
    };
    match done {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(error) => {
            say(&format!("run-tests: {error}"));
            ExitCode::from(2)
        }
    }
}

/// A line on standard output. Nobody may be there to read it, which is no reason to leave anything running.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Runs all tests within `time`, and writes what became of them to `result`. True if nothing failed.
fn all(time: Duration, result: &Path) -> Result<bool, Error> {
    let end = Instant::now() + time;
    let io = |what| move |source| Error::Io { what, source };
    let signals = Signals::catch().map_err(io("cannot catch signals"))?;
    // Whoever started this counts what it says.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .map_err(|errno| io("cannot end with scripts/test")(errno.into()))?;
    let place = Place::from_env().map_err(Error::Other)?;
    let run = Watched { signals: &signals, end };
    let tests = tests(&run)?;
    let mut tally = Tally::default();
    let boot_s = match place.boot_s(end, &signals) {
        Ok(boot_s) => boot_s,
        Err(why) => {
            tally.add("a tiny node", &Verdict::Failed(why), None);
            schedule::BOOT_S
        }
    };
    let speed = Speed::of_boot(boot_s);
    say(&format!(
        "`lab up` of a tiny node: {boot_s:.1} s; tests are expected to take {:.2} times what tests/expected.toml says",
        speed.factor()
    ));
    let record_file = record::path();
    if let Some(file) = &record_file {
        say(&format!("what each takes here: {}", file.display()));
    }
    let record = Record::read(record_file);
    let times = Times { end, hang: HANG, grace: GRACE };
    let mut runner = Runner { tests, place: &place, record, speed, times, tally, say: &mut say };
    if !runner.run(&signals) {
        return Err(Error::Interrupted);
    }
    let tally = runner.tally;
    say("the longest tests:");
    tally.longest().iter().for_each(|line| say(line));
    std::fs::write(result, tally.result()).map_err(io("cannot write the result"))?;
    Ok(tally.is_good())
}

/// Programs that are run before tests.
struct Watched<'s> {
    signals: &'s Signals,
    end: Instant,
}

impl Watched<'_> {
    /// Runs a program to its end, which must be a good one. Lines that `keep` does not take are passed on.
    fn run(&self, mut command: Command, keep: &mut dyn FnMut(&str) -> bool) -> Result<(), Error> {
        let shown = command.get_program().to_string_lossy().into_owned();
        let limits =
            Limits { end: self.end, hang: self.end.saturating_duration_since(Instant::now()), grace: GRACE };
        let ran = watch::run(&mut command, limits, Some(self.signals), &mut |line| {
            if !keep(line) {
                say(line);
            }
        });
        match ran.map_err(|source| Error::Io { what: "cannot run a program", source })?.end {
            End::Exited(status) if status.success() => Ok(()),
            End::Interrupted => Err(Error::Interrupted),
            _ => Err(Error::Program(shown)),
        }
    }
}

/// Builds and lists all tests: those of the table in its order, then what it does not know.
fn tests(run: &Watched<'_>) -> Result<Vec<Test>, Error> {
    let started = Instant::now();
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // All of the workspace, as scripts/test has built it.
    build.args(["test", "--locked", "--release", "--workspace", "--test", "*", "--no-run"]);
    build.arg("--message-format=json-render-diagnostics").current_dir(env!("CARGO_MANIFEST_DIR"));
    let mut programs = Vec::new();
    run.run(build, &mut |line| {
        programs.extend(program(line));
        line.starts_with('{')
    })?;
    let mut found = Vec::new();
    for (file, program) in programs {
        let mut list = Command::new(&program);
        list.args(["--list", "--format", "terse"]);
        run.run(list, &mut |line| {
            let function = line.strip_suffix(": test");
            found.extend(
                function
                    .map(|function| (format!("{file}::{function}"), program.clone(), function.to_owned())),
            );
            true
        })?;
    }
    say(&format!("{} tests, built in {}", found.len(), span(started.elapsed().as_secs_f64())));
    let rows = table::rows()?;
    let place = |name: &str| rows.iter().position(|row| row.name == name);
    found.sort_by_key(|(name, _, _)| place(name).unwrap_or(rows.len()));
    let test = |(name, program, function): (String, PathBuf, String)| {
        let row = place(&name).and_then(|index| rows.get(index).cloned());
        Test { row: row.unwrap_or_else(|| table::Row::unknown(&name)), program, function }
    };
    Ok(found.into_iter().map(test).collect())
}

/// Name and path of a program of end-to-end tests, from a message of cargo's.
fn program(line: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let name = message["target"]["name"].as_str()?;
    let program = message["executable"].as_str()?;
    let is_test = message["target"]["kind"][0] == "test";
    let ours = message["manifest_path"] == concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    (message["reason"] == "compiler-artifact" && is_test && ours).then(|| (name.into(), program.into()))
}
