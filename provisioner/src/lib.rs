//! The lab command: from a labfile to a running lab.
//!
//! - `labfile`: the file, its errors, and the topology it means; `stack`: definitions of stacks
//! - `plan`, `actions`: what has to be done, as data, and what does it; `bundle`: files for stacks that download nothing;
//!   `bake`: steps run on an image's files, without a node
//! - `host`: the machine that labs run on: this one, or an emulated one
//! - `snapshot`: the running lab saved, restored, forked, exported; `lockfile`: what a lab was brought up from
//! - `commands`: one verb a file; `cli`: their arguments
//! - the rest is what those share: paths, locks, processes, the channel into nodes, progress

pub mod actions;
pub mod bake;
pub mod bundle;
pub mod capacity;
pub mod channel;
pub mod child;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod control;
pub mod enclosed;
pub mod files;
pub mod fork;
pub mod host;
pub mod json_file;
pub mod kubeconfig;
pub mod lab;
pub mod labfile;
pub mod layer;
pub mod lock;
pub mod lockfile;
pub mod machine;
pub mod memory;
pub mod paths;
pub mod plan;
pub mod progress;
pub mod proxy;
pub mod say;
pub mod size;
pub mod snapshot;
pub mod source;
pub mod stack;
pub mod state;
pub mod subordinate_ids;
pub mod terminal_text;
