//! The device's side of UNIX sockets: the one where the host connects, and those that the guest connects to.

use std::{
    fs,
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, fchmod},
    net::{
        AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv,
        socket_with,
    },
};

/// Connections that wait while the guest is not ready.
const BACKLOG: i32 = 128;
/// Longest greeting, `CONNECT 4294967295\n`, and a little more.
const MAX_GREETING: usize = 32;

/// What the device has on the host.
pub(super) struct Host {
    /// The guest's context id.
    pub cid: u64,
    /// The socket's path, and the beginning of those that the guest can connect to.
    socket: PathBuf,
    /// Where connections from the host come in.
    pub listener: UnixListener,
}

impl Host {
    /// Listens at `socket`.
    pub fn new(cid: u32, socket: &Path) -> io::Result<Self> {
        Ok(Self { cid: cid.into(), socket: socket.to_owned(), listener: open_socket(socket)? })
    }

    /// Takes a connection, if one waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to whoever listens for a port of the host.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        Ok(UnixStream::from(socket))
    }
}

/// Listens at `path`, for this user only.
fn open_socket(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "another file is in the way; remove it",
            ));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            Err(e) => return Err(e),
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another machine listens there; stop it",
                ));
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

/// What a connection of the host said first.
pub(super) enum Greeting {
    /// The port of the guest that it wants.
    Port(u32),
    /// Not all of it has arrived.
    Incomplete,
    /// No greeting, or nobody there any more.
    Bad,
}

/// Reads `CONNECT port\n`, and not a byte of what follows it.
pub(super) fn read_greeting(stream: &mut UnixStream) -> Greeting {
    let mut line = [0; MAX_GREETING];
    let length = match recv(stream.as_fd(), &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => return Greeting::Bad,
        Ok((_, length)) => length,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Bad,
    };
    let said = line.get(..length).unwrap_or_default();
    let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
        return if length < MAX_GREETING { Greeting::Incomplete } else { Greeting::Bad };
    };
    let port = said
        .get(..end)
        .and_then(|line| std::str::from_utf8(line).ok())
        .and_then(|line| line.trim_end_matches('\r').strip_prefix("CONNECT "))
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|port| port.parse().ok());
    // It was there a moment ago, and nobody else reads.
    let mut taken = [0; MAX_GREETING];
    let read = taken.get_mut(..=end).is_some_and(|taken| stream.read_exact(taken).is_ok());
    match port {
        Some(port) if read => Greeting::Port(port),
        _ => Greeting::Bad,
    }
}
