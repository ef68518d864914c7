//! The line from a carried command back to this process: a TCP connection that its wrapper makes to the real machine's
//! 127.0.0.1. Numbers of signals go in, the answer comes out, and its end is the end of either side.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use super::{Error, request::Answer};

/// How long a caller may take to say the token.
const TOKEN_LIMIT: Duration = Duration::from_secs(30);

/// Where the wrapper calls back.
pub struct Line {
    listener: TcpListener,
    /// What a caller has to say first.
    pub token: String,
    /// Port that is called.
    pub port: u16,
    /// The connection, once the token has been said.
    stream: Option<TcpStream>,
    input: Vec<u8>,
}

/// What has come in on a line.
pub enum Heard {
    /// Nothing whole yet.
    Nothing,
    /// The answer.
    Answer(Box<Answer>),
    /// The other side is gone.
    End,
}

impl Line {
    /// Waits for a call, with a token that nobody can guess.
    pub fn new() -> Result<Self, Error> {
        let io = |source| Error::Io { what: "cannot make a line to the emulated host".into(), source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io)?;
        listener.set_nonblocking(true).map_err(io)?;
        let port = listener.local_addr().map_err(io)?.port();
        let mut bytes = [0; 16];
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes)).map_err(io)?;
        let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { listener, token, port, stream: None, input: Vec::new() })
    }

    /// Whether the wrapper has called.
    pub fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// What to wait for.
    pub fn waits(&self) -> BorrowedFd<'_> {
        self.stream.as_ref().map_or(self.listener.as_fd(), |stream| stream.as_fd())
    }

    /// Takes what has come in.
    pub fn hear(&mut self) -> Result<Heard, Error> {
        let io = |source| Error::Io { what: "cannot hear of the emulated host".into(), source };
        let Some(stream) = &mut self.stream else {
            let Ok((mut stream, _)) = self.listener.accept() else { return Ok(Heard::Nothing) };
            // Anybody on this machine may call; who does not know the token is hung up on.
            let mut said = vec![0; self.token.len() + 1];
            let known = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(TOKEN_LIMIT)))
                .and_then(|()| stream.read_exact(&mut said))
                .is_ok_and(|()| said == format!("{}\n", self.token).as_bytes());
            if known {
                stream.set_nonblocking(true).map_err(io)?;
                self.stream = Some(stream);
            }
            return Ok(Heard::Nothing);
        };
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => return Ok(Heard::End),
                Ok(count) => {
                    self.input.extend(bytes.get(..count).unwrap_or_default());
                    if self.input.ends_with(b"\n") {
                        let answer = serde_json::from_slice(&self.input).map_err(|error| io(error.into()))?;
                        return Ok(Heard::Answer(Box::new(answer)));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(Heard::End),
            }
        }
    }

    /// Passes a signal on. Before there is a connection there is no command to be told.
    pub fn signal(&mut self, signal: i32) -> bool {
        self.stream.as_mut().is_some_and(|stream| writeln!(stream, "{signal}").is_ok())
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::host::emulated::request::Report;

    #[test]
    fn only_who_knows_the_token_is_heard() {
        let mut line = Line::new().unwrap();
        let (port, token) = (line.port, line.token.clone());
        let call = |token: &str| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            writeln!(stream, "{token}").unwrap();
            stream
        };
        let wait =
            |line: &Line| poll(&mut [PollFd::from_borrowed_fd(line.waits(), PollFlags::IN)], None).unwrap();
        let stranger = call("0123456789abcdef0123456789abcdef");
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing) && !line.signal(15));
        drop(stranger);
        let mut wrapper = call(&token);
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing) && line.signal(15));
        let answer = Answer { ended: Ok(7), report: Report { labs: vec!["a".into()], ..Report::default() } };
        let text = serde_json::to_string(&answer).unwrap();
        let (begin, end) = text.split_at(5);
        wrapper.write_all(begin.as_bytes()).unwrap();
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Nothing));
        writeln!(wrapper, "{end}").unwrap();
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::Answer(it) if *it == answer));
        drop(wrapper);
        wait(&line);
        assert!(matches!(line.hear().unwrap(), Heard::End));
    }
}
