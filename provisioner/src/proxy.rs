//! What OpenSSH's `ProxyCommand` runs: standard input and output connected with a node's SSH server.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// How long a server that takes no more connections is asked again.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// Time between two tries, which nothing announces.
const BUSY_PAUSE: Duration = Duration::from_millis(300);

/// Connects standard input and output with what `connect` leads to.
///
/// SSH servers close what is one connection too many before they have said a word (dropbear takes five at a time from one
/// address that have not logged in yet, OpenSSH's `MaxStartups` ten), and to them all of lab's come from one address. So
/// nothing is sent before the server has begun to speak, and a connection that it has closed by then is made again.
pub fn run(connect: impl Fn() -> Result<UnixStream, String>) -> Result<(), String> {
    let (stream, greeting) = greeted(&connect, BUSY_LIMIT)?;
    splice(&stream, &greeting).map_err(|error| error.to_string())
}

/// A connection, and the first bytes that came from it.
fn greeted(
    connect: &impl Fn() -> Result<UnixStream, String>,
    limit: Duration,
) -> Result<(UnixStream, Vec<u8>), String> {
    let end = Instant::now() + limit;
    let mut greeting = vec![0; 256];
    loop {
        let mut stream = connect()?;
        let last = match stream.read(&mut greeting) {
            Ok(0) => "it closes connections before it has greeted".to_string(),
            Ok(count) => {
                greeting.truncate(count);
                return Ok((stream, greeting));
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() >= end {
            return Err(format!("its SSH server took no connection within {} s: {last}", limit.as_secs()));
        }
        std::thread::park_timeout(BUSY_PAUSE);
    }
}

fn splice(stream: &UnixStream, greeting: &[u8]) -> io::Result<()> {
    let mut up = stream.try_clone()?;
    std::thread::spawn(move || {
        let copied = copy_unbuffered(&mut io::stdin().lock(), &mut up);
        drop(copied.and_then(|()| up.shutdown(Shutdown::Write)));
    });
    // The far end decides when it is over.
    copy_unbuffered(&mut greeting.chain(stream), &mut io::stdout().lock())
}

fn copy_unbuffered(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(buffer.get(..count).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_server_with_too_many_connections_is_asked_again() {
        let tries = Cell::new(0);
        let connect = || {
            let (here, mut there) = UnixStream::pair().map_err(|error| error.to_string())?;
            tries.set(tries.get() + 1);
            if tries.get() == 3 {
                there.write_all(b"SSH-2.0-x\r\n").map_err(|error| error.to_string())?;
            }
            Ok(here)
        };
        let (_, greeting) = greeted(&connect, Duration::from_secs(60)).unwrap();
        assert_eq!((tries.get(), greeting.as_slice()), (3, &b"SSH-2.0-x\r\n"[..]));
        // One that never takes any is told of.
        let silent = || UnixStream::pair().map(|(here, _)| here).map_err(|error| error.to_string());
        let error = greeted(&silent, Duration::ZERO).unwrap_err();
        assert!(error.contains("before it has greeted"), "{error}");
    }
}
