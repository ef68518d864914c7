//! Forwarded ports of the real machine. Each goes to the same address and port in the emulated one, where `lab-net`
//! listens: QEMU's user network sends there whatever address it is told, 127.0.0.1 included.

use std::{
    fs,
    io::{Read, Seek, Write},
    net::{Ipv4Addr, TcpListener, UdpSocket},
    time::Duration,
};

use lab_net::config::{Forward, Protocol};
use rustix::fs::{FlockOperation, flock};

use super::{
    Error,
    files::{Files, lock_within},
    init,
    qmp::{self, Qmp},
    request::Request,
};
use crate::json_file;

/// How long another command may take to set forwards.
const LIMIT: Duration = Duration::from_secs(60);

/// A forward that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Protocol.
    pub protocol: Protocol,
    /// Address of the real machine.
    pub bind: Ipv4Addr,
    /// Port there.
    pub port: u16,
    /// Address and port in the emulated machine.
    pub guest: (Ipv4Addr, u16),
}

impl Open {
    fn wanted(forward: &Forward) -> Self {
        // What listens on all addresses in there can be reached by any; a packet must have a single one.
        let guest = if forward.bind.is_unspecified() { Ipv4Addr::LOCALHOST } else { forward.bind };
        Self {
            protocol: forward.protocol,
            bind: forward.bind,
            port: forward.host_port,
            guest: (guest, forward.host_port),
        }
    }

    fn name(&self) -> String {
        format!("{}:{}:{}", word(self.protocol), self.bind, self.port)
    }
}

fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// What QEMU's `info usernet` lists as forwards, in lines such as
/// `TCP[HOST_FORWARD]  9  127.0.0.1 22022  10.0.2.15 22  0 0`.
pub fn parse(list: &str) -> Vec<Open> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let protocol = match words.next()? {
            "TCP[HOST_FORWARD]" => Protocol::Tcp,
            "UDP[HOST_FORWARD]" => Protocol::Udp,
            _ => return None,
        };
        words.next()?;
        let address = |word: &str| if word == "*" { Some(Ipv4Addr::UNSPECIFIED) } else { word.parse().ok() };
        Some(Open {
            protocol,
            bind: address(words.next()?)?,
            port: words.next()?.parse().ok()?,
            guest: (address(words.next()?)?, words.next()?.parse().ok()?),
        })
    };
    list.lines().filter_map(line).collect()
}

/// What has to be closed and opened to get from `open` to `wanted`. The way in for commands is left alone.
fn difference(open: &[Open], wanted: &[Open]) -> (Vec<Open>, Vec<Open>) {
    let closing = open.iter().filter(|it| it.guest != (init::ADDRESS, 22) && !wanted.contains(it));
    let mut opening: Vec<Open> = Vec::new();
    for it in wanted {
        if !open.contains(it) && !opening.contains(it) {
            opening.push(it.clone());
        }
    }
    (closing.cloned().collect(), opening)
}

/// Opens forwards that a command is about to use, beside those that are open; on an error none of them.
pub fn claim(files: &Files, wanted: &[Forward]) -> Result<(), Error> {
    if wanted.is_empty() {
        return Ok(());
    }
    let _lock = lock(files)?;
    let mut qmp = Qmp::connect(&files.qmp_socket())?;
    let open = parse(&qmp.monitor("info usernet")?);
    let wanted: Vec<Open> = wanted.iter().map(Open::wanted).collect();
    let (_, opening) = difference(&open, &wanted);
    for (index, forward) in opening.iter().enumerate() {
        if let Err(error) = add(&mut qmp, forward) {
            for done in opening.iter().take(index) {
                qmp.monitor(&format!("hostfwd_remove net {}", done.name()))?;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Makes the open forwards those of the running labs (`reported`, by the report numbered `sequence`) and of commands that
/// are under way. A report that is older than the one last applied is dropped.
pub fn sync(files: &Files, sequence: u64, reported: &[Forward]) -> Result<(), Error> {
    let mut lock = lock(files)?;
    let mut text = String::new();
    let unreadable =
        |source| Error::Io { what: format!("cannot use {}", files.forwards_lock().display()), source };
    lock.read_to_string(&mut text).map_err(unreadable)?;
    if text.trim().parse::<u64>().is_ok_and(|applied| applied >= sequence) {
        return Ok(());
    }
    let mut wanted: Vec<Open> = reported.iter().map(Open::wanted).collect();
    wanted.extend(claims(files).iter().map(Open::wanted));
    let mut qmp = Qmp::connect(&files.qmp_socket())?;
    let (closing, opening) = difference(&parse(&qmp.monitor("info usernet")?), &wanted);
    for forward in &closing {
        qmp.monitor(&format!("hostfwd_remove net {}", forward.name()))?;
    }
    let mut first_error = None;
    for forward in &opening {
        if let Err(error) = add(&mut qmp, forward) {
            first_error.get_or_insert(error);
        }
    }
    lock.set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| write!(lock, "{sequence}"))
        .map_err(unreadable)?;
    first_error.map_or(Ok(()), Err)
}

fn lock(files: &Files) -> Result<fs::File, Error> {
    let path = files.forwards_lock();
    lock_within(&path, false, LIMIT, || ())
        .map_err(|source| Error::Io { what: format!("cannot lock {}", path.display()), source })?
        .ok_or(Error::Busy("sets forwards of the emulated host"))
}

fn add(qmp: &mut Qmp, forward: &Open) -> Result<(), Error> {
    let (address, port) = forward.guest;
    let said = qmp.monitor(&format!("hostfwd_add net {}-{address}:{port}", forward.name()))?;
    if said.is_empty() {
        return Ok(());
    }
    // QEMU does not say why: ask the kernel.
    let at = (forward.bind, forward.port);
    let why = match forward.protocol {
        Protocol::Tcp => TcpListener::bind(at).map(drop),
        Protocol::Udp => UdpSocket::bind(at).map(drop),
    };
    Err(match why {
        Err(source) => {
            Error::Port { protocol: word(forward.protocol), bind: forward.bind, port: forward.port, source }
        }
        Ok(()) => {
            qmp::Error::Refused { command: format!("hostfwd_add {}", forward.name()), reason: said }.into()
        }
    })
}

/// The forwards that commands under way have claimed: those whose request is locked.
fn claims(files: &Files) -> Vec<Forward> {
    let requests = fs::read_dir(files.requests()).into_iter().flatten().flatten().map(|entry| entry.path());
    let held = requests.filter(|path| {
        fs::File::open(path).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
    });
    held.filter_map(|path| json_file::read::<Request>(&path).ok().flatten())
        .flat_map(|request| request.forwards)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
        TCP[HOST_FORWARD]  31       127.0.0.1 18080       127.0.0.1 18080     0     0\r\n  \
        TCP[ESTABLISHED]   29       127.0.0.1 22022       10.0.2.15    22     0     0\r\n  \
        TCP[HOST_FORWARD]   9       127.0.0.1 22022       10.0.2.15    22     0     0\r\n  \
        UDP[HOST_FORWARD]  32               *  5353       127.0.0.1  5353     0     0\r\n";

    fn forward(bind: [u8; 4], port: u16, protocol: Protocol) -> Forward {
        Forward {
            bind: bind.into(),
            host_port: port,
            guest_ip: [192, 168, 1, 10].into(),
            guest_port: 80,
            protocol,
        }
    }

    #[test]
    fn qemu_s_list_is_understood() {
        let open = parse(LIST);
        assert_eq!(open.len(), 3);
        assert_eq!(open[0], Open::wanted(&forward([127, 0, 0, 1], 18080, Protocol::Tcp)));
        assert_eq!(open[1].guest, (init::ADDRESS, 22));
        assert_eq!(open[2], Open::wanted(&forward([0, 0, 0, 0], 5353, Protocol::Udp)));
        assert_eq!(parse("rubbish\n TCP[HOST_FORWARD] x y z\n"), []);
    }

    #[test]
    fn only_what_differs_is_changed() {
        let open = parse(LIST);
        let keep = Open::wanted(&forward([127, 0, 0, 1], 18080, Protocol::Tcp));
        let new = Open::wanted(&forward([192, 168, 7, 1], 18080, Protocol::Tcp));
        let (closing, opening) = difference(&open, &[keep.clone(), new.clone(), new.clone()]);
        assert_eq!(closing, [open[2].clone()], "the way in for commands stays");
        assert_eq!(opening, std::slice::from_ref(&new));
        assert_eq!(new.guest, ([192, 168, 7, 1].into(), 18080));
        let (closing, opening) = difference(&open, &open);
        assert!(closing.is_empty() && opening.is_empty());
    }
}
