//! Ending a lab's processes: machines by their power button or their plug, the network by a word.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lab_net::control as net;
use lab_vmm::control as vmm;

use crate::{
    actions, control,
    lab::Lab,
    lock,
    progress::Task,
    state::{self, NodeState},
};

/// How long a guest may take to power off by itself, with KVM.
const POWER_OFF_LIMIT_S: u32 = 60;
/// How long a process may take to end once it was told to.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long a process that has just been started may take until its socket is there.
const SOCKET_LIMIT: Duration = Duration::from_secs(5);
/// How exact the times of files are.
const GRANULARITY: Duration = Duration::from_secs(2);

/// How long until it is told again.
const TELL_AGAIN: Duration = Duration::from_millis(500);

/// Why a process did not end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It holds its lock still.
    #[error("{process} has not ended {seconds} s after it was told to ({last}); its log is {log}")]
    StillThere {
        /// The process.
        process: String,
        /// How long it was waited for.
        seconds: u64,
        /// What the control socket said.
        last: String,
        /// Where its log is.
        log: PathBuf,
    },
}

/// Powers a node off: by its power button first, and by its plug if it does not react or if `force`. The guest's own
/// shutdown has written everything; pulling the plug loses what was not synced.
pub fn power_off(lab: &Lab, node: &str, force: bool, task: &Task) -> Result<(), Error> {
    if state::node_state(&lab.dirs, node) != NodeState::Running {
        return Ok(());
    }
    lab.channel(node).close();
    drop(fs::remove_file(actions::ready_marker(lab, node)));
    let socket = lab.dirs.node_socket(node, "ctl");
    let lock = state::vmm_lock(&lab.dirs.node(node));
    // A guest that stands still sees no button.
    if !force
        && control::ask_vmm(&socket, vmm::Action::Resume).is_ok()
        && control::ask_vmm(&socket, vmm::Action::PowerButton).is_ok()
    {
        task.detail("its power button is pressed");
        if wait_released(&lock, lab.limit(POWER_OFF_LIMIT_S)) {
            return Ok(());
        }
        task.detail("the guest does not react: pulling the plug");
        lab.progress.warn(&format!("{node} did not react to its power button: its plug was pulled"));
    }
    let log = lab.dirs.node(node).join("vmm.log");
    let lost = is_lost(lab, &lab.dirs.node(node).join("vm.json"));
    let tell = || control::ask_vmm(&socket, vmm::Action::Kill);
    end(&lock, lost, &format!("the machine of {node}"), log, tell)
}

/// Ends the lab's network.
pub fn stop_network(lab: &Lab) -> Result<(), Error> {
    if !state::net_is_running(&lab.dirs) {
        return Ok(());
    }
    let log = lab.dirs.net().join("net.log");
    let lost = is_lost(lab, &lab.dirs.net().join("config.json"));
    end(&state::net_lock(&lab.dirs), lost, "lab-net", log, || {
        control::ask_net(&lab.dirs.net_control(), net::Action::Stop)
    })
}

/// Ends what runs of a lab and cannot be reached any more, since the folder of its sockets is gone: with the session that
/// it was brought up in, say. Whether there was something.
pub fn end_lost(lab: &Lab) -> Result<bool, Error> {
    let mut nodes = state::nodes_on_disk(&lab.dirs);
    nodes.retain(|node| state::node_state(&lab.dirs, node) == NodeState::Running);
    let net = state::net_is_running(&lab.dirs).then(|| lab.dirs.net_control());
    let sockets: Vec<PathBuf> =
        nodes.iter().map(|node| lab.dirs.node_socket(node, "ctl")).chain(net).collect();
    // One that a killed command has just started makes its socket any moment.
    let end = Instant::now() + SOCKET_LIMIT * lab.patience;
    let configurations: Vec<PathBuf> = nodes.iter().map(|node| lab.dirs.node(node).join("vm.json")).collect();
    let lost = configurations.iter().any(|file| is_lost(lab, file));
    while !sockets.iter().all(|socket| socket.exists()) {
        if lost || Instant::now() > end {
            let task = lab.progress.begin(&lab.topology.name, "end what cannot be reached");
            nodes.iter().try_for_each(|node| power_off(lab, node, true, &task))?;
            stop_network(lab)?;
            task.done();
            return Ok(true);
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(false)
}

/// Whether a process that was started with this configuration has no socket any more: the folder of sockets is younger than
/// it, and nothing has come into it.
fn is_lost(lab: &Lab, configuration: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    let empty = fs::read_dir(&lab.dirs.sockets).is_ok_and(|mut entries| entries.next().is_none());
    match (time(&lab.dirs.sockets), time(configuration)) {
        (Ok(folder), Ok(started)) => empty && folder > started + GRANULARITY,
        _ => false,
    }
}

/// Tells the holder of a lock to end until it has. One that a killed command has just started hears nothing at first; one
/// that is `lost` never will.
fn end<R: std::fmt::Debug>(
    lock: &Path,
    lost: bool,
    process: &str,
    log: PathBuf,
    tell: impl Fn() -> Result<R, control::Error>,
) -> Result<(), Error> {
    let start = Instant::now();
    let end = start + END_LIMIT;
    let limit = if lost { Duration::ZERO } else { SOCKET_LIMIT };
    loop {
        let last = tell();
        if wait_released(lock, TELL_AGAIN) {
            return Ok(());
        }
        if start.elapsed() > limit
            && matches!(&last, Err(control::Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound)
        {
            // Its socket is gone. Where this cannot be, it is told below that the process is still there.
            drop(lock::end_holder(lock));
        }
        if Instant::now() > end {
            let last = last.map_or_else(|error| error.to_string(), |reply| format!("{reply:?}"));
            let (process, seconds) = (process.into(), END_LIMIT.as_secs());
            return Err(Error::StillThere { process, seconds, last, log });
        }
    }
}

/// Waits until nobody holds a lock.
fn wait_released(path: &Path, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while lock::is_held(path) {
        if Instant::now() > end {
            return false;
        }
        // A lock's release can only be waited for without a limit.
        std::thread::park_timeout(Duration::from_millis(20));
    }
    true
}
