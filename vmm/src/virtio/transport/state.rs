//! What a snapshot keeps of a device on the bus: all that the driver has said, and how far the device has come in its
//! queues. Devices keep nothing else: what they have taken from a queue and not finished they put back when they pause.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{VirtioPci, status};
use crate::{
    pci::msix::VectorState,
    virtio::{common_config::CommonConfig, queue::Position},
};

/// State of one virtio device and its transport.
#[derive(Serialize, Deserialize)]
pub struct TransportState {
    device_id: u16,
    space: Vec<u8>,
    common: CommonConfig,
    vectors: Vec<VectorState>,
    isr: u8,
    generation: u8,
    device_status: u8,
    /// Of each queue, if the device works.
    positions: Vec<Position>,
}

impl VirtioPci {
    /// The state of the paused device.
    pub(super) fn state(&mut self) -> TransportState {
        let shared = &self.shared;
        TransportState {
            device_id: self.device.device_id(),
            space: self.space.bytes().to_vec(),
            common: self.common.clone(),
            vectors: shared.msix.save(),
            isr: shared.isr.load(Ordering::Acquire),
            generation: shared.generation.load(Ordering::Acquire),
            device_status: shared.device_status.load(Ordering::Acquire),
            // One that was restored and has not gone on yet is where it was.
            positions: match &self.restored {
                Some(positions) => positions.clone(),
                None => self.device.positions(),
            },
        }
    }

    /// Become what `state` says; the device works from the next `resume` on.
    pub(super) fn set_state(&mut self, state: &TransportState) -> Result<(), String> {
        let (name, id) = (self.device.name(), self.device.device_id());
        if state.device_id != id {
            return Err(format!("it has virtio device {} where {name}, {id}, should be", state.device_id));
        }
        let common = &state.common;
        let vectors = self.shared.queue_vectors.len() + 1;
        if !common.is_like(&self.common) || state.vectors.len() != vectors || state.space.len() != 256 {
            return Err(format!("its {name} has other features or queues than this lab-vmm's"));
        }
        self.space.write(0, &state.space);
        self.common = common.clone();
        let shared = &self.shared;
        shared.isr.store(state.isr, Ordering::Release);
        shared.generation.store(state.generation, Ordering::Release);
        shared.config_vector.store(common.config_vector(), Ordering::Release);
        for (slot, queue) in shared.queue_vectors.iter().zip(&common.queues) {
            slot.store(queue.vector, Ordering::Release);
        }
        let control = self.space.get(self.msix_control.into()).map_or(0, u16::from_le_bytes);
        shared.msix.restore(&state.vectors, control);
        let mut device_status = state.device_status;
        if common.status & status::DRIVER_OK != 0 && device_status & status::NEEDS_RESET == 0 {
            if state.positions.len() == common.queues.len() {
                self.restored = Some(state.positions.clone());
            } else {
                // It had given up.
                device_status |= status::NEEDS_RESET;
            }
        }
        shared.device_status.store(device_status, Ordering::Release);
        Ok(())
    }
}
