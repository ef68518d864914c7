//! The lab-net command: one lab's network.

use std::{io::Write, os::unix::net::UnixStream, path::PathBuf, process::ExitCode};

use clap::Parser;
use lab_net::{config::NetworkConfig, nat::Outside, network::Network};
use signal_hook::consts::{SIGINT, SIGTERM};

/// One lab's network: a switch for its nodes' cards, and a gateway to the world outside.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// JSON file that says what the network consists of.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lab-net: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let path = arguments.config.display();
    let text = std::fs::read(&arguments.config).map_err(|e| format!("cannot read {path}: {e}"))?;
    let config: NetworkConfig = serde_json::from_slice(&text).map_err(|e| format!("{path}: {e}"))?;
    let (stop, signal) = UnixStream::pair()?;
    for number in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(number, signal.try_clone()?)?;
    }
    let network = Network::open(config, &Outside::default(), &stop)?;
    // Whoever waits for this line may be gone already.
    let _ = writeln!(std::io::stdout(), "ready");
    Ok(network.run()?)
}
