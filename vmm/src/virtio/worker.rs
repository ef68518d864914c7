//! The thread that a device works in: it waits for doorbells, back ends and its end, and hands what is ready to
//! the device's [`Handler`]. What a handler cannot go on from, a panic included, becomes DEVICE_NEEDS_RESET.

use std::{
    io,
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    Error, Interrupt,
    queue::{DeviceQueue, Position},
};
use crate::say::say;

/// First token that is not a queue's doorbell: doorbells use the queue's index.
pub(crate) const BACK_END: u64 = 1 << 16;

/// Token of the event that ends the thread.
const STOP: u64 = u64::MAX;

/// Events taken from the kernel at once.
const EVENTS: usize = 32;

/// What a device does in its thread.
pub(crate) trait Handler: Send + 'static {
    /// Registers all that is waited for and does what does not wait for an event.
    fn start(&mut self, poll: &Poll) -> Result<(), Fault>;
    /// Handles one event. Must come back after bounded work, so that the end of the thread is seen.
    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Fault>;
    /// Its queues, in order.
    fn queues(&mut self) -> Vec<&mut DeviceQueue>;
    /// Puts back into the queues what was taken and not finished: the device pauses.
    fn put_back(&mut self) {}
}

/// A thread of a device, whatever its handler is.
pub trait Working {
    /// See [`VirtioDevice::pause`](super::VirtioDevice::pause).
    fn pause(&mut self);
    /// See [`VirtioDevice::resume`](super::VirtioDevice::resume).
    fn resume(&mut self) -> Result<(), Error>;
    /// See [`VirtioDevice::positions`](super::VirtioDevice::positions).
    fn positions(&mut self) -> Vec<Position>;
}

/// Why a device stops working until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The rings of a queue do not hold together.
    #[error("queue {queue}: {source}")]
    Queue {
        /// Index of the queue.
        queue: u16,
        /// What virtio-queue said.
        source: virtio_queue::Error,
    },
    /// A buffer that no driver may send.
    #[error("queue {queue}: the guest sent {what}")]
    Chain {
        /// Index of the queue.
        queue: u16,
        /// What it is.
        what: &'static str,
    },
    /// The host refused what the device cannot do without.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What a thread waits for.
pub(crate) struct Poll(Epoll);

impl Poll {
    /// One that no thread waits with.
    #[cfg(test)]
    pub fn for_tests() -> Self {
        Self(Epoll::new().unwrap())
    }

    /// Starts waiting for `events` of `fd`.
    pub fn add(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, token))
    }

    /// Waits for other events of `fd` from now on. If they are there already, they are reported again.
    pub fn change(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Modify, fd.as_raw_fd(), EpollEvent::new(events, token))
    }

    /// Stops waiting for `fd`, which may not be waited for at all.
    pub fn remove(&self, fd: &impl AsRawFd) {
        // The only errors are "not registered", which is what is wanted.
        let _ = self.0.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
    }
}

/// A device's handler, in its thread or at rest.
pub(crate) struct Worker<H> {
    name: String,
    interrupt: Arc<dyn Interrupt>,
    stop: EventFd,
    state: State<H>,
}

enum State<H> {
    Working(JoinHandle<Resting<H>>),
    Resting(Resting<H>),
    /// The thread could not be started again.
    Lost,
}

/// What a thread leaves behind.
struct Resting<H> {
    handler: H,
    poll: Poll,
    /// It gave up: it goes on only after the guest has reset the device.
    faulted: bool,
}

impl<H: Handler> Worker<H> {
    /// Starts the thread of device `name`.
    pub fn spawn(name: &str, interrupt: Arc<dyn Interrupt>, handler: H) -> Result<Self, Error> {
        let error = |action, source| Error::Io { device: name.to_owned(), action, source };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(|e| error("make an eventfd", e))?;
        let poll = Poll(Epoll::new().map_err(|e| error("make an epoll", e))?);
        poll.add(&stop, EventSet::IN, STOP).map_err(|e| error("wait for events", e))?;
        let mut worker = Self { name: name.to_owned(), interrupt, stop, state: State::Lost };
        worker.start(Resting { handler, poll, faulted: false }, true)?;
        Ok(worker)
    }

    fn start(&mut self, mut resting: Resting<H>, first: bool) -> Result<(), Error> {
        let (device, interrupt) = (self.name.clone(), self.interrupt.clone());
        let body = move || {
            let work = AssertUnwindSafe(|| serve(&mut resting.handler, &resting.poll, first));
            let complaint = match catch_unwind(work) {
                Ok(Ok(())) => None,
                Ok(Err(fault)) => Some(fault.to_string()),
                Err(_) => Some("internal error".to_owned()),
            };
            if let Some(complaint) = complaint {
                complain(&device, format_args!("{complaint}; it stands still until the guest resets it"));
                interrupt.needs_reset();
                resting.faulted = true;
            }
            resting
        };
        let thread = thread::Builder::new().name(self.name.clone()).spawn(body);
        let error = |source| Error::Io { device: self.name.clone(), action: "start its thread", source };
        self.state = State::Working(thread.map_err(error)?);
        Ok(())
    }

    /// The handler, while no thread has it.
    pub fn at_rest(&mut self) -> Option<&mut H> {
        match &mut self.state {
            State::Resting(resting) => Some(&mut resting.handler),
            State::Working(_) | State::Lost => None,
        }
    }

    /// Ends the thread and gives its handler back, with what it holds of its queues: the driver has given them up.
    pub fn stop(mut self) -> Option<H> {
        self.rest();
        match self.state {
            State::Resting(resting) => Some(resting.handler),
            State::Working(_) | State::Lost => None,
        }
    }

    /// Ends the thread. False if there was none.
    fn rest(&mut self) -> bool {
        let thread = match std::mem::replace(&mut self.state, State::Lost) {
            State::Working(thread) => thread,
            other => {
                self.state = other;
                return false;
            }
        };
        // Fails only if the counter is at its end, and then the event is there.
        let _ = self.stop.write(1);
        if let Ok(resting) = thread.join() {
            // Not to be seen by the next thread.
            let _ = self.stop.read();
            self.state = State::Resting(resting);
        }
        true
    }
}

impl<H: Handler> Working for Worker<H> {
    fn pause(&mut self) {
        if self.rest()
            && let Some(handler) = self.at_rest()
        {
            handler.put_back();
        }
    }

    fn resume(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Resting(mut resting) if !resting.faulted => {
                // What was put back has been rung for already.
                resting.handler.queues().iter().for_each(|queue| queue.ring());
                self.start(resting, false)
            }
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    fn positions(&mut self) -> Vec<Position> {
        match &mut self.state {
            State::Resting(resting) if !resting.faulted => {
                resting.handler.queues().iter().map(|queue| queue.position()).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The loop of a device's thread; ends when it is told to.
fn serve(handler: &mut impl Handler, poll: &Poll, first: bool) -> Result<(), Fault> {
    if first {
        handler.start(poll)?;
    }
    let mut events = vec![EpollEvent::default(); EVENTS];
    loop {
        let count = match poll.0.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(Fault::Io { action: "wait for events", source }),
        };
        let ready = events.get(..count).unwrap_or_default();
        // All of them: one that is edge-triggered is told but once.
        for event in ready.iter().filter(|event| event.data() != STOP) {
            handler.ready(event.data(), event.event_set(), poll)?;
        }
        if ready.iter().any(|event| event.data() == STOP) {
            return Ok(());
        }
    }
}

/// Says on standard error what went wrong with a device. A guest can cause such lines, so they end after a hundred.
pub(crate) fn complain(device: &str, what: impl std::fmt::Display) {
    static LEFT: AtomicU32 = AtomicU32::new(100);
    let left = LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    if left.is_ok() {
        say(format_args!("{device}: {what}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Recorder;

    /// Fails or panics when it is rung.
    struct Failing {
        bell: EventFd,
        panic: bool,
    }

    impl Handler for Failing {
        fn queues(&mut self) -> Vec<&mut DeviceQueue> {
            Vec::new()
        }

        fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
            poll.add(&self.bell, EventSet::IN, 0).unwrap();
            Ok(())
        }

        fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Fault> {
            assert!(!self.panic, "a panic on purpose");
            Err(Fault::Chain { queue: 0, what: "nonsense" })
        }
    }

    #[test]
    fn faults_and_panics_become_needs_reset() {
        for panic in [false, true] {
            let interrupt = Arc::new(Recorder::default());
            let bell = EventFd::new(EFD_NONBLOCK).unwrap();
            let ring = bell.try_clone().unwrap();
            let worker = Worker::spawn("test", interrupt.clone(), Failing { bell, panic }).unwrap();
            assert!(!interrupt.told().needs_reset);
            ring.write(1).unwrap();
            interrupt.wait("needs_reset", |told| told.needs_reset);
            assert!(worker.stop().is_some());
        }
    }

    /// Counts how often it was rung.
    struct Counting {
        bell: EventFd,
        rung: Arc<AtomicU32>,
    }

    impl Handler for Counting {
        fn queues(&mut self) -> Vec<&mut DeviceQueue> {
            Vec::new()
        }

        fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
            poll.add(&self.bell, EventSet::IN | EventSet::EDGE_TRIGGERED, 0).unwrap();
            Ok(())
        }

        fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) -> Result<(), Fault> {
            self.rung.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn what_comes_during_a_pause_is_done_after_it() {
        let (bell, rung) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::new(AtomicU32::new(0)));
        let ring = bell.try_clone().unwrap();
        let handler = Counting { bell, rung: rung.clone() };
        let mut worker = Worker::spawn("test", Arc::new(Recorder::default()), handler).unwrap();
        for round in 1..=50 {
            worker.pause();
            worker.pause();
            ring.write(1).unwrap();
            assert_eq!(rung.load(Ordering::SeqCst), round - 1);
            worker.resume().unwrap();
            worker.resume().unwrap();
            // Ends only after all that was rung has been seen.
            worker.pause();
            assert_eq!(rung.load(Ordering::SeqCst), round);
        }
        assert!(worker.stop().is_some());
    }

    #[test]
    fn a_device_that_gave_up_is_not_resumed() {
        let interrupt = Arc::new(Recorder::default());
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        bell.write(1).unwrap();
        let failing = Failing { bell, panic: false };
        let mut worker = Worker::spawn("test", interrupt.clone(), failing).unwrap();
        interrupt.wait("needs_reset", |told| told.needs_reset);
        worker.pause();
        worker.resume().unwrap();
        assert!(matches!(&worker.state, State::Resting(resting) if resting.faulted));
        assert!(worker.stop().is_some());
    }

    #[test]
    fn an_idle_thread_ends() {
        let interrupt = Arc::new(Recorder::default());
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker = Worker::spawn("test", interrupt.clone(), Failing { bell, panic: false }).unwrap();
        assert!(worker.stop().is_some());
        assert!(!interrupt.told().needs_reset);
    }
}
