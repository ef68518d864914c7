//! What one lab's network consists of: the file that `lab-net --config FILE` reads.

use std::{net::Ipv4Addr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// One lab's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// The lab's name, for messages.
    pub lab: String,
    /// Network address of the subnet.
    pub subnet: Ipv4Addr,
    /// Length of its prefix in bits, 8 to 29.
    pub prefix: u8,
    /// The gateway's own address: router, DHCP and DNS server.
    pub gateway: Ipv4Addr,
    /// SOCK_SEQPACKET socket for the cards of nodes. A card first sends [`Hello`] as one JSON packet; every other
    /// packet is one frame behind its 12-byte virtio-net header (virtio 1.3 §5.1.6), both ways.
    pub socket: PathBuf,
    /// UNIX stream socket for control requests (see `control`).
    pub control: PathBuf,
    /// File that is locked (flock) while the network exists: "alive" is "lock held".
    pub lock: PathBuf,
    /// Nodes, with their fixed addresses.
    pub hosts: Vec<Host>,
    /// Folder for the packages that nodes fetch through the gateway's cache (see `cache`); without one there is no cache.
    #[serde(default)]
    pub cache: Option<PathBuf>,
    /// Port forwards from the host.
    #[serde(default)]
    pub forwards: Vec<Forward>,
}

/// First packet of a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the frame protocol: 1.
    pub v: u32,
    /// Port name: the node's name. A newer connection of the same name replaces the older one.
    pub port: String,
}

/// A node of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The name that DHCP gives and DNS answers (as `NAME` and `NAME.LAB.lab`).
    pub name: String,
    /// MAC address, `52:54:00:aa:bb:cc`.
    pub mac: String,
    /// Address that DHCP gives to that MAC.
    pub ip: Ipv4Addr,
}

/// A port of the host that leads into the lab.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Address of the host to listen on.
    pub bind: Ipv4Addr,
    /// Port of the host.
    pub host_port: u16,
    /// Address in the lab.
    pub guest_ip: Ipv4Addr,
    /// Port there.
    pub guest_port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// Transport protocol of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}
