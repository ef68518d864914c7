//! What the guest's systemd says of itself: it connects to a vsock port of the host (`vmm.notify_socket=vsock-stream:…`),
//! sends `KEY=VALUE` lines, and closes; each message may come over a connection of its own.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use crate::{config::VsockConfig, socket};

/// Most lines that are kept, as the control protocol says.
const LINES_MAX: usize = 256;
/// Longest line, in bytes; the rest of a longer one is dropped.
const LINE_MAX: usize = 512;
/// Most connections at once.
const CLIENTS_MAX: usize = 16;

/// Listens for the guest's messages, in the main loop.
pub struct Notify {
    listener: socket::Listener,
    clients: Vec<Client>,
    lines: Vec<String>,
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Notify {
    /// Listen where the vsock device connects for the guest, if the configuration wants it.
    pub fn new(config: Option<&VsockConfig>) -> Result<Option<Self>, socket::Error> {
        let Some((vsock, port)) = config.and_then(|vsock| Some((vsock, vsock.notify_port?))) else {
            return Ok(None);
        };
        let mut path = vsock.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        let listener = socket::Listener::new(path.as_ref())?;
        Ok(Some(Self { listener, clients: Vec::new(), lines: Vec::new() }))
    }

    /// Lines, the newest last, without repeats.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Take over what a guest said before a snapshot.
    pub fn restore(&mut self, lines: &[String]) {
        self.lines = lines.iter().take(LINES_MAX).cloned().collect();
    }

    /// What to wait for.
    pub fn sources<'a>(&'a self, sources: &mut Vec<BorrowedFd<'a>>) {
        if self.clients.len() < CLIENTS_MAX {
            sources.push(self.listener.as_fd());
        }
        sources.extend(self.clients.iter().map(|client| client.stream.as_fd()));
    }

    /// Take what is there, without blocking.
    pub fn serve(&mut self) {
        while self.clients.len() < CLIENTS_MAX
            && let Some(stream) = self.listener.accept()
        {
            self.clients.push(Client { stream, line: Vec::new() });
        }
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| self.read(client));
        self.clients = clients;
    }

    /// Read once from a client; whether it is still there.
    fn read(&mut self, client: &mut Client) -> bool {
        let mut buffer = [0; 4096];
        match client.stream.read(&mut buffer) {
            Ok(0) => {
                self.keep(&client.line);
                false
            }
            Ok(read) => {
                for byte in buffer.iter().take(read) {
                    if *byte == b'\n' {
                        self.keep(&client.line);
                        client.line.clear();
                    } else if client.line.len() < LINE_MAX {
                        client.line.push(*byte);
                    }
                }
                true
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    fn keep(&mut self, line: &[u8]) {
        let line: String = String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).collect();
        if !line.contains('=') {
            return;
        }
        self.lines.retain(|known| *known != line);
        if self.lines.len() >= LINES_MAX {
            self.lines.remove(0);
        }
        self.lines.push(line);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn notify(folder: &std::path::Path) -> Notify {
        let config =
            VsockConfig { cid: 3, socket: folder.join("vsock"), notify_port: Some(9), clock_port: None };
        Notify::new(Some(&config)).unwrap().unwrap()
    }

    fn send(folder: &std::path::Path, notify: &mut Notify, message: &[u8]) {
        let mut stream = UnixStream::connect(folder.join("vsock_9")).unwrap();
        let mut rest = message;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(1000));
            stream.write_all(now).unwrap();
            notify.serve();
            rest = later;
        }
        drop(stream);
        for _ in 0..3 {
            notify.serve();
        }
    }

    #[test]
    fn messages_come_one_connection_each() {
        let folder = tempfile::tempdir().unwrap();
        let mut notify = notify(folder.path());
        send(folder.path(), &mut notify, b"X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\n");
        send(folder.path(), &mut notify, b"STATUS=starting\nREADY=1");
        send(
            folder.path(),
            &mut notify,
            b"X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\nnonsense\n\x1b[2J=\xff\n",
        );
        assert_eq!(
            notify.lines(),
            ["STATUS=starting", "READY=1", "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target", "[2J=\u{fffd}"]
        );
    }

    #[test]
    fn a_chatty_guest_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut notify = notify(folder.path());
        send(folder.path(), &mut notify, &[b'='; 10_000]);
        assert_eq!(notify.lines()[0].len(), LINE_MAX);
        for n in 0..300 {
            send(folder.path(), &mut notify, format!("N={n}\n").as_bytes());
        }
        assert_eq!((notify.lines().len(), notify.lines()[255].as_str()), (LINES_MAX, "N=299"));
    }
}
