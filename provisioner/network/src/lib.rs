//! lab-net: one process is one lab's network.
//!
//! Cards of nodes connect to a UNIX socket and exchange Ethernet frames through a learning switch ([`switch`],
//! [`port`]); one station of it is the [`gateway`], which gives out addresses ([`dhcp`]), names ([`dns`]) and the time ([`ntp`]), lets
//! nodes reach the world outside ([`nat`]), keeps the packages that they fetch ([`cache`]) and lets the host reach nodes
//! ([`forward`]). [`network`] is the event loop of
//! all that, [`control`] and [`config`] are what others say to it. Nothing here needs a privilege.

pub mod cache;
pub mod config;
pub mod control;
pub mod control_server;
pub mod dhcp;
pub mod dns;
pub mod forward;
pub mod fragment;
pub mod frame;
pub mod gateway;
pub mod hosts;
pub mod icmp_error;
pub mod lan;
pub mod listen;
pub mod log;
pub mod nat;
pub mod neighbor;
pub mod network;
pub mod ntp;
pub mod poller;
pub mod port;
pub mod switch;
