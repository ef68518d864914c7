//! `lab console`: a terminal on a node's console, whatever state its network or its SSH server is in.

use std::{
    io::{self, IsTerminal, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::ExitCode,
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::{Context, Error, ssh};
use crate::say::say;

/// Ctrl-], which leaves the console.
const ESCAPE: u8 = 0x1d;

/// Connects this terminal with a node's console.
pub fn run(context: &Context, node: Option<&str>) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let node = ssh::name_or_first(&lab, node)?;
    ssh::running(&lab, &node)?;
    let io = |source| Error::Io { action: format!("connect to the console of {node}"), source };
    let stream = UnixStream::connect(lab.dirs.node_socket(&node, "console")).map_err(io)?;
    context.progress.say(&format!("console of {node}: Ctrl-] leaves it; Enter shows a prompt"));
    let _raw = RawTerminal::enter().map_err(io)?;
    let mut output = stream.try_clone().map_err(io)?;
    std::thread::spawn(move || {
        let mut bytes = [0; 1024];
        while let Ok(count) = io::stdin().lock().read(&mut bytes) {
            let typed = bytes.get(..count).unwrap_or_default();
            let end = typed.iter().position(|&byte| byte == ESCAPE);
            let sent = output.write_all(typed.get(..end.unwrap_or(count)).unwrap_or_default());
            if count == 0 || end.is_some() || sent.is_err() {
                break;
            }
        }
        // Ends the reading below.
        drop(output.shutdown(Shutdown::Both));
    });
    let mut input = stream;
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = input.read(&mut bytes) {
        let mut out = io::stdout().lock();
        out.write_all(bytes.get(..count).unwrap_or_default()).and_then(|()| out.flush()).map_err(io)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Standard input without line editing and signals, until it is dropped.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
            say("");
        }
    }
}
