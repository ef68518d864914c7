//! What a network has to say while it runs: lines on standard error. Who started it may be gone, with the other end
//! of that; nothing is lost then but the words.

use std::{fmt::Display, io::Write};

/// Say something.
pub fn warn(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "lab-net: {message}");
}
