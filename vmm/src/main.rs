//! The lab-vmm command: see `lab-vmm --help`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use lab_vmm::{cli::Cli, config::VmConfig, ending::End, lock::Lock, machine::Machine, restart, say::say};
use rustix::fs::Mode;

/// A reset so soon after the start is one that a broken guest repeats for ever.
const QUICK: Duration = Duration::from_secs(2);
/// Resets of that kind, in a row, after which the machine is given up.
const QUICK_RESETS_MAX: u32 = 10;

fn main() -> ExitCode {
    let started = Instant::now();
    // Sockets, logs and locks are for the user alone.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let cli = Cli::parse();
    match run(&cli, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli, started: Instant) -> Result<(), Box<dyn std::error::Error>> {
    let config = cli.machine()?;
    let lock = match &config.lock {
        Some(path) => Some(Lock::take(path, cli.lock_fd)?),
        None => None,
    };
    let name = config.name.clone();
    let end = Machine::new(config.clone(), started)?.run()?;
    match end {
        End::PowerOff | End::Killed | End::Failed(_) => return Ok(()),
        End::Reset => say(format_args!("{name}: the guest resets")),
        End::TripleFault => {
            say(format_args!("{name}: the guest's CPU shut down (triple fault); the guest starts anew"))
        }
    }
    let quick = if started.elapsed() < QUICK { cli.quick_resets + 1 } else { 0 };
    if quick >= QUICK_RESETS_MAX {
        let limit = QUICK.as_secs();
        return Err(format!(
            "{name}: the guest was reset {quick} times in a row within {limit} s of its start: it cannot boot; its \
             console log may say why"
        )
        .into());
    }
    let config = VmConfig { restore: None, prefetch: false, paused: false, ..config };
    let error = restart::start_anew(&config, lock.as_ref(), quick);
    Err(format!("{name}: cannot start anew after the reset: {error}").into())
}
