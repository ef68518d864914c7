//! The connection to `lab-net`: joined, or tried again every quarter of a second.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
    sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size},
};
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{SOCKET, TIMER};
use crate::{
    config::NetConfig,
    virtio::worker::{Poll, complain},
};

/// Time between two tries to join.
const RETRY: Duration = Duration::from_millis(250);
/// Bytes under way to `lab-net`; the kernel gives what it allows (net.core.wmem_max), and doubles it.
const SOCKET_BUFFER: usize = 2 << 20;
/// Version of the frame protocol, in the first packet.
const PROTOCOL: u32 = 1;

/// Packets moved by one system call.
pub(super) const BATCH: usize = 32;

/// The socket, when there is one.
pub(super) struct Link {
    path: PathBuf,
    port: String,
    socket: Option<OwnedFd>,
    timer: Option<TimerFd>,
    /// Whether something may be there to be received; edge-triggered.
    pub readable: bool,
    /// Whether something may be sent.
    pub writable: bool,
    /// Whether the socket is waited on for room to send.
    waits_for_room: bool,
    /// What kept the card from joining the last time, so that it is said once.
    complaint: Option<io::ErrorKind>,
}

impl Link {
    pub fn new(config: &NetConfig) -> Self {
        Self {
            path: config.socket.clone(),
            port: config.port.clone(),
            socket: None,
            timer: None,
            readable: false,
            writable: false,
            waits_for_room: false,
            complaint: None,
        }
    }

    /// Joins if `lab-net` is there, and goes on trying if it is not.
    pub fn start(&mut self, poll: &Poll) -> io::Result<()> {
        let timer = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        poll.add(&timer, EventSet::IN, TIMER)?;
        self.timer = Some(timer);
        if self.socket.is_none() {
            self.join(poll);
        }
        Ok(())
    }

    /// Whether the card is joined.
    pub fn is_up(&self) -> bool {
        self.socket.is_some()
    }

    /// Takes in what epoll said of the socket.
    pub fn note(&mut self, events: EventSet) {
        if self.socket.is_none() {
            return;
        }
        self.readable = true;
        if events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) {
            self.writable = true;
        }
    }

    /// The timer fired. To set it, or to stop it, also takes back that it fired.
    pub fn retry(&mut self, poll: &Poll) {
        if self.socket.is_none() {
            self.join(poll);
        } else if let Some(timer) = &mut self.timer {
            let _ = timer.clear();
        }
    }

    fn join(&mut self, poll: &Poll) {
        match self.connect(poll) {
            Ok(socket) => {
                self.socket = Some(socket);
                self.readable = true;
                self.writable = true;
                self.waits_for_room = false;
                if let Some(timer) = &mut self.timer {
                    let _ = timer.clear();
                }
            }
            Err(e) => {
                let absent =
                    [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused, io::ErrorKind::WouldBlock];
                if !absent.contains(&e.kind()) && self.complaint.replace(e.kind()) != Some(e.kind()) {
                    complain(
                        &format!("network card {}", self.port),
                        format_args!("cannot join {}: {e}", self.path.display()),
                    );
                }
                if let Some(timer) = &mut self.timer {
                    // Fails only for times that are out of range.
                    let _ = timer.reset(RETRY, None);
                }
            }
        }
    }

    fn connect(&self, poll: &Poll) -> io::Result<OwnedFd> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        set_socket_send_buffer_size(&socket, SOCKET_BUFFER)?;
        set_socket_recv_buffer_size(&socket, SOCKET_BUFFER)?;
        connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
        // lab-net's `Hello`.
        let hello = serde_json::json!({ "v": PROTOCOL, "port": self.port }).to_string();
        send(&socket, hello.as_bytes(), SendFlags::NOSIGNAL)?;
        poll.add(&socket, EventSet::IN | EventSet::EDGE_TRIGGERED, SOCKET)?;
        Ok(socket)
    }

    /// Leaves, because `lab-net` is gone.
    fn leave(&mut self) {
        // Closing it takes it out of the epoll.
        self.socket = None;
        self.readable = false;
        self.writable = false;
        if let Some(timer) = &mut self.timer {
            let _ = timer.reset(RETRY, None);
        }
    }

    /// Sends packets, each of which is a list of pieces of guest memory. Returns how many were sent: fewer if there
    /// is no room (then room is waited for, see [`Self::writable`]), none without a link. A packet that can't be sent
    /// at all counts as sent.
    pub fn send(&mut self, packets: &[&[libc::iovec]], poll: &Poll) -> usize {
        let Some(socket) = &self.socket else { return 0 };
        let mut messages: Vec<libc::mmsghdr> =
            packets.iter().take(BATCH).map(|pieces| message(pieces)).collect();
        // SAFETY: the messages point to lists of pieces of guest memory that live as long as this call.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        if let Ok(sent) = usize::try_from(sent) {
            return sent;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => 0,
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                self.writable = false;
                let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
                if !self.waits_for_room && poll.change(socket, events, SOCKET).is_ok() {
                    self.waits_for_room = true;
                }
                0
            }
            // Larger than the socket's buffer, or pieces that the kernel can't read: a frame is lost.
            Some(libc::EMSGSIZE | libc::EFAULT) => 1,
            _ => {
                self.leave();
                0
            }
        }
    }

    /// No more need to hear of room.
    pub fn has_room(&mut self, poll: &Poll) {
        if self.waits_for_room
            && let Some(socket) = &self.socket
            && poll.change(socket, EventSet::IN | EventSet::EDGE_TRIGGERED, SOCKET).is_ok()
        {
            self.waits_for_room = false;
        }
    }

    /// Receives a packet into each list of pieces, as long as there are some. Returns their lengths; the length of a
    /// packet that was longer than its pieces is zero. Nothing more is there if there are fewer than asked for.
    pub fn receive(&mut self, packets: &[&[libc::iovec]]) -> Vec<usize> {
        let Some(socket) = &self.socket else { return Vec::new() };
        let mut messages: Vec<libc::mmsghdr> =
            packets.iter().take(BATCH).map(|pieces| message(pieces)).collect();
        // SAFETY: the messages point to lists of pieces of guest memory that live as long as this call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => self.readable = false,
                _ => self.leave(),
            }
            return Vec::new();
        };
        let received = messages.get(..count).unwrap_or_default();
        if count < messages.len() {
            self.readable = false;
        }
        let lengths: Vec<usize> = received
            .iter()
            .map(|message| {
                let whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
                if whole { message.msg_len as usize } else { 0 }
            })
            .collect();
        // The end of the connection looks like an empty packet, which nobody sends.
        if received.iter().any(|message| message.msg_len == 0) {
            self.leave();
        }
        lengths
    }

    /// Length of the packet that is next, if there is one.
    pub fn next_length(&mut self) -> Option<usize> {
        let socket = self.socket.as_ref()?;
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        match recv(socket, &mut [0u8; 1], flags) {
            Ok((_, 0)) => self.leave(),
            Ok((_, length)) => return Some(length),
            Err(rustix::io::Errno::AGAIN) => self.readable = false,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => self.leave(),
        }
        None
    }

    /// Throws away the packet that is next.
    pub fn skip(&mut self) {
        if let Some(socket) = &self.socket {
            // If it fails, the next call to receive tells why.
            let _ = recv(socket, &mut [0u8; 1], RecvFlags::DONTWAIT);
        }
    }
}

fn message(pieces: &[libc::iovec]) -> libc::mmsghdr {
    // SAFETY: all zeroes are a valid, empty message.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_hdr.msg_iovlen = pieces.len();
    message
}
