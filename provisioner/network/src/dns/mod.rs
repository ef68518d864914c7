//! The DNS server on the gateway: names of the lab are answered here ([`zone`]), all others by the host's resolvers
//! ([`resolvers`]), to whom questions are passed on as they are: datagrams by [`relay`], streams by [`stream`].

pub mod relay;
pub mod resolvers;
pub mod search;
pub mod stream;
pub mod zone;

/// DNS's port.
pub const PORT: u16 = 53;

/// Whether a resolver's answer says that it has none: SERVFAIL, NOTIMP or REFUSED. Another may have one; the C library asks
/// it, too.
fn is_refusal(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|flags| matches!(flags & 0x0f, 2 | 4 | 5))
}
