//! Virtio: the devices and what they share. The transport that puts them on PCI is `transport`, beside them.
//!
//! Each device works in a thread of its own, which waits (epoll) for its doorbells, its back end and its stop event;
//! nothing of a device runs in a vCPU thread except reads and writes of its configuration space.

pub mod block;
mod capabilities;
pub mod common_config;
pub mod console;
pub mod counters;
pub mod entropy;
pub mod net;
mod queue;
mod segments;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
mod worker;

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use queue::Position;
pub use worker::Working;

/// Why a device could not be made, activated or reset.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused what the device needs.
    #[error("{device}: cannot {action}: {source}")]
    Io {
        /// The device, as the user knows it: "disk /path/x.qcow2", "network card master".
        device: String,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// Anything else, in a sentence that names the device.
    #[error("{0}")]
    Device(String),
}

/// Interrupts of one device. Implemented by the transport (MSI-X), and by a recorder in tests.
pub trait Interrupt: Send + Sync {
    /// Tell the driver that queue `queue` has used buffers (virtio 1.3 §2.7.7); the device has already asked
    /// `Queue::needs_notification`.
    fn signal_queue(&self, queue: u16);
    /// Tell the driver that the configuration changed (virtio 1.3 §2.3).
    fn signal_config(&self);
    /// Set DEVICE_NEEDS_RESET (virtio 1.3 §2.1.2) and tell the driver: a queue holds what no driver may send.
    fn needs_reset(&self);
}

/// What a device is given when the driver sets DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Negotiated feature bits.
    pub features: u64,
    /// The device's queues in order, each with its doorbell (ioeventfd). A queue that the driver did not enable is
    /// there too, not ready: its doorbell never rings.
    pub queues: Vec<(Queue, EventFd)>,
    /// Its interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// Whether the driver knows the device already, from before a snapshot.
    pub restored: bool,
}

/// A virtio device behind any transport.
pub trait VirtioDevice: Send {
    /// Virtio device id (virtio 1.3 §5): 1 network, 2 block, 3 console, 4 entropy, 19 socket.
    fn device_id(&self) -> u16;
    /// Name for messages and thread names, at most 15 bytes: "disk0", "net0", "vsock".
    fn name(&self) -> &str;
    /// Largest size of each queue; the number of queues is the slice's length.
    fn queue_sizes(&self) -> &[u16];
    /// Offered feature bits, VERSION_1 and RING_EVENT_IDX included.
    fn features(&self) -> u64;
    /// Read configuration space; bytes past its end read as zero. Runs in a vCPU thread: must not block.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Write configuration space; most devices ignore it. Runs in a vCPU thread: must not block.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Start working: spawn the device's thread. Called again after `reset`.
    fn activate(&mut self, activation: Activation) -> Result<(), Error>;
    /// Its thread, while it is activated.
    fn worker(&mut self) -> Option<&mut dyn Working>;
    /// Finish the request under way and stand still until [`Self::resume`]; no CPU runs meanwhile. Harmless if the
    /// device was never activated or is paused already.
    fn pause(&mut self) {
        if let Some(worker) = self.worker() {
            worker.pause();
        }
    }
    /// Go on with what has come in since [`Self::pause`].
    fn resume(&mut self) -> Result<(), Error> {
        self.worker().map_or(Ok(()), |worker| worker.resume())
    }
    /// Leave in its files what a snapshot does not hold; the device is paused.
    fn write_out(&mut self) -> Result<(), Error> {
        Ok(())
    }
    /// How far the paused device has come in each of its queues; nothing if it does not work.
    fn positions(&mut self) -> Vec<Position> {
        self.worker().map_or_else(Vec::new, |worker| worker.positions())
    }
    /// Stop working and forget the driver: the thread has ended, with requests under way completed or dropped, when
    /// this returns. Must be quick (a vCPU waits) and harmless if the device was never activated. Also called at the
    /// machine's end: a disk has written and closed everything when it returns.
    fn reset(&mut self);
}
