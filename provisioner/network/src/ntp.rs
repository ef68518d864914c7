//! The time, for who asks the gateway for it (NTP, RFC 5905 §7.3, server mode): the host's own clock. Distributions' time
//! daemons find it by DHCP, and need nothing outside of the lab.

use std::time::{Duration, SystemTime};

/// The server's UDP port.
pub const PORT: u16 = 123;
/// Length of a packet without extensions, in bytes.
const LENGTH: usize = 48;
/// From 1900, where NTP begins to count, to 1970.
const EPOCH_S: u64 = 2_208_988_800;
/// Mode of a client, and of a server.
const CLIENT: u8 = 3;
const SERVER: u8 = 4;
/// How far from a reference clock: the host's clock is kept right by others.
const STRATUM: u8 = 3;
/// How exact the clock is: 2^-20 s.
const PRECISION: u8 = -20i8 as u8;
/// How far the host's clock may be off, in units of 2^-16 s: 10 ms.
const DISPERSION: u32 = 655;

/// The answer to a datagram, at this time; `None` for what is no client's question.
pub fn answer(question: &[u8], now: SystemTime) -> Option<[u8; LENGTH]> {
    let first = *question.first()?;
    let (version, mode) = (first >> 3 & 7, first & 7);
    // When the client sent it; it looks for that in the answer.
    let sent = question.get(40..LENGTH)?;
    if !(1..=4).contains(&version) || mode != CLIENT {
        return None;
    }
    let now = timestamp(now);
    let mut answer = [0; LENGTH];
    let fields: [(usize, &[u8]); 7] = [
        (0, &[version << 3 | SERVER, STRATUM, question.get(2).copied().unwrap_or(6), PRECISION]),
        (8, &DISPERSION.to_be_bytes()),
        // The reference: a clock without a connection to others.
        (12, b"LOCL"),
        (16, &now),
        (24, sent),
        (32, &now),
        (40, &now),
    ];
    for (at, bytes) in fields {
        if let Some(place) = answer.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    Some(answer)
}

/// Seconds since 1900, 32 bits of which are told, and a fraction of 32 bits.
fn timestamp(time: SystemTime) -> [u8; 8] {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since.as_secs().wrapping_add(EPOCH_S) as u32;
    let fraction = ((u64::from(since.subsec_nanos()) << 32) / 1_000_000_000) as u32;
    (u64::from(seconds) << 32 | u64::from(fraction)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_the_time() {
        let mut question = [0; LENGTH];
        question[0] = 4 << 3 | CLIENT;
        question[40..].copy_from_slice(b"question");
        // 2026-11-30 20:00:00.5 UTC.
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_796_068_800_500);
        let told = answer(&question, now).unwrap();
        assert_eq!(
            (told[0], told[1], &told[12..16], &told[24..32]),
            (4 << 3 | SERVER, 3, &b"LOCL"[..], &b"question"[..])
        );
        let seconds = u32::from_be_bytes(told[40..44].try_into().unwrap());
        assert_eq!(u64::from(seconds), 1_796_068_800 + EPOCH_S);
        assert_eq!(told[44..], [0x80, 0, 0, 0]);
        // From 2036 on, the 32 bits begin anew.
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs((1 << 32) - EPOCH_S))[..4], [0; 4]);
    }

    #[test]
    fn what_is_no_question_is_not_answered() {
        let now = SystemTime::now();
        for (first, length) in
            [(4 << 3 | SERVER, 48), (4 << 3 | CLIENT, 47), (CLIENT, 48), (7 << 3 | CLIENT, 48)]
        {
            let mut question = vec![0; length];
            question[0] = first;
            assert_eq!(answer(&question, now), None, "{first:#x}, {length} bytes");
        }
        assert_eq!(answer(&[], now), None);
    }
}
