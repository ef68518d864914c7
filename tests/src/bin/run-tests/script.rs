//! scripts/test itself, with stand-ins for all that it starts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long anything may take here.
const LIMIT: Duration = Duration::from_secs(60);

/// A repository with scripts/test, whose programs are stand-ins.
struct Repository {
    dir: tempfile::TempDir,
}

impl Repository {
    /// `run_tests` is what its runner does; `$2` is the file for the result.
    fn new(run_tests: &str) -> Self {
        let repository = Self { dir: tempfile::tempdir().unwrap() };
        for folder in ["scripts", "target/release", "bin", "labfiles/msa/app", "tmp"] {
            fs::create_dir_all(repository.path(folder)).unwrap();
        }
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("scripts/test");
        fs::copy(ours, repository.path("scripts/test")).unwrap();
        let calls = repository.path("calls").display().to_string();
        repository.script("scripts/install-dependencies", "");
        repository.script(
            "bin/cargo",
            "case $1 in test) echo 'test result: ok. 10 passed; 0 failed; 1 ignored' ;; esac",
        );
        repository.script("bin/python3", "");
        repository.script("target/release/lab", "case $* in *status*) echo '\"emulated\"' ;; esac");
        let clean = "[ \"$1\" = clean ] && exit";
        repository
            .script("target/release/run-tests", &format!("echo \"$1\" >> {calls}\n{clean}\n{run_tests}"));
        repository
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn script(&self, name: &str, text: &str) {
        // Written by another process: a child of another test of this one might have it open when it is run.
        let mut write = Command::new("sh");
        write.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$0\" && chmod 755 \"$0\""]);
        assert!(write.arg(self.path(name)).arg(text).status().unwrap().success());
    }

    fn start(&self) -> Child {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("bash");
        command.arg(self.path("scripts/test")).env("PATH", path).env("TMPDIR", self.path("tmp"));
        command.env("LAB_TEST_HOME", self.path("home"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// Its status, and the last lines that it printed.
    fn run(&self) -> (Option<i32>, Vec<String>) {
        let output = self.start().wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let mut lines: Vec<_> = said.lines().rev().take(4).map(str::to_owned).collect();
        lines.reverse();
        (output.status.code(), lines)
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

/// Waits for a file with something in it.
fn content(path: &Path) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().into(),
            other => assert!(Instant::now() < end, "{}: {other:?}", path.display()),
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn all_is_added_up_and_the_last_line_counts() {
    // Of its own: dependencies, format, lints, build, the shop, two images and the host; 2 times 10 by cargo.
    let good = Repository::new("echo '5 0 2' > \"$2\"");
    let (status, lines) = good.run();
    assert_eq!((status, lines.last().unwrap().as_str()), (Some(0), "33 passed, 0 failed, 4 skipped"));
    let calls = good.calls();
    let seconds: u64 = calls[0].parse().unwrap();
    assert!((1..=4560).contains(&seconds) && calls[1..] == ["clean"], "{calls:?}");

    let bad = Repository::new("printf '4 2 2\\na: why\\nb c\\n' > \"$2\"; exit 1");
    let (status, lines) = bad.run();
    assert_eq!(status, Some(1));
    assert_eq!(lines[1..], ["FAILED: a: why", "FAILED: b c", "32 passed, 2 failed, 4 skipped"]);

    let crashed = Repository::new("kill -SEGV $$");
    let (status, lines) = crashed.run();
    assert_eq!((status, lines.last().unwrap().as_str()), (Some(1), "28 passed, 1 failed, 2 skipped"));
    assert_eq!(crashed.calls().last().unwrap(), "clean");
}

#[test]
fn on_a_signal_nothing_is_left() {
    let begun = "echo $$ > begun; trap 'echo ended > ended; exit 1' TERM; while :; do sleep 0.1; done";
    // In the end-to-end tests, and in what scripts/test starts by itself.
    for in_cargo in [false, true] {
        let repository = Repository::new(begun);
        if in_cargo {
            repository.script("bin/cargo", begun);
        }
        let mut script = repository.start();
        let pid = content(&repository.path("begun"));
        let mut kill = Command::new("kill");
        assert!(kill.args(["-TERM", &script.id().to_string()]).status().unwrap().success());
        assert_eq!(script.wait().unwrap().code(), Some(130));
        assert_eq!(content(&repository.path("ended")), "ended", "it could end by itself");
        assert!(!Path::new("/proc").join(&pid).exists(), "{pid} runs on");
        let cleaned = repository.calls().last().is_some_and(|call| call == "clean");
        assert_eq!(cleaned, !in_cargo, "there is something to be cleaned once there is a LAB_HOME");
    }
}
