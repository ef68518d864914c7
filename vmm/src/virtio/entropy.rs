//! Entropy device (virtio 1.3 §5.4): the host kernel's random numbers.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Error, VirtioDevice, Working,
    queue::{COMMON_FEATURES, DeviceQueue, Given},
    worker::{Fault, Handler, Poll, Worker},
};

const NAME: &str = "rng";
const QUEUE_SIZES: [u16; 1] = [64];

/// Most that one buffer is filled with, in bytes; Linux asks for 64 or so.
const MAX_FILL: usize = 64 << 10;

/// The entropy device.
#[derive(Default)]
pub struct Entropy {
    worker: Option<Worker<EntropyHandler>>,
}

impl Entropy {
    /// Makes the device. It holds nothing of the host's.
    pub fn new() -> Result<Self, Error> {
        Ok(Self::default())
    }
}

impl VirtioDevice for Entropy {
    fn device_id(&self) -> u16 {
        4
    }

    fn name(&self) -> &str {
        NAME
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.reset();
        let given = Given::new(NAME, activation)?;
        let interrupt = given.interrupt.clone();
        self.worker = Some(Worker::spawn(NAME, interrupt, EntropyHandler::new(given))?);
        Ok(())
    }

    fn worker(&mut self) -> Option<&mut dyn Working> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Working)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

struct EntropyHandler {
    memory: GuestMemoryMmap,
    queue: DeviceQueue,
}

impl EntropyHandler {
    fn new(given: Given<1>) -> Self {
        let [queue] = given.queues;
        Self { memory: given.memory, queue }
    }

    fn work(&mut self) -> Result<(), Fault> {
        // As much as fits into the ring at once, then other events are looked at.
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                self.queue.tell(&self.memory)?;
                if self.queue.listen(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            let mut random = vec![0; chain.writable.len().min(MAX_FILL)];
            let mut filled = 0;
            while let Some(rest) = random.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                filled += getrandom(rest, GetRandomFlags::empty())
                    .map_err(|e| Fault::Io { action: "get random numbers", source: e.into() })?;
            }
            let written = chain.writable.write(&random);
            self.queue.push(&self.memory, chain.head, written)?;
        }
        self.queue.tell(&self.memory)?;
        self.queue.ring();
        Ok(())
    }
}

impl Handler for EntropyHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.queue.start(&self.memory, poll)
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Fault> {
        self.work()
    }

    fn queues(&mut self) -> Vec<&mut DeviceQueue> {
        vec![&mut self.queue]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Driver, hostile};

    #[test]
    fn buffers_are_filled() {
        let mut device = Entropy::new().unwrap();
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features())).unwrap();
        // More buffers than the ring has entries, of several pieces.
        for _ in 0..200 {
            driver.send(0, &[], &[40, 24]);
            let written = driver.wait(0);
            assert_eq!(written.len(), 64);
            assert!(written.iter().any(|byte| *byte != 0), "all zero: {written:?}");
        }
        device.reset();
    }

    #[test]
    fn a_reset_device_starts_again() {
        let mut device = Entropy::new().unwrap();
        for _ in 0..3 {
            let mut driver = Driver::new(device.queue_sizes());
            device.activate(driver.activation(device.features())).unwrap();
            driver.send(0, &[], &[16]);
            assert_eq!(driver.wait(0).len(), 16);
            device.reset();
            device.reset();
        }
    }

    proptest! {
        #[test]
        fn hostile_queues_do_not_matter(case in hostile(1)) {
            let mut driver = Driver::new(&QUEUE_SIZES);
            let given = Given::new(NAME, driver.activation(case.features())).unwrap();
            driver.attack(&case, EntropyHandler::new(given));
        }
    }
}
