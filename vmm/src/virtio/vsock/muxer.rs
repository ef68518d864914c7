//! Sorts packets of the guest to connections, and gives the guest what connections have to say.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hasher, RandomState},
    io::Write,
    os::unix::net::UnixStream,
};

use vm_memory::{ByteValued, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    connection::{Connection, Peer, Phase},
    host::{Greeting, Host, read_greeting},
    packet::{HEADER, HOST, Header, STREAM, operation},
};
use crate::virtio::{
    queue::{DeviceQueue, Given},
    segments::Segments,
    worker::{BACK_END, Fault, Handler, Poll},
};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const EVENT: u64 = 2;
const LISTENER: u64 = BACK_END;
/// First token of a stream.
const STREAMS: u64 = BACK_END + 1;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, the only event there is.
const TRANSPORT_RESET: u32 = 0;

/// Most connections at once, those included that have not said where to yet.
const MAX_CONNECTIONS: usize = 1024;
/// Most answers to packets without a connection that wait for the guest to take them.
const MAX_REPLIES: usize = 256;
/// First port of ours for connections from the host.
const FIRST_PORT: u32 = 1 << 30;

/// A restored guest may still have sockets for ports from before, and refuse these: it is hardly met with one of them again.
fn first_port(restored: bool) -> u32 {
    let random = RandomState::new().build_hasher().finish() as u32;
    if restored { FIRST_PORT + random % FIRST_PORT } else { FIRST_PORT }
}

const STREAM_EVENTS: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

/// The handler of the device's thread.
pub(super) struct Muxer {
    memory: GuestMemoryMmap,
    receive: DeviceQueue,
    transmit: DeviceQueue,
    event: DeviceQueue,
    pub host: Host,
    /// Connected, but have not said where to.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    /// Those that the guest knows of, by port of the host and port of the guest.
    by_ports: HashMap<(u32, u32), u64>,
    /// Connections with something to say.
    news: VecDeque<u64>,
    /// Answers to packets that belong to no connection.
    replies: VecDeque<Header>,
    /// Whether more connections of the host may be waiting.
    acceptable: bool,
    /// Whether packets of the guest wait until it has taken answers.
    stalled: bool,
    next_token: u64,
    next_port: u32,
    /// Whether the guest believes in connections from before a snapshot, and has to be told that they are gone.
    restored: bool,
}

impl Muxer {
    pub fn new(given: Given<3>, host: Host) -> Self {
        let [receive, transmit, event] = given.queues;
        Self {
            memory: given.memory,
            receive,
            transmit,
            event,
            host,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            news: VecDeque::new(),
            replies: VecDeque::new(),
            acceptable: true,
            stalled: false,
            next_token: STREAMS,
            next_port: first_port(given.restored),
            restored: given.restored,
        }
    }

    /// Takes packets from the guest, while their answers find a place.
    fn take_packets(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.transmit.silence(&self.memory)?;
        let memory = self.memory.clone();
        for _ in 0..self.transmit.size() {
            if self.replies.len() >= MAX_REPLIES {
                self.stalled = true;
                return self.transmit.tell(&self.memory);
            }
            let Some(mut chain) = self.transmit.pop(&memory)? else {
                self.transmit.tell(&self.memory)?;
                if self.transmit.listen(&self.memory)? {
                    self.transmit.silence(&self.memory)?;
                    continue;
                }
                return Ok(());
            };
            if let Some(header) = chain.readable.take_object::<Header>()
                && header.length as usize <= chain.readable.len()
            {
                let data = chain.readable.take(header.length as usize);
                self.take_packet(&header, data, poll);
            }
            self.transmit.push(&self.memory, chain.head, 0)?;
        }
        self.transmit.tell(&self.memory)?;
        self.transmit.ring();
        Ok(())
    }

    fn take_packet(&mut self, header: &Header, data: Segments<'_>, poll: &Poll) {
        if header.source_cid != self.host.cid {
            return;
        }
        let ports = (header.destination_port, header.source_port);
        let known = self.by_ports.get(&ports).copied();
        if header.destination_cid != HOST || header.kind != STREAM {
            self.refuse(header);
        } else if header.operation == operation::REQUEST {
            // A second one for the same ports: the guest has lost the first.
            if let Some(token) = known {
                self.remove(token);
            }
            self.open_for_guest(header, poll);
        } else if let Some(token) = known {
            self.take_packet_of(token, header, data);
            self.settle(token, poll);
        } else {
            self.refuse(header);
        }
    }

    /// A packet of a connection that is known.
    fn take_packet_of(&mut self, token: u64, header: &Header, data: Segments<'_>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        connection.credit(header);
        match header.operation {
            operation::RESPONSE if connection.phase == Phase::Asked => {
                let ok = format!("OK {}\n", connection.host_port);
                // The stream is empty, so this fits, or the other end is gone.
                if let Peer::Stream(stream) = &mut connection.peer
                    && stream.write_all(ok.as_bytes()).is_ok()
                {
                    connection.phase = Phase::Open;
                } else {
                    connection.reset();
                }
            }
            operation::RESET => {
                connection.forget();
                self.by_ports.remove(&(header.destination_port, header.source_port));
            }
            operation::SHUTDOWN => connection.end(header.flags),
            operation::DATA => connection.receive(data),
            operation::CREDIT_UPDATE => {}
            operation::CREDIT_REQUEST => connection.ask_credit(),
            _ => connection.reset(),
        }
    }

    /// Answers that there is no such connection.
    fn refuse(&mut self, header: &Header) {
        if header.operation != operation::RESET {
            self.replies.push_back(Header::reset_for(header));
        }
    }

    /// The guest connects.
    fn open_for_guest(&mut self, header: &Header, poll: &Poll) {
        let (host_port, guest_port) = (header.destination_port, header.source_port);
        let stream = if self.make_place() { self.host.connect(host_port).ok() } else { None };
        let token = self.new_token();
        match stream {
            Some(stream) if poll.add(&stream, STREAM_EVENTS, token).is_ok() => {
                let mut connection =
                    Connection::new(self.host.cid, host_port, guest_port, stream, Phase::Answering);
                connection.credit(header);
                self.insert(token, connection);
            }
            _ => self.refuse(header),
        }
    }

    /// Takes connections of the host.
    fn accept(&mut self, poll: &Poll) {
        while self.acceptable && self.make_place() {
            let Ok(stream) = self.host.accept() else {
                self.acceptable = false;
                return;
            };
            let token = self.new_token();
            if poll.add(&stream, STREAM_EVENTS, token).is_ok() {
                self.greeting.insert(token, stream);
            }
        }
    }

    /// A connection of the host may have said where to.
    fn greet(&mut self, token: u64, events: EventSet) {
        let Some(stream) = self.greeting.get_mut(&token) else { return };
        let port = if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // It has given up.
            Greeting::Bad
        } else {
            read_greeting(stream)
        };
        let port = match port {
            Greeting::Incomplete => return,
            Greeting::Bad => {
                self.greeting.remove(&token);
                self.acceptable = true;
                return;
            }
            Greeting::Port(port) => port,
        };
        let Some(stream) = self.greeting.remove(&token) else { return };
        // There are far fewer connections than ports.
        while self.by_ports.contains_key(&(self.next_port, port)) {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        }
        let host_port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        let connection = Connection::new(self.host.cid, host_port, port, stream, Phase::Asking);
        self.insert(token, connection);
    }

    /// Something happened to a stream.
    fn stream_event(&mut self, token: u64, events: EventSet, poll: &Poll) {
        if self.greeting.contains_key(&token) {
            self.greet(token, events);
            return;
        }
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if events.contains(EventSet::OUT) {
            connection.flush();
        }
        connection.readable = true;
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hang_up();
        }
        self.settle(token, poll);
    }

    /// Draws the conclusions from what happened to a connection.
    fn settle(&mut self, token: u64, poll: &Poll) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.phase == Phase::Over {
            self.remove(token);
            return;
        }
        if let Peer::Stream(stream) = &connection.peer
            && connection.has_outgoing() != connection.waits_for_room
        {
            connection.waits_for_room = connection.has_outgoing();
            let room = if connection.waits_for_room { EventSet::OUT } else { EventSet::empty() };
            if poll.change(stream, STREAM_EVENTS | room, token).is_err() {
                connection.reset();
            }
        }
        if connection.has_news() && !connection.queued {
            connection.queued = true;
            self.news.push_back(token);
        }
    }

    /// Gives the guest what there is to say, as long as it has buffers.
    fn give_packets(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.receive.silence(&self.memory)?;
        let memory = self.memory.clone();
        for _ in 0..self.receive.size() {
            if self.replies.is_empty() && self.news.is_empty() {
                return self.receive.tell(&self.memory);
            }
            let Some(mut chain) = self.receive.pop(&memory)? else {
                self.receive.tell(&self.memory)?;
                if self.receive.listen(&self.memory)? {
                    self.receive.silence(&self.memory)?;
                    continue;
                }
                // Goes on when the bell rings.
                return Ok(());
            };
            if chain.writable.len() <= HEADER {
                return Err(self.receive.fault("a receive buffer no longer than a header"));
            }
            let buffer = chain.writable.take(usize::MAX);
            match self.next_packet(buffer, poll) {
                Some(length) => self.receive.push(&self.memory, chain.head, length)?,
                None => self.receive.undo_pop(),
            }
        }
        self.receive.tell(&self.memory)?;
        self.receive.ring();
        Ok(())
    }

    /// Writes the next packet into `buffer` and returns its length, if there is one.
    fn next_packet(&mut self, buffer: Segments<'_>, poll: &Poll) -> Option<usize> {
        if let Some(reply) = self.replies.pop_front() {
            buffer.write(reply.as_slice());
            return Some(HEADER);
        }
        while let Some(token) = self.news.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.queued = false;
            let told = connection.tell(buffer.clone());
            self.settle(token, poll);
            if told.is_some() {
                return told;
            }
        }
        None
    }

    /// Whether there is room for one more connection; forgets one that only waits for the guest's last word.
    fn make_place(&mut self) -> bool {
        if self.connections.len() + self.greeting.len() < MAX_CONNECTIONS {
            return true;
        }
        let closing = self.connections.iter().find(|(_, connection)| connection.is_closing());
        let Some(token) = closing.map(|(token, _)| *token) else { return false };
        self.remove(token);
        true
    }

    fn insert(&mut self, token: u64, mut connection: Connection) {
        connection.queued = true;
        self.news.push_back(token);
        self.by_ports.insert((connection.host_port, connection.guest_port), token);
        self.connections.insert(token, connection);
    }

    fn remove(&mut self, token: u64) {
        // One that waits may find a place, or a descriptor, now.
        self.acceptable = true;
        if let Some(connection) = self.connections.remove(&token) {
            let ports = (connection.host_port, connection.guest_port);
            if self.by_ports.get(&ports) == Some(&token) {
                self.by_ports.remove(&ports);
            }
        }
    }

    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Tells the guest that all its connections are gone (virtio 1.3 §5.10.6.8). Its buffer for that is there since the
    /// driver started.
    fn tell_of_reset(&mut self) -> Result<(), Fault> {
        let memory = self.memory.clone();
        if let Some(chain) = self.event.pop(&memory)? {
            let length = chain.writable.write(&TRANSPORT_RESET.to_le_bytes());
            self.event.push(&memory, chain.head, length)?;
            self.event.tell(&memory)?;
        }
        Ok(())
    }

    /// Both directions, and connections that found no place before.
    fn work(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.take_packets(poll)?;
        self.accept(poll);
        self.give_packets(poll)?;
        if self.stalled && self.replies.len() < MAX_REPLIES {
            self.stalled = false;
            self.transmit.ring();
        }
        Ok(())
    }
}

impl Handler for Muxer {
    fn start(&mut self, poll: &Poll) -> Result<(), Fault> {
        self.receive.start(&self.memory, poll)?;
        self.transmit.start(&self.memory, poll)?;
        self.event.start(&self.memory, poll)?;
        poll.add(&self.host.listener, EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER)
            .map_err(|source| Fault::Io { action: "wait for connections", source })?;
        if std::mem::take(&mut self.restored) {
            self.tell_of_reset()?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, events: EventSet, poll: &Poll) -> Result<(), Fault> {
        match token {
            // The guest gives buffers; they are taken when there is something to tell.
            EVENT => return Ok(()),
            RECEIVE | TRANSMIT => {}
            LISTENER => self.acceptable = true,
            _ => self.stream_event(token, events, poll),
        }
        self.work(poll)
    }

    fn queues(&mut self) -> Vec<&mut DeviceQueue> {
        vec![&mut self.receive, &mut self.transmit, &mut self.event]
    }
}
