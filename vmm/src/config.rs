//! What one virtual machine consists of: the file that `lab-vmm --config FILE` reads.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One virtual machine. Paths are absolute, or relative to the working directory of `lab-vmm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name for messages.
    pub name: String,
    /// An ELF kernel with a PVH note, or a bzImage (entered at its 64-bit entry point).
    pub kernel: PathBuf,
    /// Initial RAM file systems, laid one after the other, each aligned to 4 bytes.
    #[serde(default)]
    pub initrd: Vec<PathBuf>,
    /// Kernel command line, at most 2047 bytes.
    #[serde(default)]
    pub cmdline: String,
    /// Virtual CPUs, 1 to 32.
    pub cpus: u8,
    /// Whether the guest's CPUs have VMX or SVM, as the host's have.
    #[serde(default)]
    pub nested: bool,
    /// Guest memory in MiB, 32 to 65536.
    pub memory_mib: u64,
    /// Disks in the order in which the guest sees them (vda, vdb, …).
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// The vsock device, if any.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// The console hvc0.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// UNIX socket for control requests (see `control`).
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// File that is locked (flock) while the machine exists: "alive" is "lock held".
    #[serde(default)]
    pub lock: Option<PathBuf>,
    /// Folder of a snapshot: the machine goes on from there, instead of booting the kernel. After a reset it boots.
    #[serde(default)]
    pub restore: Option<PathBuf>,
    /// Whether all memory of that snapshot is made the machine's own at once, instead of being shared with other machines
    /// that go on from there, and read page by page when the guest wants it.
    #[serde(default)]
    pub prefetch: bool,
    /// Whether the machine stands still until the control request `resume`.
    #[serde(default)]
    pub paused: bool,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Its format; never guessed from its content, which the guest writes.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// Size of the sectors that the guest is told of, in bytes: 512, or 4096 if the disk's partition table counts in them.
    #[serde(default = "sector_bytes")]
    pub sector_bytes: u32,
}

fn sector_bytes() -> u32 {
    512
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, with its chain of backing files.
    Qcow2,
}

/// A network card, joined to `lab-net`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// `lab-net`'s SOCK_SEQPACKET socket. The card has no link while nobody listens there, and joins again when
    /// somebody does.
    pub socket: PathBuf,
    /// Port name told to `lab-net` in the hello message: the node's name.
    pub port: String,
    /// MAC address, `52:54:00:aa:bb:cc`.
    pub mac: String,
}

/// The vsock device: connections from the host arrive at `socket` and say `CONNECT port\n`; connections of the
/// guest to port P go to the socket `{socket}_P`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, from 3.
    pub cid: u32,
    /// UNIX stream socket on the host.
    pub socket: PathBuf,
    /// Port where `lab-vmm` itself listens for systemd's `vmm.notify_socket=vsock-stream:2:PORT` messages; what was
    /// last said there is told by the control request `status`.
    #[serde(default)]
    pub notify_port: Option<u32>,
    /// Port where the guest is told the time, every minute (see `clock`).
    #[serde(default)]
    pub clock_port: Option<u32>,
}

/// Where the console's output goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// File that takes all output of hvc0 and of the serial port; it starts over (one predecessor kept as `.1`) at
    /// 8 MiB.
    #[serde(default)]
    pub log: Option<PathBuf>,
    /// UNIX stream socket: whoever connects sees the output and types the input.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Whether the console is this process' own terminal.
    #[serde(default)]
    pub stdio: bool,
}

/// CPUs that a machine may have.
pub const CPUS: std::ops::RangeInclusive<u8> = 1..=32;
/// Memory that a machine may have, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 32..=65536;

impl VmConfig {
    /// Whether such a machine can be; if not, what is wrong. Files and sockets are not looked at.
    pub fn check(&self) -> Result<(), String> {
        if !CPUS.contains(&self.cpus) {
            return Err(format!("{} CPUs: a machine has {} to {}", self.cpus, CPUS.start(), CPUS.end()));
        }
        if !MEMORY_MIB.contains(&self.memory_mib) {
            let (low, high) = (MEMORY_MIB.start(), MEMORY_MIB.end());
            return Err(format!("{} MiB of memory: a machine has {low} to {high}", self.memory_mib));
        }
        if let Some(disk) = self.disks.iter().find(|disk| !matches!(disk.sector_bytes, 512 | 4096)) {
            let (path, bytes) = (disk.path.display(), disk.sector_bytes);
            return Err(format!("sectors of {bytes} bytes on disk {path}: a disk has 512 or 4096"));
        }
        if let Some(vsock) = &self.vsock
            && (vsock.cid < 3 || vsock.cid == u32::MAX)
        {
            return Err(format!("vsock context id {}: a guest's is 3 to {}", vsock.cid, u32::MAX - 1));
        }
        Ok(())
    }
}
