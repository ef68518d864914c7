//! Socket device (virtio 1.3 §5.10): stream connections between host and guest. On the host's side they are UNIX
//! sockets: whoever connects to the device's socket and says `CONNECT port\n` reaches that port of the guest, and is
//! told `OK hostport\n` first; who connects from the guest to port P reaches the socket `{socket}_P`.
//!
//! `client` is who connects on the host; `host` has those sockets, `muxer` sorts packets to connections, `connection` is one of them, `packet` their header.

mod client;
mod connection;
mod host;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::{fs, path::PathBuf};

pub use client::connect;

use super::{
    Activation, Error, VirtioDevice, Working,
    queue::{COMMON_FEATURES, Given, read_config},
    worker::Worker,
};
use crate::config::VsockConfig;
use host::Host;
use muxer::Muxer;

const NAME: &str = "vsock";
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// The socket device.
pub struct Vsock {
    cid: u32,
    socket: PathBuf,
    /// What the handler needs, while no thread has it.
    host: Option<Host>,
    worker: Option<Worker<Muxer>>,
}

impl Vsock {
    /// Makes the device and its socket. Who connects before the guest is ready waits. A socket that a dead process
    /// left behind is replaced; the file is removed when the device is dropped.
    pub fn new(config: &VsockConfig) -> Result<Self, Error> {
        if config.cid < 3 || config.cid == u32::MAX {
            return Err(Error::Device(format!(
                "vsock: {} is not a context id of a guest; they start at 3",
                config.cid
            )));
        }
        let host = Host::new(config.cid, &config.socket).map_err(|source| Error::Io {
            device: format!("vsock {}", config.socket.display()),
            action: "listen there",
            source,
        })?;
        Ok(Self { cid: config.cid, socket: config.socket.clone(), host: Some(host), worker: None })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        // It may be gone with its folder already.
        let _ = fs::remove_file(&self.socket);
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        19
    }

    fn name(&self) -> &str {
        NAME
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Without a feature of its own, a device has streams only (virtio 1.3 §5.10.3).
        COMMON_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.reset();
        let given = Given::new(NAME, activation)?;
        let interrupt = given.interrupt.clone();
        let host = self
            .host
            .take()
            .ok_or_else(|| Error::Device(format!("{NAME}: lost when its thread did not start")))?;
        self.worker = Some(Worker::spawn(NAME, interrupt, Muxer::new(given, host))?);
        Ok(())
    }

    fn worker(&mut self) -> Option<&mut dyn Working> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Working)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // All connections end here.
            self.host = worker.stop().map(|muxer| muxer.host);
        }
    }
}
