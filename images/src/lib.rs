//! Images: what a node's disk, kernel and initramfs are made from. Here live the definitions (`*.toml` beside `src`),
//! the builder, the import of distributions' cloud images and the store. Overlays of nodes and layers are the
//! provisioner's.

pub mod archive;
pub mod build;
pub mod command;
pub mod definition;
pub mod import;
pub mod initramfs;
pub mod kernel;
pub mod kernel_package;
pub mod manifest;
pub mod store;
