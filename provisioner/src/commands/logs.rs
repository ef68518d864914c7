//! `lab logs`: what nodes printed on their consoles, and what lab's processes have to say.

use std::{
    io::{self, Read, Write},
    process::{Command, ExitCode, Stdio},
};

use super::{Context, Error};

/// Prints a log. `node` is a node's name, or `net`.
pub fn run(context: &Context, node: &str, vmm: bool, follow: bool) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let log = match node {
        "net" if lab.node("net").is_err() => lab.dirs.net().join("net.log"),
        _ => lab.dirs.node(&lab.node(node)?.name).join(if vmm { "vmm.log" } else { "console.log" }),
    };
    if !log.exists() {
        return Err(Error::Other(format!("{node} has no log yet: `lab up` starts it")));
    }
    let mut command = Command::new("tail");
    command.args(["-n", "+1"]);
    if follow {
        command.arg("-F");
    }
    command.arg(&log);
    let failed = |source| Error::Io { action: format!("read {}", log.display()), source };
    let mut tail = command.stdout(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(text) = &mut tail.stdout {
        pass_on(text, io::stdout().lock()).map_err(failed)?;
    }
    Ok(if tail.wait().map_err(failed)?.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Copies what a node has printed without what acts on a terminal: a console's log has questions to terminals in it
/// (systemd 258 and later ask for size and name), whose answers the user's shell would take for typed.
fn pass_on(mut text: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut plain = anstream::adapter::StripBytes::new();
    let mut piece = vec![0; 8 << 10];
    loop {
        let length = text.read(&mut piece)?;
        let bytes = piece.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(());
        }
        for part in plain.strip_next(bytes) {
            to.write_all(part)?;
        }
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_not_passed_on() {
        // As systemd 262 begins on a console: a device control string, questions for size and place, a context.
        let text = b"\x1bP+q6E616D65\x1b\\\x1b[18t\x1b7\x1b[32766;32766H\x1b[6n\x1b8\x1b[!p\x1b]3008;start=1;user=root\x1b\\\r\n\
            Debian \xc3\xbc\r\n\nsid login: ";
        let mut whole = Vec::new();
        pass_on(text.as_slice(), &mut whole).unwrap();
        assert_eq!(String::from_utf8_lossy(&whole), "\r\nDebian \u{fc}\r\n\nsid login: ");
        // Also where a sequence is cut by the end of what was read.
        struct Bytes<'a>(&'a [u8]);
        impl Read for Bytes<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let length = buffer.len().min(1);
                self.0.read(&mut buffer[..length])
            }
        }
        let mut pieces = Vec::new();
        pass_on(Bytes(text), &mut pieces).unwrap();
        assert_eq!(pieces, whole);
    }
}
