//! What the host's kernel has been told about packets of a socket: ICMP errors of hosts and routers on their way, and who
//! sent them (ip(7), IP_RECVERR).

use std::{
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd},
};

use rustix::io::Errno;

/// Room for what is quoted of a packet, in bytes: the header of an echo request is all that is looked at.
const QUOTE: usize = 64;
/// Room for the control messages in bytes: one of 32 bytes, and those that others may have asked for.
const CONTROL: usize = 256;
/// Length of a control message's header (cmsg(3), as the kernel writes it on 64-bit machines) in bytes.
const CMSG_HEADER: usize = 16;
/// Entries of another origin that are passed over in search of an ICMP error.
const MAX_OTHERS: usize = 64;

/// An ICMP error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// ICMP type (RFC 792).
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// MTU of the next hop in bytes, where a packet was too long (RFC 1191).
    pub mtu: u16,
    /// Who sent it.
    pub offender: Ipv4Addr,
    /// What is quoted of the packet: what the socket had sent, without the headers that the kernel made.
    pub about: Vec<u8>,
}

/// Have errors queued, or no longer.
pub fn listen(socket: impl AsFd, on: bool) -> Result<(), Errno> {
    let value = libc::c_int::from(on);
    // SAFETY: setsockopt(2) with an option whose value is an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_RECVERR,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Take the next ICMP error from a socket's queue.
pub fn next(socket: impl AsFd) -> Option<Report> {
    for _ in 0..MAX_OTHERS {
        let (about, control) = receive(&socket).ok()?;
        if let Some(report) = parse(&control, about) {
            return Some(report);
        }
    }
    None
}

/// Take one entry: what it is about, and its control messages.
fn receive(socket: &impl AsFd) -> Result<(Vec<u8>, Vec<u8>), Errno> {
    let mut about = vec![0; QUOTE];
    let mut control = vec![0; CONTROL];
    let mut vector = libc::iovec { iov_base: about.as_mut_ptr().cast(), iov_len: about.len() };
    // SAFETY: all of it are numbers and pointers, of which 0 is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    // SAFETY: recvmsg(2) with buffers that live through the call, and their lengths.
    let got = unsafe {
        libc::recvmsg(
            socket.as_fd().as_raw_fd(),
            &raw mut message,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    let Ok(got) = usize::try_from(got) else { return Err(last_error()) };
    about.truncate(got);
    control.truncate(message.msg_controllen as usize);
    Ok((about, control))
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Find the ICMP error in control messages: a `sock_extended_err` and the `sockaddr_in` of its sender behind it.
fn parse(mut control: &[u8], about: Vec<u8>) -> Option<Report> {
    loop {
        let [len, level_and_type] = [control.get(..8)?, control.get(8..CMSG_HEADER)?];
        let len = usize::try_from(u64::from_ne_bytes(len.try_into().ok()?)).ok()?;
        let data = control.get(CMSG_HEADER..len)?;
        let wanted = [libc::IPPROTO_IP.to_ne_bytes(), libc::IP_RECVERR.to_ne_bytes()].concat();
        if level_and_type == wanted {
            let &[_, _, _, _, origin, kind, code, _, ..] = data else { return None };
            let info = u32::from_ne_bytes(data.get(8..12)?.try_into().ok()?);
            let family = u16::from_ne_bytes(data.get(16..18)?.try_into().ok()?);
            let offender: [u8; 4] = data.get(20..24)?.try_into().ok()?;
            let known = origin == libc::SO_EE_ORIGIN_ICMP && family == libc::AF_INET as u16;
            let mtu = u16::try_from(info).unwrap_or(u16::MAX);
            return known.then(|| Report { kind, code, mtu, offender: offender.into(), about });
        }
        control = control.get(len.checked_next_multiple_of(8)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_closed_port_is_told_with_who_said_so() {
        let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        listen(&socket, true).unwrap();
        assert_eq!(next(&socket), None);
        socket.connect(closed).unwrap();
        socket.send(b"hello?").unwrap();
        assert!(socket.recv(&mut [0; 10]).is_err());
        let report =
            Report { kind: 3, code: 3, mtu: 0, offender: Ipv4Addr::LOCALHOST, about: b"hello?".to_vec() };
        assert_eq!(next(&socket), Some(report));
        assert_eq!(next(&socket), None);
    }

    proptest! {
        #[test]
        fn random_control_messages_never_panic(
            len in 0..64u64,
            rest in proptest::collection::vec(any::<u8>(), 0..80)
        ) {
            let mut bytes = len.to_ne_bytes().to_vec();
            bytes.extend(rest);
            let _ = parse(&bytes, Vec::new());
        }
    }
}
