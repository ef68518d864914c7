//! lab-vmm: one process is one virtual machine.
//!
//! `machine` puts the parts together and runs the main loop; `cpu` runs the guest; `boot` and `acpi` are what the guest
//! finds in memory; `bus`, `platform` and `pci` are what its accesses reach; `virtio` holds the devices. `config` and
//! `control` are the contract with whoever starts this process. What lies outside of the process (the network, images)
//! is not here.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod control_socket;
pub mod cpu;
pub mod devices;
pub mod ending;
pub mod guest_clock;
pub mod host_kernel;
pub mod layout;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod notify;
pub mod pci;
pub mod platform;
pub mod qcow2;
pub mod restart;
pub mod say;
pub mod signals;
pub mod snapshot;
pub mod socket;
pub mod terminal;
pub mod virtio;
