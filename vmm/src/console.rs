//! The console hub: output of hvc0 and of the serial port goes to the log, to whoever is connected to the console
//! socket, and to this process' terminal; what they type goes to hvc0.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pipe::{PipeFlags, pipe_with},
};

use crate::{config::ConsoleConfig, say::say, socket, terminal::Terminal};

/// Size at which the log starts over, in bytes.
const LOG_MAX: u64 = 8 << 20;
/// Most connections to the console socket.
const CLIENTS_MAX: usize = 8;
/// How long a client may keep the guest's output waiting before it is cut off.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log cannot be written.
    #[error("cannot write the console log {path}: {source}")]
    Log {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Nobody can connect.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// The terminal cannot be used.
    #[error("cannot set up the console on this terminal: {0}")]
    Terminal(io::Error),
    /// No pipe.
    #[error("cannot make the console's input pipe: {0}")]
    Pipe(io::Error),
}

/// A file that starts over at a size, with one predecessor.
struct Log {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { path: path.into(), file, length })
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.length.saturating_add(data.len() as u64) > LOG_MAX && self.length > 0 {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
            *self = Self::open(&self.path)?;
        }
        self.file.write_all(data)?;
        self.length += data.len() as u64;
        Ok(())
    }
}

/// Where output goes.
#[derive(Default)]
struct Outputs {
    log: Option<Log>,
    /// A full disk is told once, not for every line.
    log_failed: bool,
    clients: Vec<UnixStream>,
    terminal: bool,
}

impl Outputs {
    fn write(&mut self, data: &[u8]) {
        if let Some(log) = &mut self.log {
            let result = log.write(data);
            if let Err(error) = &result
                && !self.log_failed
            {
                say(format_args!("console output is lost: cannot write {}: {error}", log.path.display()));
            }
            self.log_failed = result.is_err();
        }
        self.clients.retain_mut(|client| {
            let sent = send(client, data).is_ok();
            if !sent {
                // So that the main loop, which reads from the same connection, lets it go too.
                let _ = client.shutdown(Shutdown::Both);
            }
            sent
        });
        if self.terminal {
            let mut out = io::stdout().lock();
            // A terminal that is gone takes no output; the machine goes on.
            let _ = out.write_all(data).and_then(|()| out.flush());
        }
    }
}

/// Write all of `data` to a client that does not block, waiting a little for it.
fn send(client: &mut UnixStream, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match client.write(data) {
            Ok(written) => data = data.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let limit = Timespec { tv_sec: CLIENT_PATIENCE.as_secs() as i64, tv_nsec: 0 };
                if poll(&mut [PollFd::new(client, PollFlags::OUT)], Some(&limit))? == 0 {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A way into the hub for a device.
pub struct Output(Arc<Mutex<Outputs>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock(outputs: &Mutex<Outputs>) -> MutexGuard<'_, Outputs> {
    outputs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The hub, in the main loop.
pub struct Hub {
    outputs: Arc<Mutex<Outputs>>,
    listener: Option<socket::Listener>,
    /// The same connections as in `outputs`, to read from.
    clients: Vec<UnixStream>,
    terminal: Option<Terminal>,
    /// To hvc0; never blocks: what the guest does not read in time is dropped, as by a serial line.
    input: File,
}

impl Hub {
    /// The hub, and the reading end of hvc0's input.
    pub fn new(config: &ConsoleConfig) -> Result<(Self, OwnedFd), Error> {
        let log = config
            .log
            .as_ref()
            .map(|path| Log::open(path).map_err(|source| Error::Log { path: path.clone(), source }));
        let terminal = config.stdio.then(Terminal::new).transpose().map_err(Error::Terminal)?;
        let listener = config.socket.as_ref().map(|path| socket::Listener::new(path)).transpose()?;
        let (read, write) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|error| Error::Pipe(error.into()))?;
        let outputs = Outputs { log: log.transpose()?, terminal: config.stdio, ..Default::default() };
        let hub = Self {
            outputs: Arc::new(Mutex::new(outputs)),
            listener,
            clients: Vec::new(),
            terminal,
            input: write.into(),
        };
        Ok((hub, read))
    }

    /// A way in for a device.
    pub fn output(&self) -> Output {
        Output(self.outputs.clone())
    }

    /// What to wait for.
    pub fn sources<'a>(&'a self, sources: &mut Vec<BorrowedFd<'a>>) {
        if self.clients.len() < CLIENTS_MAX {
            sources.extend(self.listener.as_ref().map(AsFd::as_fd));
        }
        sources.extend(self.clients.iter().map(AsFd::as_fd));
        sources.extend(self.terminal.as_ref().and_then(Terminal::source));
    }

    /// Take what is there, without blocking. True if the user at the terminal wants the machine to end.
    pub fn serve(&mut self) -> bool {
        while self.clients.len() < CLIENTS_MAX
            && let Some(client) = self.listener.as_ref().and_then(socket::Listener::accept)
        {
            if let Ok(reader) = client.try_clone() {
                self.clients.push(reader);
                lock(&self.outputs).clients.push(client);
            }
        }
        let mut buffer = [0; 1024];
        let mut input = &self.input;
        let before = self.clients.len();
        self.clients.retain_mut(|client| {
            match client.read(&mut buffer) {
                Ok(0) => return false,
                Ok(read) => {
                    let _ = input.write(buffer.get(..read).unwrap_or_default());
                }
                Err(error) => {
                    return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
                }
            }
            true
        });
        if self.clients.len() < before {
            // Those who have left are found by writing to them; do it now, so that their sockets are closed.
            let alive: Vec<_> = self.clients.iter().filter_map(|c| c.try_clone().ok()).collect();
            lock(&self.outputs).clients = alive;
        }
        match &mut self.terminal {
            Some(terminal) => terminal.read(&mut input),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(folder: &Path) -> (Hub, File, PathBuf) {
        let config = ConsoleConfig {
            log: Some(folder.join("console.log")),
            socket: Some(folder.join("console")),
            stdio: false,
        };
        let (hub, input) = Hub::new(&config).unwrap();
        (hub, input.into(), folder.join("console"))
    }

    #[test]
    fn output_goes_to_log_and_clients_and_input_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let (mut hub, mut input, socket) = hub(folder.path());
        let mut output = hub.output();
        output.write_all(b"early ").unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        hub.serve();
        output.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        client.write_all(b"root\n").unwrap();
        hub.serve();
        let mut typed = [0; 5];
        input.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"root\n");
        drop(client);
        hub.serve();
        assert!(lock(&hub.outputs).clients.is_empty());
        output.write_all(b"!").unwrap();
        assert_eq!(std::fs::read(folder.path().join("console.log")).unwrap(), b"early hello!");
    }

    #[test]
    fn input_that_nobody_reads_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let (mut hub, _input, socket) = hub(folder.path());
        let mut client = UnixStream::connect(&socket).unwrap();
        for _ in 0..200 {
            client.write_all(&[b'x'; 1024]).unwrap();
            hub.serve();
        }
        assert_eq!(hub.clients.len(), 1);
    }

    #[test]
    fn the_log_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let (hub, ..) = hub(folder.path());
        let mut output = hub.output();
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..9 {
            output.write_all(&chunk).unwrap();
        }
        output.write_all(b"end").unwrap();
        let log = folder.path().join("console.log");
        assert_eq!(std::fs::metadata(folder.path().join("console.log.1")).unwrap().len(), LOG_MAX);
        assert_eq!(std::fs::metadata(log).unwrap().len(), (1 << 20) + 3);
    }

    #[test]
    fn a_crowd_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let (mut hub, _input, socket) = hub(folder.path());
        let crowd: Vec<_> = (0..CLIENTS_MAX + 3).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        hub.serve();
        assert_eq!(hub.clients.len(), CLIENTS_MAX);
        let mut sources = Vec::new();
        hub.sources(&mut sources);
        assert_eq!(sources.len(), CLIENTS_MAX, "a listener that is not served is not waited for");
        drop(crowd);
    }
}
