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

use super::{Error, Interrupt};

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

/// A running device thread, and the handler that it gives back.
pub(crate) struct Worker<H> {
    stop: EventFd,
    thread: JoinHandle<H>,
}

impl<H: Handler> Worker<H> {
    /// Starts the thread of device `name`.
    pub fn spawn(name: &str, interrupt: Arc<dyn Interrupt>, mut handler: H) -> Result<Self, Error> {
        let error = |action, source| Error::Io { device: name.to_owned(), action, source };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(|e| error("make an eventfd", e))?;
        let poll = Poll(Epoll::new().map_err(|e| error("make an epoll", e))?);
        poll.add(&stop, EventSet::IN, STOP).map_err(|e| error("wait for events", e))?;
        let device = name.to_owned();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let complaint = match catch_unwind(AssertUnwindSafe(|| serve(&mut handler, &poll))) {
                    Ok(Ok(())) => None,
                    Ok(Err(fault)) => Some(fault.to_string()),
                    Err(_) => Some("internal error".to_owned()),
                };
                if let Some(complaint) = complaint {
                    complain(&device, format_args!("{complaint}; it stands still until the guest resets it"));
                    interrupt.needs_reset();
                }
                handler
            })
            .map_err(|e| error("start its thread", e))?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread and gives its handler back.
    pub fn stop(self) -> Option<H> {
        // Fails only if the counter is at its end, and then the event is there.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

/// The loop of a device's thread; ends when it is told to.
fn serve(handler: &mut impl Handler, poll: &Poll) -> Result<(), Fault> {
    handler.start(poll)?;
    let mut events = vec![EpollEvent::default(); EVENTS];
    loop {
        let count = match poll.0.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(Fault::Io { action: "wait for events", source }),
        };
        let ready = events.get(..count).unwrap_or_default();
        if ready.iter().any(|event| event.data() == STOP) {
            return Ok(());
        }
        for event in ready {
            handler.ready(event.data(), event.event_set(), poll)?;
        }
    }
}

/// Says on standard error what went wrong with a device. A guest can cause such lines, so they end after a hundred.
pub(crate) fn complain(device: &str, what: impl std::fmt::Display) {
    static LEFT: AtomicU32 = AtomicU32::new(100);
    let left = LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    if left.is_ok() {
        eprintln!("lab-vmm: {device}: {what}");
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

    #[test]
    fn an_idle_thread_ends() {
        let interrupt = Arc::new(Recorder::default());
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker = Worker::spawn("test", interrupt.clone(), Failing { bell, panic: false }).unwrap();
        assert!(worker.stop().is_some());
        assert!(!interrupt.told().needs_reset);
    }
}
