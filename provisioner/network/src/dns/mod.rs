//! The DNS server on the gateway: names of the lab are answered here ([`zone`]), all others by the host's resolvers
//! ([`resolvers`]), to whom questions are passed on as they are: datagrams by [`relay`], streams by [`stream`].

pub mod relay;
pub mod resolvers;
pub mod stream;
pub mod zone;

/// DNS's port.
pub const PORT: u16 = 53;
