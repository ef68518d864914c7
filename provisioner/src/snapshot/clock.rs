//! A guest that stood still, or was restored, has missed time: that its clock is set is the first thing that it is asked
//! for.

use std::time::{Duration, Instant};

use super::{Error, clear};
use crate::{actions, channel, clock, json_file, lab::Lab};

/// How long a machine may take to be written, with KVM.
pub const SAVE_LIMIT_S: u32 = 120;
/// How long a guest may take to answer after it went on, with KVM.
const LIMIT_S: u32 = 20;

/// Notes that a node will have missed time, before it does: whatever ends this command, the next `up` tells it.
pub fn will_miss(lab: &Lab, node: &str) -> Result<(), Error> {
    Ok(json_file::write_bytes(&actions::behind_marker(lab, node), b"")?)
}

/// Sets the clock of a node that went on, and marks it as ready. `seen` is told what is in the way.
pub fn catch_up(lab: &Lab, node: &str, seen: &dyn Fn(&str)) -> Result<(), Error> {
    let limit = lab.limit(LIMIT_S);
    let end = Instant::now() + limit;
    let channel = lab.channel(node);
    let (image, _) = lab.image_of(node)?;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let stepped = match image.clock_port {
            Some(port) => clock::step(&channel, port, left),
            None => clock::step_by_ssh(&channel, left),
        };
        match stepped {
            Ok(()) => {
                json_file::write_bytes(&actions::ready_marker(lab, node), b"")?;
                return clear(&actions::behind_marker(lab, node));
            }
            Err(reason) if Instant::now() > end => {
                let reason =
                    format!("its clock was not set within {} s; last seen: {reason}", limit.as_secs());
                return Err(channel::Error::Unreachable { node: node.into(), reason }.into());
            }
            // The connection of another life: the guest has just forgotten it.
            Err(reason) => {
                seen(&reason);
                std::thread::park_timeout(Duration::from_millis(100));
            }
        }
    }
}
