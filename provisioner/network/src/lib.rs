//! lab-net: one process is one lab's network.

pub mod config;
pub mod control;
