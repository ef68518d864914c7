//! Lines on standard error, which may be a pipe that nobody reads or a log on a full disk: then lab goes on in silence,
//! where `eprintln!` would panic.

use std::{
    fmt::Display,
    io::{Write, stderr},
};

/// Says a line.
pub fn say(line: impl Display) {
    let _ = writeln!(stderr(), "{line}");
}
