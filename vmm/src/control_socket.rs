//! Serves the control protocol (`control`) on a UNIX socket, in the main loop.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use serde::Deserialize;

use crate::{
    control::{Action, Reply, Request, VERSION},
    socket,
};

/// Most connections at once.
const CLIENTS_MAX: usize = 16;
/// Longest request in bytes.
const REQUEST_MAX: usize = 4096;

/// The control socket.
pub struct ControlSocket {
    listener: socket::Listener,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl ControlSocket {
    /// Listen at `path`.
    pub fn new(path: &Path) -> Result<Self, socket::Error> {
        Ok(Self { listener: socket::Listener::new(path)?, clients: Vec::new() })
    }

    /// What to wait for.
    pub fn sources<'a>(&'a self, sources: &mut Vec<BorrowedFd<'a>>) {
        if self.clients.len() < CLIENTS_MAX {
            sources.push(self.listener.as_fd());
        }
        sources.extend(self.clients.iter().map(|client| client.stream.as_fd()));
    }

    /// Answer what has been asked, without blocking; `answer` does what a request wants.
    pub fn serve(&mut self, mut answer: impl FnMut(Action) -> Reply) {
        while self.clients.len() < CLIENTS_MAX
            && let Some(stream) = self.listener.accept()
        {
            self.clients.push(Client { stream, received: Vec::new() });
        }
        self.clients.retain_mut(|client| client.serve(&mut answer).is_ok());
    }
}

impl Client {
    /// Read once and answer; an error ends the connection.
    fn serve(&mut self, answer: &mut impl FnMut(Action) -> Reply) -> io::Result<()> {
        let mut buffer = [0; REQUEST_MAX];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => self.received.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let reply = match parse(&line) {
                Ok(action) => answer(action),
                Err(why) => Reply::Error(why),
            };
            self.send(&reply)?;
        }
        if self.received.len() >= REQUEST_MAX {
            let _ = self.send(&Reply::Error(format!("the request is longer than {REQUEST_MAX} bytes")));
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    /// A reply fits into the socket's buffer, unless the client sends request after request and never reads.
    fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        match self.stream.write(&line) {
            Ok(written) if written == line.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error),
        }
    }
}

fn parse(line: &[u8]) -> Result<Action, String> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let version: Version = serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    if version.v != VERSION {
        let theirs = version.v;
        return Err(format!("this lab-vmm speaks version {VERSION} of the control protocol, not {theirs}"));
    }
    let request: Request = serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    Ok(request.action)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::control::Status;

    fn ask(socket: &mut ControlSocket, client: &mut UnixStream, request: &[u8]) -> Reply {
        client.write_all(request).unwrap();
        for _ in 0..3 {
            socket.serve(|action| match action {
                Action::Status => Reply::Status(Status { name: "n".into(), ..Default::default() }),
                _ => Reply::Done,
            });
        }
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn requests_are_answered_and_nonsense_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let mut socket = ControlSocket::new(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let request = serde_json::to_vec(&Request { v: VERSION, action: Action::Kill }).unwrap();
        assert_eq!(ask(&mut socket, &mut client, &[&request[..], b"\n"].concat()), Reply::Done);
        let reply = ask(&mut socket, &mut client, b"{\"v\":1,\"do\":\"status\"}\n");
        assert!(matches!(reply, Reply::Status(status) if status.name == "n"));
        for (nonsense, says) in [
            (&b"{\"v\":2,\"do\":\"fly\"}\n"[..], "version 1"),
            (b"{\"v\":1,\"do\":\"fly\"}\n", "unknown variant"),
            (b"\xff\n", "not a request"),
        ] {
            let Reply::Error(why) = ask(&mut socket, &mut client, nonsense) else { panic!("{nonsense:?}") };
            assert!(why.contains(says), "{why}");
        }
    }

    #[test]
    fn an_endless_request_ends_the_connection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let mut socket = ControlSocket::new(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let reply = ask(&mut socket, &mut client, &[b'x'; REQUEST_MAX + 10]);
        assert!(matches!(reply, Reply::Error(why) if why.contains("longer")));
        assert!(socket.clients.is_empty());
    }

    #[test]
    fn a_client_that_never_reads_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let mut socket = ControlSocket::new(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let big = Status { notified: vec!["x".repeat(4000); 8], ..Default::default() };
        for _ in 0..100 {
            let _ = client.write_all(b"{\"v\":1,\"do\":\"status\"}\n");
            socket.serve(|_| Reply::Status(big.clone()));
        }
        assert!(socket.clients.is_empty());
    }
}
