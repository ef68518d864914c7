//! The lab-net command: one lab's network.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use clap::Parser;
use lab_net::{config::NetworkConfig, log, nat::Outside, network::Network};
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
    keep_buffers_apart();
    std::panic::set_hook(Box::new(|panic| {
        // A flow that the TCP stack could not cope with ends with this, and a node can make as many as it likes.
        static SAID: AtomicU32 = AtomicU32::new(0);
        if SAID.fetch_add(1, Ordering::Relaxed) < 10 {
            log::warn(panic);
        }
    }));
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log::warn(e);
            ExitCode::FAILURE
        }
    }
}

/// Let the allocator give each buffer of a connection pages of its own, however many came and went before. They come
/// untouched from the kernel and go back to it, so that a connection costs the memory that it uses; memory taken from
/// the heap would have to be cleared first, all of it. Packets that wait for a card are smaller.
fn keep_buffers_apart() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) with a documented parameter; no other thread is there yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 80 << 10);
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
