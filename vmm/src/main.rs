//! The lab-vmm command.
fn main() {}
