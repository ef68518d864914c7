//! A guest made of packets, against UNIX sockets: both directions, credit, ends of all kinds, and limits.

mod limits;
mod streams;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use vm_memory::ByteValued;

use super::{
    connection::BUFFER,
    packet::{HEADER, HOST, Header, STREAM, operation},
    *,
};
use crate::virtio::testing::Driver;

const CID: u64 = 3;
const LIMIT: Duration = Duration::from_secs(20);
/// As Linux provides them.
const BUFFER_SIZE: usize = 4096;

fn config(folder: &Path) -> VsockConfig {
    VsockConfig { cid: CID as u32, socket: folder.join("vsock"), notify_port: None, clock_port: None }
}

/// A device and the guest's driver.
struct Guest {
    device: Vsock,
    driver: Driver,
    config: VsockConfig,
    /// What the guest says of its own buffers in every packet.
    room: u32,
    taken: u32,
}

impl Guest {
    fn new(folder: &Path) -> Self {
        let config = config(folder);
        let device = Vsock::new(&config).unwrap();
        let mut guest =
            Self { driver: Driver::new(device.queue_sizes()), device, config, room: 65536, taken: 0 };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.driver = Driver::new(self.device.queue_sizes());
        let features = self.device.features();
        self.device.activate(self.driver.activation(features)).unwrap();
        for _ in 0..64 {
            self.driver.send(0, &[], &[BUFFER_SIZE]);
        }
    }

    /// Sends a packet from port `from` of the guest to port `to` of the host.
    fn send(&mut self, from: u32, to: u32, operation: u16, flags: u32, data: &[u8]) {
        let header = Header {
            source_cid: CID,
            destination_cid: HOST,
            source_port: from,
            destination_port: to,
            length: data.len() as u32,
            kind: STREAM,
            operation,
            flags,
            buffer: self.room,
            forwarded: self.taken,
        };
        let mut readable = vec![header.as_slice()];
        readable.extend(data.chunks(1500));
        self.driver.send(1, &readable, &[]);
        self.driver.wait(1);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut packet = self.driver.wait(0);
        self.driver.send(0, &[], &[BUFFER_SIZE]);
        let data = packet.split_off(HEADER);
        let header = *Header::from_slice(&packet).unwrap();
        assert_eq!({ header.length } as usize, data.len());
        assert_eq!(({ header.source_cid }, { header.destination_cid }), (HOST, CID));
        assert_eq!(
            ({ header.kind }, { header.buffer }),
            (STREAM, if header.buffer == 0 { 0 } else { BUFFER as u32 })
        );
        (header, data)
    }

    /// What the next packet for one of the guest's ports is. The end of another connection may be told twice: that the
    /// far end sends no more, and then that it takes no more.
    fn answer_for(&mut self, port: u32) -> u16 {
        loop {
            let (header, _) = self.receive();
            if header.destination_port == port {
                return header.operation;
            }
            assert_eq!({ header.operation }, operation::SHUTDOWN, "{header:?}");
        }
    }

    fn expect(&mut self, operation: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!({ header.operation }, operation, "{header:?} {}", String::from_utf8_lossy(&data));
        (header, data)
    }

    /// A host that connects to `port`, greeted and answered; returns its stream and its port.
    fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = connect(&self.config);
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(operation::REQUEST);
        assert_eq!({ request.destination_port }, port);
        let host_port = request.source_port;
        self.send(port, host_port, operation::RESPONSE, 0, b"");
        assert_eq!(line(&mut stream), format!("OK {host_port}\n"));
        (stream, host_port)
    }

    /// A guest that connects from `from` to `port`, where `listener` is.
    fn connected_to(&mut self, listener: &UnixListener, from: u32, port: u32) -> UnixStream {
        self.send(from, port, operation::REQUEST, 0, b"");
        self.expect(operation::RESPONSE);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.config.socket.display())).unwrap()
    }
}

fn connect(config: &VsockConfig) -> UnixStream {
    let stream = UnixStream::connect(&config.socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Reads up to a line feed.
fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ i >> 7 ^ i >> 13) as u8).collect()
}
