//! Client of the control sockets of `lab-vmm` and `lab-net`: one JSON object a line each way.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use lab_net::control as net;
use lab_vmm::control as vmm;
use serde::{Serialize, de::DeserializeOwned};

/// How long a process may take for an answer, except to `Dial`.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of an answer that are read at once.
const BUFFER: usize = 4096;

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens, or the connection broke.
    #[error("no answer from {socket}: {source}")]
    Io {
        /// The socket.
        socket: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The process refused.
    #[error("{0}")]
    Refused(String),
    /// It said something else than was asked for.
    #[error("{socket} gave an answer that this version of lab does not know: {answer}")]
    Strange {
        /// The socket.
        socket: PathBuf,
        /// What it said.
        answer: String,
    },
}

/// Asks a `lab-vmm`.
pub fn ask_vmm(socket: &Path, action: vmm::Action) -> Result<vmm::Reply, Error> {
    ask_vmm_slow(socket, action, ANSWER_LIMIT)
}

/// Asks a `lab-vmm` for what may take as long as `limit`.
pub fn ask_vmm_slow(socket: &Path, action: vmm::Action, limit: Duration) -> Result<vmm::Reply, Error> {
    let request = vmm::Request { v: vmm::VERSION, action };
    match exchange(socket, &request, limit, BUFFER)?.1 {
        vmm::Reply::Error(sentence) => Err(Error::Refused(sentence)),
        reply => Ok(reply),
    }
}

/// How a `lab-vmm` is.
pub fn vmm_status(socket: &Path) -> Result<vmm::Status, Error> {
    match ask_vmm(socket, vmm::Action::Status)? {
        vmm::Reply::Status(status) => Ok(status),
        other => Err(Error::Strange { socket: socket.into(), answer: format!("{other:?}") }),
    }
}

/// Asks a `lab-net`.
pub fn ask_net(socket: &Path, action: net::Action) -> Result<net::Reply, Error> {
    let request = net::Request { v: net::VERSION, action };
    match exchange(socket, &request, ANSWER_LIMIT, BUFFER)?.1 {
        net::Reply::Error(sentence) => Err(Error::Refused(sentence)),
        reply => Ok(reply),
    }
}

/// How a `lab-net` is.
pub fn net_status(socket: &Path) -> Result<net::Status, Error> {
    match ask_net(socket, net::Action::Status)? {
        net::Reply::Status(status) => Ok(status),
        other => Err(Error::Strange { socket: socket.into(), answer: format!("{other:?}") }),
    }
}

/// A TCP connection from the gateway of a lab to one of its addresses.
pub fn dial(socket: &Path, ip: std::net::Ipv4Addr, port: u16) -> Result<UnixStream, Error> {
    let request = net::Request { v: net::VERSION, action: net::Action::Dial { ip, port } };
    // One byte at a time: the stream goes on with data, of which nothing must be caught in a buffer.
    let (stream, reply) = exchange(socket, &request, ANSWER_LIMIT, 1)?;
    match reply {
        net::Reply::Done => {
            stream.set_read_timeout(None).map_err(|source| Error::Io { socket: socket.into(), source })?;
            Ok(stream)
        }
        net::Reply::Error(sentence) => Err(Error::Refused(sentence)),
        other => Err(Error::Strange { socket: socket.into(), answer: format!("{other:?}") }),
    }
}

fn exchange<Q: Serialize, A: DeserializeOwned>(
    socket: &Path,
    request: &Q,
    limit: Duration,
    buffer: usize,
) -> Result<(UnixStream, A), Error> {
    let failed = |source| Error::Io { socket: socket.into(), source };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    let mut line = serde_json::to_vec(request).map_err(|e| failed(e.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(failed)?;
    let mut answer = Vec::new();
    BufReader::with_capacity(buffer, &stream).read_until(b'\n', &mut answer).map_err(failed)?;
    if answer.is_empty() {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    let reply = serde_json::from_slice(&answer).map_err(|_| Error::Strange {
        socket: socket.into(),
        answer: String::from_utf8_lossy(&answer).trim_end().into(),
    })?;
    Ok((stream, reply))
}
