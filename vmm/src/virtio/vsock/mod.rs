//! Socket device (virtio 1.3 §5.10): stream connections between host and guest. On the host's side they are UNIX
//! sockets: whoever connects to the device's socket and says `CONNECT port\n` reaches that port of the guest, and is
//! told `OK hostport\n` first; who connects from the guest to port P reaches the socket `{socket}_P`.
//!
//! `muxer` sorts packets to connections, `connection` is one of them, `packet` their header, `notify` the port where
//! the device listens itself.

mod connection;
mod muxer;
mod notify;
mod packet;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{Mode, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use super::{
    Activation, Error, VirtioDevice,
    queue::{COMMON_FEATURES, Given, read_config},
    worker::Worker,
};
use crate::config::VsockConfig;
use muxer::{Host, Muxer};
pub use notify::Notified;

const NAME: &str = "vsock";
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// Connections that wait while the guest is not ready.
const BACKLOG: i32 = 128;

/// The socket device.
pub struct Vsock {
    cid: u32,
    socket: PathBuf,
    notified: Arc<Notified>,
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
        let listener = open_socket(&config.socket).map_err(|source| Error::Io {
            device: format!("vsock {}", config.socket.display()),
            action: "listen there",
            source,
        })?;
        let notified = Arc::new(Notified::default());
        let host = Host {
            cid: config.cid.into(),
            socket: config.socket.clone(),
            listener,
            notify_port: config.notify_port,
            notified: Arc::clone(&notified),
        };
        Ok(Self { cid: config.cid, socket: config.socket.clone(), notified, host: Some(host), worker: None })
    }

    /// What the guest's systemd has said on `notify_port` since the guest started.
    pub fn notified(&self) -> Arc<Notified> {
        Arc::clone(&self.notified)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        // It may be gone with its folder already.
        let _ = fs::remove_file(&self.socket);
    }
}

/// Listens at `path`, for this user only.
fn open_socket(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "another file is in the way; remove it"));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            Err(e) => return Err(e),
            Ok(_) => {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another machine listens there; stop it"));
            }
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let address = SocketAddrUnix::new(path)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path is longer than 107 bytes"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode that the socket has when it is bound, so nobody gets in before.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
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
        self.notified.clear();
        self.worker = Some(Worker::spawn(NAME, interrupt, Muxer::new(given, host))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // All connections end here.
            self.host = worker.stop().map(|muxer| muxer.host);
        }
    }
}
