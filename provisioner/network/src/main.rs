//! The lab-net command.
fn main() {}
