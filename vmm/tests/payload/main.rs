//! Boots tiny kernels, made here byte by byte, under the real lab-vmm on this machine's /dev/kvm: what a guest does at
//! the lowest level reaches the outside. `kernel` makes them, `running` runs them.

mod files;
mod kernel;
mod machine;
mod running;
