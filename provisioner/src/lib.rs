//! The lab command: from a labfile to a running lab.
//!
//! - `labfile`: the file, its errors, and the topology it means; `stack`: definitions of stacks
//! - `plan`, `actions`: what has to be done, as data, and what does it
//! - `host`: the machine that labs run on: this one, or an emulated one
//! - `commands`: one verb a file; `cli`: their arguments
//! - the rest is what those share: paths, locks, processes, the channel into nodes, progress

pub mod host;
pub mod labfile;
pub mod stack;
