//! lab-vmm: one process is one virtual machine.

pub mod config;
pub mod control;
pub mod qcow2;
pub mod virtio;
