//! Where tests run: the `lab` program, its LAB_HOME, and the folder in which tests make theirs. What a test that was
//! ended has left there is removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde::Deserialize;

use crate::watch::{self, End, Limits, Signals};

/// How long an emulated host may take to start or to stop.
const HOST_LIMIT: Duration = Duration::from_secs(200);
/// How long anything else may take that only ends or removes something.
const LIMIT: Duration = Duration::from_secs(40);
/// How long a tiny node may take.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long what is stopped has to end by itself.
const GRACE: Duration = Duration::from_secs(5);

/// The node whose boot tells how slow the machine is.
const TINY: &str = "name = \"speed\"\nimage = \"tiny\"\n[node.a]\nmemory = \"128MiB\"\ndisk = \"256MiB\"\n";

/// Where tests run.
pub struct Place {
    /// The `lab` program.
    pub lab: PathBuf,
    /// Its LAB_HOME.
    pub home: PathBuf,
    /// The folder in which tests make theirs, for nothing else.
    pub scratch: PathBuf,
}

/// What `lab ls` tells.
#[derive(Deserialize)]
struct Listed {
    name: String,
    labfile: String,
}

impl Place {
    /// What scripts/test has set up.
    pub fn from_env() -> Result<Self, String> {
        let var = |name: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
            value.ok_or(format!("{name} is not set: run this by scripts/test"))
        };
        let lab = std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("lab");
        let scratch = var("LAB_TEST_SCRATCH")?;
        // As `lab` tells where a labfile is.
        let scratch = scratch.canonicalize().map_err(|error| format!("{}: {error}", scratch.display()))?;
        Ok(Self { lab, home: var("LAB_HOME")?, scratch })
    }

    /// Starts the emulated host, where there is one: by hand, so that it stays from test to test.
    pub fn prepare(&self, end: Instant, signals: &Signals) -> Result<(), String> {
        if !self.home.join("host").exists() {
            return Ok(());
        }
        let limit = HOST_LIMIT.min(end.saturating_duration_since(Instant::now()));
        self.run(&self.home, &["-q", "host", "start"], limit, Some(signals)).map(drop)
    }

    /// How long `lab up` of a tiny node takes, in seconds: the second time, when all that it needs has been read once.
    pub fn boot_s(&self, end: Instant, signals: &Signals) -> Result<f64, String> {
        let file = self.scratch.join("speed.toml");
        fs::write(&file, TINY).map_err(|error| format!("cannot write {}: {error}", file.display()))?;
        let file = file.to_string_lossy();
        let mut took = 0.0;
        for _ in 0..2 {
            let started = Instant::now();
            let limit = BOOT_LIMIT.min(end.saturating_duration_since(started));
            let up = self.run(&self.home, &["-q", "-f", &file, "up"], limit, Some(signals));
            took = started.elapsed().as_secs_f64();
            self.run(&self.home, &["-q", "-f", &file, "destroy", "--yes", "--forget"], LIMIT, Some(signals))?;
            up?;
        }
        Ok(took)
    }

    /// Ends and removes all that was left by a test: other homes' emulated hosts and labs, then this one's, and what is
    /// in the folder of tests. Says what can't be ended.
    pub fn clean(&self) -> Result<(), String> {
        let mut left = Vec::new();
        let others = fs::read_dir(&self.scratch).into_iter().flatten().flatten().map(|entry| entry.path());
        for home in others.chain([self.home.clone()]) {
            if let Err(why) = self.clean_home(&home) {
                left.push(why);
            }
        }
        if let Err(error) = clear(&self.scratch) {
            left.push(format!("cannot remove what is in {}: {error}", self.scratch.display()));
        }
        if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
    }

    /// Ends what runs in a home, and removes the labs of tests.
    fn clean_home(&self, home: &Path) -> Result<(), String> {
        if home.join("host").exists() {
            self.run(home, &["-q", "host", "stop", "--force"], HOST_LIMIT, None)?;
            return self.remove_labs(home);
        }
        // Forks first: they have the same labfile, and may be left alone.
        for what in ["--all-forks", "--forget"] {
            for lab in self.labs(home)?.iter().filter(|lab| self.is_of_a_test(lab)) {
                self.run(home, &["-q", "-f", &lab.labfile, "destroy", "--yes", what], LIMIT, None)?;
            }
        }
        let left = self.labs(home)?.into_iter().filter(|lab| self.is_of_a_test(lab));
        let left: Vec<_> = left.map(|lab| lab.name).collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("labs are left in {}: {}", home.display(), left.join(", ")))
        }
    }

    /// Removes all labs of tests where none runs, also what has no name that a command would know.
    fn remove_labs(&self, home: &Path) -> Result<(), String> {
        let labs = home.join("labs");
        let io = |error| format!("cannot remove the labs in {}: {error}", labs.display());
        let of_others = self.labs(home)?.into_iter().filter(|lab| !self.is_of_a_test(lab));
        let of_others: Vec<_> = of_others.map(|lab| lab.name).collect();
        for entry in fs::read_dir(&labs).into_iter().flatten().flatten() {
            if of_others.iter().any(|name| entry.file_name() == **name) {
                continue;
            }
            let kept = home.join("kept").join(entry.file_name());
            for folder in [entry.path(), kept].into_iter().filter(|folder| folder.is_dir()) {
                fs::remove_dir_all(folder).map_err(io)?;
            }
        }
        Ok(())
    }

    /// Tests have their labfiles in the folder that is theirs.
    fn is_of_a_test(&self, lab: &Listed) -> bool {
        Path::new(&lab.labfile).starts_with(&self.scratch)
    }

    /// A home's labs.
    fn labs(&self, home: &Path) -> Result<Vec<Listed>, String> {
        if !home.join("labs").exists() {
            return Ok(Vec::new());
        }
        let listed = self.run(home, &["-q", "ls", "-o", "json"], LIMIT, None)?;
        serde_json::from_str(&listed).map_err(|error| format!("`lab ls` says {listed:?}: {error}"))
    }

    /// Runs `lab` in a home; all that it printed.
    fn run(
        &self,
        home: &Path,
        arguments: &[&str],
        limit: Duration,
        signals: Option<&Signals>,
    ) -> Result<String, String> {
        let mut command = Command::new(&self.lab);
        command.args(arguments).env("LAB_HOME", home);
        let limits = Limits { end: Instant::now() + limit, hang: limit, grace: GRACE };
        let mut said = String::new();
        let ran = watch::run(&mut command, limits, signals, &mut |line| {
            said += line;
            said += "\n";
        });
        let shown = format!("lab {}", arguments.join(" "));
        match ran.map_err(|error| format!("{shown}: {error}"))?.end {
            End::Exited(status) if status.success() => Ok(said),
            End::Exited(status) => Err(format!("{shown}: {status}: {}", said.trim())),
            End::Interrupted => Err(format!("{shown}: interrupted")),
            End::Late | End::Hung => Err(format!("{shown}: no end after {} s", limit.as_secs())),
        }
    }
}

/// Removes what is in a folder, and what is mounted there.
fn clear(folder: &Path) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let at = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for mount in at.filter(|at| at.starts_with(folder) && *at != folder) {
        rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH)?;
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
