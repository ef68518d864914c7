//! The verbs of the command line, one a file, and what they share.

pub mod bundle;
pub mod carried;
pub mod check;
pub mod console;
pub mod cp;
pub mod destroy;
pub mod fork;
pub mod forward;
pub mod halt;
pub mod host;
pub mod image;
pub mod init;
pub mod kubeconfig;
pub mod layer;
pub mod logs;
pub mod ls;
pub mod plan;
pub mod provision;
pub mod push;
pub mod share;
pub mod snapshot;
pub mod ssh;
pub mod status;
pub mod up;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use crate::{
    actions, capacity, channel,
    cli::{BundleAction, Cli, Command, Output},
    control, fork as forks, json_file,
    lab::Lab,
    labfile,
    labfile::topology::{Stack, Topology},
    lockfile, machine,
    paths::Paths,
    progress::{Progress, Task},
    snapshot::pack,
    source,
    state::LabState,
};

/// Exit status for a wrong labfile or command line.
pub const USAGE: u8 = 2;

/// Why a command failed. What is printed is the message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No labfile.
    #[error(
        "there is no lab.toml here or in a parent folder: `lab init` writes one, `-f FILE` names another"
    )]
    NoLabfile,
    /// The labfile is wrong.
    #[error("{0}")]
    Labfile(#[from] labfile::Diagnostics),
    /// Something of the lab's.
    #[error(transparent)]
    Lab(#[from] crate::lab::Error),
    /// The lab doesn't fit.
    #[error(transparent)]
    Capacity(#[from] capacity::Error),
    /// An action.
    #[error(transparent)]
    Action(#[from] actions::Error),
    /// A node can't be entered.
    #[error(transparent)]
    Channel(#[from] channel::Error),
    /// A process of lab's did not answer.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A process of lab's did not end.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// A folder of lab's.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
    /// A source of a stack.
    #[error(transparent)]
    Source(#[from] crate::source::Error),
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] crate::layer::Error),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
    /// An exported snapshot.
    #[error(transparent)]
    Pack(#[from] crate::snapshot::pack::Error),
    /// The lab is not what was recorded.
    #[error(transparent)]
    Lockfile(#[from] crate::lockfile::Error),
    /// The user's kubeconfig.
    #[error(transparent)]
    Kubeconfig(#[from] crate::kubeconfig::Error),
    /// An image.
    #[error(transparent)]
    Image(#[from] lab_images::store::Error),
    /// The host.
    #[error(transparent)]
    Host(#[from] crate::host::Error),
    /// Something that only this command knows.
    #[error("{0}")]
    Other(String),
    /// The host refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried, and on what.
        action: String,
        /// What the host said.
        source: std::io::Error,
    },
}

impl Error {
    /// The command's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::NoLabfile | Self::Labfile(_) => USAGE,
            _ => 1,
        }
    }
}

/// What every command is given.
pub struct Context {
    /// The user's folders.
    pub paths: Paths,
    /// Whether results are printed as JSON.
    pub json: bool,
    /// Where progress is told.
    pub progress: Progress,
    file: Option<PathBuf>,
    /// The number of the lab's fork that is meant, if it is not the lab itself.
    fork: Option<u32>,
}

/// The labfile that a command line names.
fn labfile(cli: &Cli) -> Option<&PathBuf> {
    match &cli.command {
        Command::Bundle { action: BundleAction::Build { labfile: Some(path), .. } } => Some(path),
        _ => cli.global.file.as_ref(),
    }
}

impl Context {
    /// The context that a command line asks for.
    pub fn new(cli: &Cli) -> Result<Self, Error> {
        Ok(Self {
            paths: Paths::from_env()?,
            json: cli.global.output == Output::Json,
            progress: Progress::new(cli.global.quiet),
            file: labfile(cli).cloned(),
            fork: cli.global.fork,
        })
    }

    /// Path of the labfile: `-f`, or `lab.toml` here or in a parent folder. What `-f` names may be gone by now.
    pub fn labfile(&self) -> Result<PathBuf, Error> {
        let absolute = |path: &Path| {
            path.canonicalize()
                .or_else(|_| std::path::absolute(path))
                .map_err(|source| Error::Io { action: format!("read {}", path.display()), source })
        };
        match &self.file {
            Some(path) => absolute(path),
            None => {
                let here = std::env::current_dir()
                    .map_err(|source| Error::Io { action: "find the current folder".into(), source })?;
                let found = here.ancestors().map(|dir| dir.join("lab.toml")).find(|path| path.is_file());
                absolute(&found.ok_or(Error::NoLabfile)?)
            }
        }
    }

    /// The lab as the labfile describes it.
    pub fn wanted(&self) -> Result<Lab, Error> {
        self.wanted_for_up(false, None)
    }

    /// The same for `up`, with its `--locked` and with what `--offline` names, which is taken in first.
    pub fn wanted_for_up(&self, locked: bool, offline: Option<&Path>) -> Result<Lab, Error> {
        let mut topology = self.topology(&self.labfile()?)?;
        // Where the command was carried here from has done it, since it sees the whole machine.
        if let Some(bundle) = offline.filter(|_| !crate::host::is_slow()) {
            let task = self.progress.begin(&topology.name, "take in the bundle");
            let taken = pack::bundle::take_in(&self.paths, bundle, &task);
            end(task, taken)?;
        }
        let locked = if locked { lockfile::sources(&topology.labfile) } else { BTreeMap::new() };
        source::choose(&mut topology, &self.paths, offline.is_some(), &locked)?;
        let mut lab = Lab::new(&self.paths, topology, self.progress.clone())?;
        lab.fork = self.fork;
        lab.offline = offline.is_some();
        Ok(lab)
    }

    fn topology(&self, path: &Path) -> Result<Topology, Error> {
        let mut topology = labfile::load(path)?;
        if let Some(number) = self.fork {
            forks::adapt(&mut topology, number);
        }
        Ok(topology)
    }

    /// The lab as it was last brought up, whatever its labfile says by now.
    pub fn existing(&self) -> Result<Lab, Error> {
        let path = self.labfile()?;
        let states = crate::state::labs(&self.paths)
            .into_iter()
            .filter_map(|name| LabState::read(&self.paths.lab(&name)).ok().flatten());
        let mut found: Vec<_> =
            states.filter(|state| state.topology.labfile == path && state.fork == self.fork).collect();
        // A labfile whose lab was given another name has two.
        let wanted = || self.topology(&path).map(|topology| topology.name);
        if found.len() > 1
            && let Ok(wanted) = wanted()
        {
            found.retain(|state| state.topology.name == wanted);
        }
        match found.pop() {
            Some(state) => Ok(Lab::new(&self.paths, state.topology, self.progress.clone())?),
            None => {
                let name = wanted()?;
                Err(match LabState::read(&self.paths.lab(&name)).ok().flatten() {
                    // As `up` says: the folder was renamed, say.
                    Some(state) if state.topology.labfile != path => {
                        crate::lab::Error::NameTaken { name, other: state.topology.labfile }
                    }
                    _ => crate::lab::Error::NotThere(name),
                }
                .into())
            }
        }
    }

    /// Prints a result: as JSON, or as `text` makes it.
    pub fn print<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Error> {
        let text = if self.json {
            let json = serde_json::to_string_pretty(value);
            json.map_err(|e| Error::Io { action: "print the result".into(), source: e.into() })?
        } else {
            text(value)
        };
        write_out(text.trim_end())
    }
}

/// Writes lines to standard output. A reader who has gone is no error of ours.
pub fn write_out(text: &str) -> Result<(), Error> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Io { action: "write to standard output".into(), source })
        }
        _ => Ok(()),
    }
}

/// A table with aligned columns.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(head.get(column).map(|h| h.len())).max().unwrap_or(0)
    };
    let line = |cells: &[String]| {
        let padded = cells.iter().enumerate().map(|(i, cell)| format!("{cell:<0$}", width(i)));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    let head: Vec<String> = head.iter().map(|cell| cell.to_string()).collect();
    std::iter::once(line(&head)).chain(rows.iter().map(|row| line(row))).collect()
}

/// Where a lab's stacks come from, on a line: `stacks: docker from debian, kubernetes 1.36 from upstream`; nothing if it has
/// none. `version` is that of a stack's files of a bundle, as far as it is known.
pub fn stacks_line(stacks: &[Stack], version: impl Fn(&Stack) -> Option<String>) -> String {
    let one = |stack: &Stack| {
        let version = stack_version(stack).or_else(|| version(stack)).map(|version| format!(" {version}"));
        format!("{}{} from {}", stack.name, version.unwrap_or_default(), stack.source)
    };
    match stacks {
        [] => String::new(),
        some => format!("stacks: {}\n", some.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

/// The version that a stack's options ask for.
pub fn stack_version(stack: &Stack) -> Option<String> {
    stack.options.get(actions::VERSION_OPTION).filter(|version| !version.is_empty()).cloned()
}

/// A number of bytes in MiB, for a table.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// How long ago a moment was.
pub fn ago(then_s: u64) -> String {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    match now.saturating_sub(then_s) {
        s @ 0..120 => format!("{s} s ago"),
        s @ 120..7200 => format!("{} min ago", s / 60),
        s @ 7200..172_800 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86400),
    }
}

/// Tells how something ended.
pub fn end<T, E: Into<Error>>(task: Task, outcome: Result<T, E>) -> Result<T, Error> {
    if outcome.is_ok() {
        task.done();
    } else {
        task.failed();
    }
    outcome.map_err(Into::into)
}

/// Exit status of something that went well or did not.
pub fn exit(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".into(), "running".into()], vec!["longer".into(), String::new()]];
        assert_eq!(table(&["NODE", "STATE"], &rows), "NODE    STATE\na       running\nlonger\n");
    }
}
