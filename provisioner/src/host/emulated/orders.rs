//! Orders to the first process of the emulated machine, for what only it may do: one line a connection to its socket,
//! answered with `done` once it is.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::Ipv4Addr,
    os::unix::{
        fs::{PermissionsExt, chown},
        net::{UnixListener, UnixStream},
    },
    thread,
    time::Duration,
};

use super::netlink::Netlink;

const SOCKET: &str = "/run/lab-host/orders";
/// How long an order may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Takes orders from a user, in a thread of its own. `stop` is what ends the machine.
pub fn listen(uid: u32, gid: u32, stop: fn() -> !) -> io::Result<()> {
    let socket = UnixListener::bind(SOCKET)?;
    fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600))?;
    chown(SOCKET, Some(uid), Some(gid))?;
    thread::Builder::new().name("orders".into()).spawn(move || obey(&socket, stop)).map(drop)
}

/// Asks the machine's first process for something, and waits until it is done:
/// - `refresh`: look again at files of the real machine that nobody has open in here;
/// - `address A.B.C.D`: one more address to listen on;
/// - `stop`: end the machine, once this has been answered.
pub fn order(order: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(SOCKET)?;
    stream.set_read_timeout(Some(LIMIT))?;
    writeln!(stream, "{order}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer == "done\n" { Ok(()) } else { Err(io::Error::other(answer.trim().to_string())) }
}

fn obey(orders: &UnixListener, stop: fn() -> !) {
    for stream in orders.incoming() {
        let mut line = String::new();
        let Ok(mut stream) = stream else { continue };
        let read = stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .and_then(|()| BufReader::new((&stream).take(256)).read_line(&mut line));
        let answer = match read.and_then(|_| carry_out(line.trim())) {
            Ok(()) => "done".into(),
            Err(error) => error.to_string(),
        };
        // Who does not wait for the answer does not need it.
        let _ = writeln!(stream, "{answer}");
        if line.trim() == "stop" {
            stop();
        }
    }
}

fn carry_out(order: &str) -> io::Result<()> {
    match order.split_once(' ') {
        None if order == "stop" => Ok(()),
        // Names and attributes are remembered for a day, which spares nearly all questions to the real machine; this
        // forgets those that are not in use.
        None if order == "refresh" => fs::write("/proc/sys/vm/drop_caches", "2"),
        Some(("address", address)) => {
            let address: Ipv4Addr = address.parse().map_err(io::Error::other)?;
            let netlink = Netlink::open()?;
            netlink.add_address(netlink.index("lo")?, address, 32)
        }
        _ => Err(io::Error::other(format!("unknown order {order:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_orders_are_refused() {
        carry_out("stop").unwrap();
        for order in ["", "reboot", "address", "address nowhere", "refresh now"] {
            assert!(carry_out(order).is_err(), "{order:?}");
        }
    }
}
