//! What a machine has to say on standard error, which may be a log on a full disk: then it goes on in silence, where
//! `eprintln!` would panic.

use std::{
    fmt::Display,
    io::{Write, stderr},
};

/// Says a line.
pub fn say(line: impl Display) {
    let _ = writeln!(stderr(), "lab-vmm: {line}");
}
