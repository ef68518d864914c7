//! The control socket: clients send requests, one JSON object a line, and get their replies in order. What the
//! requests mean is the network's to say.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, SocketFlags},
};

use crate::{
    control::{Reply, Request, VERSION},
    lan::Lan,
    poller::{EventFlags, Poller, Token},
};

/// Longest request line in bytes: a list of the most nodes that a network can have fits.
const MAX_LINE: usize = 256 << 10;
/// Most clients; a newer one is refused.
const MAX_CLIENTS: usize = 64;

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    input: Vec<u8>,
    output: Vec<u8>,
    /// It sends no more.
    ended: bool,
}

/// The clients.
#[derive(Debug)]
pub struct ControlServer {
    listener: OwnedFd,
    clients: BTreeMap<u64, Client>,
}

impl ControlServer {
    /// Serve the clients of a listening socket, which the poller watches already.
    pub fn new(listener: OwnedFd) -> ControlServer {
        ControlServer { listener, clients: BTreeMap::new() }
    }

    /// Somebody connects.
    pub fn accept(&mut self, lan: &mut Lan) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags) {
            let id = lan.new_id();
            if self.clients.len() < MAX_CLIENTS
                && lan.poller.add(&socket, Token::Client(id), EventFlags::IN).is_ok()
            {
                let client = Client { socket, input: Vec::new(), output: Vec::new(), ended: false };
                self.clients.insert(id, client);
            }
        }
    }

    /// A client is ready for something. Afterwards [`ControlServer::next_request`] has its requests.
    pub fn ready(&mut self, id: u64, flags: EventFlags, poller: &Poller) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if !client.flush(id, poller) || flags.intersects(EventFlags::ERR) {
            self.clients.remove(&id);
        } else if flags.intersects(EventFlags::IN | EventFlags::HUP) && client.output.is_empty() {
            client.read();
        }
    }

    /// The next request of a client, or what is wrong with it. Clients that are done are let go.
    pub fn next_request(&mut self, id: u64) -> Option<Result<Request, String>> {
        let client = self.clients.get_mut(&id)?;
        if !client.output.is_empty() {
            return None;
        }
        let Some(end) = client.input.iter().position(|byte| *byte == b'\n') else {
            if client.input.len() > MAX_LINE {
                client.input.clear();
                client.ended = true;
                return Some(Err(format!("a request of more than {MAX_LINE} bytes")));
            }
            if client.ended {
                self.clients.remove(&id);
            }
            return None;
        };
        let line: Vec<u8> = client.input.drain(..=end).collect();
        Some(parse(&line))
    }

    /// Answer a client's last request.
    pub fn reply(&mut self, id: u64, reply: &Reply, poller: &Poller) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if serde_json::to_writer(&mut client.output, reply).is_err() {
            client.output.clear();
        }
        client.output.push(b'\n');
        if !client.flush(id, poller) {
            self.clients.remove(&id);
        }
    }

    /// Take a client's connection over, with what it has sent behind its last request.
    pub fn take(&mut self, id: u64, poller: &Poller) -> Option<(OwnedFd, Vec<u8>)> {
        let client = self.clients.remove(&id)?;
        poller.remove(&client.socket).ok()?;
        Some((client.socket, client.input))
    }
}

impl Client {
    fn read(&mut self) {
        let mut buffer = [0; 16 << 10];
        while self.input.len() <= MAX_LINE {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.ended = true;
                    return;
                }
                Ok((len, _)) => self.input.extend(buffer.get(..len).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => {
                    self.ended = true;
                    return;
                }
            }
        }
    }

    /// Send what is to be sent; false if the client has gone.
    fn flush(&mut self, id: u64, poller: &Poller) -> bool {
        let waited = !self.output.is_empty();
        while !self.output.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.output, flags) {
                Ok(sent) => drop(self.output.drain(..sent.min(self.output.len()))),
                Err(Errno::AGAIN) => {
                    return poller.modify(&self.socket, Token::Client(id), EventFlags::OUT).is_ok();
                }
                Err(_) => return false,
            }
        }
        !waited || poller.modify(&self.socket, Token::Client(id), EventFlags::IN).is_ok()
    }
}

/// A request line, or what is wrong with it.
fn parse(line: &[u8]) -> Result<Request, String> {
    let value: serde_json::Value =
        serde_json::from_slice(line).map_err(|e| format!("this is not a request: {e}"))?;
    match value.get("v").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => {
            return Err(format!(
                "this network speaks version {VERSION} of the control protocol, the request is of version \
                 {version}: end the lab with the `lab` that started it, then start it again"
            ));
        }
        None => return Err("this is not a request: it has no version `v`".into()),
    }
    serde_json::from_value(value).map_err(|e| format!("this is not a request: {e}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::Action;

    #[test]
    fn requests_are_read_and_wrong_ones_explained() {
        let status = parse(b"{\"v\":1,\"do\":\"status\"}\n").unwrap();
        assert_eq!(status.action, Action::Status);
        let cases = [
            ("{\"v\":2,\"do\":\"status\"}", "speaks version 1"),
            ("{\"do\":\"status\"}", "no version"),
            ("{\"v\":1,\"do\":\"fly\"}", "unknown variant `fly`"),
            ("status", "not a request"),
        ];
        for (line, part) in cases {
            let message = parse(line.as_bytes()).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    proptest! {
        #[test]
        fn random_lines_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }
    }
}
