//! The control protocol of `lab-net`: one JSON object a line in each direction, answered in order.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::config::{Forward, Host};

/// Version of the protocol; a request with another one is refused.
pub const VERSION: u32 = 1;

/// A request line, such as `{"v":1,"do":"status"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub v: u32,
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// How the network is: answered with [`Reply::Status`].
    Status,
    /// Replace the lab's nodes; leases and names of those that stay are untouched.
    SetHosts {
        /// All nodes, from now on.
        hosts: Vec<Host>,
    },
    /// Open one more forward. An address in use is an error.
    AddForward {
        /// The forward.
        forward: Forward,
    },
    /// Close a forward; connections through it live on.
    RemoveForward {
        /// The forward.
        forward: Forward,
    },
    /// Connect from the gateway to a TCP port in the lab. After [`Reply::Done`] this connection carries that
    /// stream's bytes and nothing else.
    Dial {
        /// Address in the lab.
        ip: Ipv4Addr,
        /// TCP port.
        port: u16,
    },
    /// End the process.
    Stop,
}

/// A reply line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done; nothing to tell.
    Done,
    /// Answer to [`Action::Status`].
    Status(Status),
    /// Refused or failed, and why.
    Error(String),
}

/// How a network is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The lab's name.
    pub lab: String,
    /// Process id of the `lab-net`.
    pub pid: u32,
    /// Ports with a card joined to them.
    pub ports: Vec<Port>,
    /// Open forwards.
    pub forwards: Vec<Forward>,
    /// TCP, UDP and ICMP flows through the gateway.
    pub flows: u32,
}

/// A switch port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Port name: the node's name.
    pub name: String,
    /// The address leased by DHCP to the card there, if it has asked.
    pub leased: Option<Ipv4Addr>,
    /// Frames and bytes from the card.
    pub received: [u64; 2],
    /// Frames and bytes to the card.
    pub sent: [u64; 2],
    /// Frames for the card that were dropped because it did not read.
    pub dropped: u64,
}
