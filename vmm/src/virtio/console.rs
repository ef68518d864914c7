//! Console device (virtio 1.3 §5.3): one port, the guest's hvc0.

use std::{
    io::{self, Write},
    os::fd::OwnedFd,
};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, Error, VirtioDevice, Working,
    queue::{COMMON_FEATURES, DeviceQueue, Given, read_config},
    segments::Segments,
    worker::{BACK_END, Fault, Handler, Poll, Worker},
};

const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: u64 = 0;
const INPUT: u64 = BACK_END;

/// Bytes moved at once.
const CHUNK: usize = 4096;

/// The console.
pub struct Console {
    name: String,
    /// What the handler needs, while no thread has it.
    ends: Option<Ends>,
    worker: Option<Worker<ConsoleHandler>>,
}

/// Both ends on the host.
struct Ends {
    input: OwnedFd,
    output: Box<dyn Write + Send>,
}

impl Console {
    /// Makes the console of what is typed, `input`, and where the guest's output goes. `input` is read only while
    /// the guest has room for it; a file that cannot be waited for (such as /dev/null) types nothing. A slow `output`
    /// makes the guest wait, so it should drop what it cannot take; its errors are ignored.
    pub fn new(name: &str, input: OwnedFd, output: Box<dyn Write + Send>) -> Result<Self, Error> {
        Ok(Self { name: name.to_owned(), ends: Some(Ends { input, output }), worker: None })
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        3
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.reset();
        let given = Given::new(&self.name, activation)?;
        let interrupt = given.interrupt.clone();
        let ends = self
            .ends
            .take()
            .ok_or_else(|| Error::Device(format!("{}: lost when its thread did not start", self.name)))?;
        self.worker = Some(Worker::spawn(&self.name, interrupt, ConsoleHandler::new(given, ends))?);
        Ok(())
    }

    fn worker(&mut self) -> Option<&mut dyn Working> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Working)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.ends = worker.stop().map(|handler| handler.ends);
        }
    }
}

struct ConsoleHandler {
    memory: GuestMemoryMmap,
    receive: DeviceQueue,
    transmit: DeviceQueue,
    ends: Ends,
    /// Whether input may be there: edge-triggered, so that it costs nothing while the guest has no room.
    readable: bool,
}

impl ConsoleHandler {
    fn new(given: Given<2>, ends: Ends) -> Self {
        let [receive, transmit] = given.queues;
        Self { memory: given.memory, receive, transmit, ends, readable: false }
    }

    /// Host to guest.
    fn type_in(&mut self, poll: &Poll) -> Result<(), Fault> {
        for _ in 0..self.receive.size() {
            if !self.readable {
                break;
            }
            let Some(mut chain) = self.receive.pop(&self.memory)? else {
                if self.receive.listen(&self.memory)? {
                    continue;
                }
                break;
            };
            if chain.writable.is_empty() {
                return Err(self.receive.fault("a receive buffer of no bytes"));
            }
            match read_some(&self.ends.input, &chain.writable.take(CHUNK)) {
                Ok(0) => {
                    poll.remove(&self.ends.input);
                    self.readable = false;
                    self.receive.undo_pop();
                }
                Ok(count) => self.receive.push(&self.memory, chain.head, count)?,
                Err(e) => {
                    self.receive.undo_pop();
                    match e.kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => self.readable = false,
                        // A terminal that hung up.
                        _ => {
                            poll.remove(&self.ends.input);
                            self.readable = false;
                        }
                    }
                }
            }
            // A blocking descriptor must not be read again before it is known to hold something.
            if self.readable && !has_input(&self.ends.input) {
                self.readable = false;
            }
        }
        self.receive.tell(&self.memory)?;
        if self.readable && self.receive.listen(&self.memory)? {
            self.receive.ring();
        }
        Ok(())
    }

    /// Guest to host.
    fn print(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; CHUNK];
        for _ in 0..self.transmit.size() {
            let Some(mut chain) = self.transmit.pop(&self.memory)? else {
                let _ = self.ends.output.flush();
                self.transmit.tell(&self.memory)?;
                if self.transmit.listen(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            // More than a megabyte in one buffer is no text.
            let mut left = chain.readable.take(1 << 20);
            while !left.is_empty() {
                let count = left.take(CHUNK).read(&mut buffer);
                let _ = self.ends.output.write_all(buffer.get(..count).unwrap_or_default());
            }
            self.transmit.push(&self.memory, chain.head, 0)?;
            // Linux spins until its output is taken.
            self.transmit.tell(&self.memory)?;
        }
        let _ = self.ends.output.flush();
        self.transmit.ring();
        Ok(())
    }
}

impl Handler for ConsoleHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.receive.start(&self.memory, poll)?;
        self.transmit.start(&self.memory, poll)?;
        match poll.add(&self.ends.input, EventSet::IN | EventSet::EDGE_TRIGGERED, INPUT) {
            // Not something that can be waited for: a regular file or /dev/null.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()),
            other => other.map_err(|source| Fault::Io { action: "wait for input", source }),
        }
    }

    fn ready(&mut self, token: u64, _events: EventSet, poll: &Poll) -> Result<(), Fault> {
        match token {
            RECEIVE => self.type_in(poll),
            INPUT => {
                // Somebody else may have read it by now, and the descriptor may be a blocking one.
                self.readable = has_input(&self.ends.input);
                self.type_in(poll)
            }
            _ => self.print(),
        }
    }

    fn queues(&mut self) -> Vec<&mut DeviceQueue> {
        vec![&mut self.receive, &mut self.transmit]
    }
}

/// Whether `fd` can be read (or has ended) now.
fn has_input(fd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// One read into guest memory.
fn read_some(fd: &OwnedFd, to: &Segments) -> io::Result<usize> {
    let mut buffer = [0; CHUNK];
    let room = buffer.get_mut(..to.len().min(CHUNK)).unwrap_or_default();
    let count = rustix::io::read(fd, &mut *room)?;
    Ok(to.write(room.get(..count).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        sync::mpsc::{Sender, channel},
    };

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Driver, hostile};

    /// Output that a test can wait for.
    struct Output(Sender<Vec<u8>>);

    impl Write for Output {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.send(data.to_vec()).map_err(io::Error::other)?;
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn text_goes_both_ways_and_survives_a_reset() {
        let (sender, printed) = channel();
        let (keyboard, input) = UnixStream::pair().unwrap();
        let mut device = Console::new("console", input.into(), Box::new(Output(sender))).unwrap();
        for round in 0..3 {
            let mut driver = Driver::new(device.queue_sizes());
            device.activate(driver.activation(device.features())).unwrap();
            let long = vec![b'x'; 3 * CHUNK + 7];
            driver.send(1, &[b"login: ", &long], &[]);
            assert!(driver.wait(1).is_empty());
            let mut text = Vec::new();
            while text.len() < long.len() + 7 {
                text.extend(printed.recv_timeout(std::time::Duration::from_secs(20)).unwrap());
            }
            assert_eq!(text, [b"login: ".as_slice(), &long].concat());

            // Typed before there is room, and more than one buffer holds.
            let typed: Vec<u8> = (0..100u8).map(|i| i ^ round).collect();
            (&keyboard).write_all(&typed).unwrap();
            let mut seen = Vec::new();
            while seen.len() < typed.len() {
                driver.send(0, &[], &[16]);
                seen.extend(driver.wait(0));
            }
            assert_eq!(seen, typed);
            device.reset();
        }
    }

    #[test]
    fn a_closed_keyboard_and_a_broken_output_do_not_matter() {
        let (sender, printed) = channel();
        drop(printed);
        let (keyboard, input) = UnixStream::pair().unwrap();
        drop(keyboard);
        let mut device = Console::new("console", input.into(), Box::new(Output(sender))).unwrap();
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features())).unwrap();
        driver.send(0, &[], &[16]);
        for _ in 0..200 {
            driver.send(1, &[b"still here"], &[]);
            driver.wait(1);
        }
        assert!(driver.used(0).is_none());
        device.reset();
    }

    #[test]
    fn input_that_cannot_be_waited_for_types_nothing() {
        let input = std::fs::File::open("/dev/null").unwrap();
        let mut device = Console::new("console", input.into(), Box::new(io::sink())).unwrap();
        let mut driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features())).unwrap();
        driver.send(1, &[b"hello"], &[]);
        driver.wait(1);
        assert!(!driver.interrupt.told().needs_reset);
        device.reset();
    }

    proptest! {
        #[test]
        fn hostile_queues_do_not_matter(case in hostile(2)) {
            let mut driver = Driver::new(&QUEUE_SIZES);
            let (keyboard, input) = UnixStream::pair().unwrap();
            (&keyboard).write_all(b"typed").unwrap();
            let ends = Ends { input: input.into(), output: Box::new(io::sink()) };
            let given = Given::new("console", driver.activation(case.features())).unwrap();
            driver.attack(&case, ConsoleHandler::new(given, ends));
        }
    }
}
