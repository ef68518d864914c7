//! Sends a line to a control socket and prints the line that comes back: `ask SOCKET JSON`. For scripts/vt-x.

use std::{
    error::Error,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), Some(request), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("its arguments are SOCKET JSON".into());
    };
    let mut stream = UnixStream::connect(&socket)?;
    writeln!(stream, "{request}")?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    write!(std::io::stdout(), "{reply}")?;
    Ok(if reply.is_empty() || reply.contains("\"error\"") { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
