//! The lab command.

use std::{io::Write, process::ExitCode};

use clap::{CommandFactory, Parser};
use lab::{
    cli::{BundleAction, Cli, Command, Output},
    commands::{self, Context, Error, carried::Place},
    say::say,
};

fn main() -> ExitCode {
    if let Some(status) = lab::host::internal(std::env::args_os()) {
        return status;
    }
    lab::child::keep_descriptors();
    let cli = Cli::parse();
    let json = cli.global.output == Output::Json;
    match run(cli) {
        Ok(status) => status,
        Err(error) => {
            match &error {
                Error::Labfile(diagnostics) if json => match serde_json::to_string_pretty(diagnostics) {
                    Ok(text) => drop(writeln!(std::io::stdout(), "{text}")),
                    Err(error) => say(format_args!("lab: {error}")),
                },
                // These have a form of their own, with the place first.
                Error::Labfile(diagnostics) => say(diagnostics),
                _ => say(format_args!("lab: {error}")),
            }
            ExitCode::from(error.status())
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Error> {
    let context = Context::new(&cli)?;
    // Asked here, where the terminal is, whatever becomes of standard output.
    if let Command::Destroy { nodes, yes: false, all_forks, .. } = &cli.command
        && !commands::destroy::confirmed(&context, nodes, *all_forks)?
    {
        return Ok(ExitCode::FAILURE);
    }
    let _stays_here = match commands::carried::carry(&context, &cli)? {
        Place::Ended(status) => return Ok(status),
        Place::Here(file) => file,
    };
    let context = &context;
    match cli.command {
        Command::Init { from, list } => commands::init::init(context, &from, list),
        Command::Validate => commands::init::validate(context),
        Command::Plan => commands::plan::run(context),
        Command::Up { fresh, locked, offline } => {
            commands::up::run(context, fresh, locked, offline.as_deref())
        }
        Command::Status => commands::status::run(context),
        Command::Ls { size } => commands::ls::run(context, size),
        Command::Ssh { node, command } => commands::ssh::ssh(context, node.as_deref(), &command),
        Command::Exec { node, command, all_forks: true } => commands::fork::exec(context, &node, &command),
        Command::Exec { node, command, all_forks: false } => commands::ssh::exec(context, &node, &command),
        Command::Fork { snapshot, count } => commands::fork::run(context, &snapshot, count),
        Command::Cp { from, to } => commands::cp::run(context, &from, &to),
        Command::Logs { node, vmm, follow } => commands::logs::run(context, &node, vmm, follow),
        Command::Console { node } => commands::console::run(context, node.as_deref()),
        Command::Provision { nodes, step } => commands::provision::run(context, &nodes, step.as_deref()),
        Command::Check { name, junit } => commands::check::run(context, name.as_deref(), junit),
        Command::Halt { nodes, force } => commands::halt::halt(context, &nodes, force),
        Command::Restart { nodes, force } => commands::halt::restart(context, &nodes, force),
        Command::Destroy { all_forks: true, .. } => commands::destroy::all_forks(context),
        Command::Destroy { nodes, forget, .. } => commands::destroy::run(context, &nodes, forget),
        Command::Forward { action } => commands::forward::run(context, action),
        Command::Layer { action } => commands::layer::run(context, action),
        Command::Share { node, key } => commands::share::run(context, node.as_deref(), &key),
        Command::Kubeconfig { print } => commands::kubeconfig::run(context, print),
        Command::SshConfig => commands::ssh::config(context),
        Command::Suspend => commands::snapshot::suspend(context),
        Command::Resume => commands::snapshot::resume(context),
        Command::Snapshot { action } => commands::snapshot::run(context, action),
        Command::Bundle { action: BundleAction::Build { to, .. } } => {
            commands::bundle::build(context, to.as_deref())
        }
        Command::Image { action } => commands::image::run(context, action),
        Command::Host { action } => commands::host::run(context, cli.global.host.as_deref(), action),
        Command::Doctor => commands::host::doctor(context),
        Command::Schema => commands::init::schema(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lab", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Proxy { lab, node } => commands::ssh::proxy(context, &lab, &node),
    }
}
