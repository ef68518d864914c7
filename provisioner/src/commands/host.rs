//! `lab host` and `lab doctor`: the machine that labs run on.

use std::{ffi::OsString, process::ExitCode};

use serde::Serialize;

use super::{Context, Error, exit};
use crate::{
    cli::HostAction,
    host::{
        self, Choice, doctor,
        emulated::{
            carry::{self, Carried, Wants},
            files::Files,
            machine::{self, Wanted},
        },
    },
};

/// The host as `lab host status` tells it.
#[derive(Debug, Serialize)]
struct HostStatus {
    /// `local` or `emulated`.
    host: &'static str,
    /// Why not `local`.
    reason: Option<String>,
    /// Whether the emulated host runs.
    running: bool,
    cpus: Option<usize>,
    memory_mib: Option<u64>,
}

/// Works with the host.
pub fn run(context: &Context, forced: Option<&str>, action: HostAction) -> Result<ExitCode, Error> {
    let files = Files::new(&context.paths);
    match action {
        HostAction::Status => return status(context, forced, &files),
        HostAction::Start { avx2 } => {
            let task = context.progress.begin("host", "start the emulated host");
            files.create().map_err(host::Error::from)?;
            let say = &mut |line: &str| task.detail(line);
            let lock = machine::lock_start(&files, false, say).map_err(host::Error::from)?;
            let wanted = Wanted { by_hand: true, avx2 };
            machine::ensure(&files, &context.paths, wanted, say).map_err(host::Error::from)?;
            drop(lock);
            task.done();
        }
        HostAction::Stop { force } => {
            files.create().map_err(host::Error::from)?;
            let task = context.progress.begin("host", "stop the emulated host");
            let lock = machine::lock_start(&files, false, &mut |line| task.detail(line));
            let _lock = lock.map_err(host::Error::from)?;
            let was_there = machine::stop(&files, force).map_err(host::Error::from)?;
            drop(task);
            context.progress.say(if was_there { "the emulated host has ended" } else { "it is not running" });
        }
        HostAction::Exec { command } => {
            let command: Vec<OsString> = command.into_iter().map(Into::into).collect();
            return match carry::run(&context.paths, command, Wants::default(), &context.progress)
                .map_err(host::Error::from)?
            {
                Carried::Ended(status) => Ok(ExitCode::from(status)),
                Carried::Here(_) => {
                    let sentence = "the emulated host is not running: `lab host start` starts it";
                    Err(Error::Other(sentence.into()))
                }
            };
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn status(context: &Context, forced: Option<&str>, files: &Files) -> Result<ExitCode, Error> {
    let (host, reason) = match host::choose(forced)? {
        Choice::Local => ("local", None),
        Choice::Emulated { reason } => ("emulated", reason),
    };
    let state = match machine::status(files) {
        machine::Status::Running(state) => Some(state),
        _ => None,
    };
    let status = HostStatus {
        host,
        reason,
        running: state.is_some(),
        cpus: state.as_ref().map(|state| state.cpus),
        memory_mib: state.as_ref().map(|state| state.memory_mib),
    };
    context.print(&status, |status| {
        let mut text = format!("labs run on the {} host", status.host);
        if let Some(reason) = &status.reason {
            text += &format!(": {reason}");
        }
        if let (Some(cpus), Some(memory_mib)) = (status.cpus, status.memory_mib) {
            text += &format!("\nthe emulated host is running: {cpus} cpus, {memory_mib} MiB");
        } else if status.host == "emulated" {
            text += "\nthe emulated host is not running: it starts with the first lab";
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Tells what this machine can do.
pub fn doctor(context: &Context) -> Result<ExitCode, Error> {
    let report = doctor::run(&context.paths);
    context.print(&report, ToString::to_string)?;
    Ok(exit(report.good()))
}
