//! The other side of the device's socket: how a program of the host gets to one of the guest's ports.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// How long the device may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Connects with one of the guest's vsock ports by the device's socket, and leaves a limit of 30 s to reads.
///
/// # Errors
/// `ConnectionRefused` if nobody listens there yet.
pub fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(CONNECT_LIMIT))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.len() < 32 && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        let reason = format!("nobody listens on port {port} yet");
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, reason));
    }
    Ok(stream)
}
