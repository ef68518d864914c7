//! Boots tiny kernels, made here byte by byte, under the real lab-vmm on this machine's /dev/kvm: what a guest does at
//! the lowest level reaches the outside. `kernel` makes them, `running` runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod files;
mod kernel;
mod machine;
mod running;
