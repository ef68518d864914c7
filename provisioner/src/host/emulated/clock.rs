//! The emulated machine's wall clock. QEMU's clock chip knows whole seconds, and the kernel reads it once: so the machine
//! asks the real one, by a connection to the supervisor, when it comes up and then every minute.
//!
//! A connection is a question; the answer is the time in nanoseconds since 1970, 8 bytes, little endian.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rustix::time::{ClockId, Timespec, clock_settime};

use super::init::GATEWAY;

/// Time between two questions.
const PERIOD: Duration = Duration::from_secs(60);
/// How long an answer may take; a late one says little.
const LIMIT: Duration = Duration::from_secs(2);
/// What is near enough, in nanoseconds.
const TOLERANCE_NS: u128 = 5_000_000;

/// The supervisor's side.
pub struct Clock(TcpListener);

impl Clock {
    /// Listens at a port of the real machine's loopback.
    pub fn listen() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// That port.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.0.local_addr()?.port())
    }

    /// What to wait for.
    pub fn listener(&self) -> &TcpListener {
        &self.0
    }

    /// Answers who has come: whoever is on this machine knows its time anyway.
    pub fn serve(&self) {
        while let Ok((mut stream, _)) = self.0.accept() {
            // Who has gone has no use for it.
            drop(stream.set_nonblocking(true).and_then(|()| stream.write_all(&now_ns().to_le_bytes())));
        }
    }
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Sets the emulated machine's clock, as its root.
pub fn set(port: u16) -> io::Result<()> {
    let (right, at) = ask((GATEWAY, port))?;
    let right = right.saturating_add(u64::try_from(at.elapsed().as_nanos()).unwrap_or(0));
    if u128::from(right.abs_diff(now_ns())) < TOLERANCE_NS {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: i64::try_from(right / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(right % 1_000_000_000).unwrap_or(0),
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// The real machine's time, and when here it was that.
fn ask(address: (Ipv4Addr, u16)) -> io::Result<(u64, Instant)> {
    let start = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address.into(), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    Ok((u64::from_le_bytes(answer), start + start.elapsed() / 2))
}

/// Keeps it right.
pub fn keep(port: u16) -> ! {
    loop {
        thread::sleep(PERIOD);
        if let Err(error) = set(port) {
            println!("lab-host: the clock: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_that_of_the_other_side() {
        let clock = Clock::listen().unwrap();
        let port = clock.port().unwrap();
        let asked = thread::spawn(move || ask((Ipv4Addr::LOCALHOST, port)));
        let end = Instant::now() + Duration::from_secs(20);
        while !asked.is_finished() {
            assert!(Instant::now() < end, "no answer");
            clock.serve();
            thread::sleep(Duration::from_millis(1));
        }
        let (time, at) = asked.join().unwrap().unwrap();
        assert!(time <= now_ns() && at <= Instant::now());
        drop(clock);
        assert!(ask((Ipv4Addr::LOCALHOST, port)).is_err());
    }
}
