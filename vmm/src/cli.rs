//! The command line of `lab-vmm`: a configuration file, or flags that say the same by hand.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use clap::Parser;

use crate::{
    config::{ConsoleConfig, DiskConfig, DiskFormat, NetConfig, VmConfig, VsockConfig},
    restart,
};

/// Largest configuration file, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// Runs one virtual machine. Power off ends it with status 0; a reset starts the guest anew.
#[derive(Debug, Parser)]
#[command(name = "lab-vmm", version)]
pub struct Cli {
    /// Configuration file (JSON); the other flags are for machines made by hand
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "name", "kernel", "initrd", "cmdline", "cpus", "memory", "disk", "net", "vsock", "console_log",
        "console_socket", "stdio", "control", "lock", "restore", "prefetch", "paused",
    ])]
    config: Option<PathBuf>,
    /// Name of the machine, for messages
    #[arg(long, default_value = "vm")]
    name: String,
    /// Kernel: ELF with a PVH entry point, or bzImage
    #[arg(long, value_name = "FILE", required_unless_present_any = ["config", "config_fd"])]
    kernel: Option<PathBuf>,
    /// Initial RAM file system; several are laid one after the other
    #[arg(long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Kernel command line
    #[arg(long, default_value = "console=hvc0", allow_hyphen_values = true)]
    cmdline: String,
    /// Virtual CPUs
    #[arg(long, value_name = "1..32", default_value_t = 1)]
    cpus: u8,
    /// The guest can run virtual machines of its own
    #[arg(long)]
    nested: bool,
    /// Memory: MiB, or with a unit, as in 2GiB
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = parse_memory)]
    memory: u64,
    /// Disk; the format is raw unless it is said to be qcow2
    #[arg(long, value_name = "PATH[,format=raw|qcow2][,ro]", value_parser = parse_disk)]
    disk: Vec<DiskConfig>,
    /// Network card, joined to a lab-net
    #[arg(long, value_name = "socket=PATH,port=NAME,mac=MAC", value_parser = parse_net)]
    net: Vec<NetConfig>,
    /// Vsock device
    #[arg(long, value_name = "cid=N,socket=PATH[,notify=PORT]", value_parser = parse_vsock)]
    vsock: Option<VsockConfig>,
    /// File for the console's output
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
    /// UNIX socket for the console
    #[arg(long, value_name = "PATH")]
    console_socket: Option<PathBuf>,
    /// This terminal is the console
    #[arg(long)]
    stdio: bool,
    /// UNIX socket for control requests
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// File that is locked while the machine exists
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Go on from the snapshot in this folder, instead of booting; the other flags describe the same machine
    #[arg(long, value_name = "FOLDER")]
    restore: Option<PathBuf>,
    /// Read all memory of the snapshot at once, instead of sharing it
    #[arg(long, requires = "restore")]
    prefetch: bool,
    /// Stand still until the control request "resume"
    #[arg(long)]
    paused: bool,
    /// Of a process that follows itself after a reset: the descriptor of its configuration
    #[arg(long, hide = true, conflicts_with = "config")]
    config_fd: Option<RawFd>,
    /// Of a process that follows itself after a reset: the descriptor of its lock
    #[arg(long, hide = true)]
    pub lock_fd: Option<RawFd>,
    /// Of a process that follows itself after a reset: how many resets came right after starting, in a row
    #[arg(long, hide = true, default_value_t = 0)]
    pub quick_resets: u32,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The file is not a configuration.
    #[error("the configuration {path} is wrong: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong where.
        source: serde_json::Error,
    },
}

impl Cli {
    /// The machine that was asked for.
    pub fn machine(&self) -> Result<VmConfig, Error> {
        match (&self.config, self.config_fd) {
            (Some(path), _) => read(path, File::open(path)),
            (None, Some(fd)) => {
                read("(of the machine that resets)".as_ref(), restart::inherit(fd).map(File::from))
            }
            (None, None) => Ok(VmConfig {
                name: self.name.clone(),
                kernel: self.kernel.clone().unwrap_or_default(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
                cpus: self.cpus,
                nested: self.nested,
                memory_mib: self.memory,
                disks: self.disk.clone(),
                nets: self.net.clone(),
                vsock: self.vsock.clone(),
                console: ConsoleConfig {
                    log: self.console_log.clone(),
                    socket: self.console_socket.clone(),
                    stdio: self.stdio,
                },
                control: self.control.clone(),
                lock: self.lock.clone(),
                restore: self.restore.clone(),
                prefetch: self.prefetch,
                paused: self.paused,
            }),
        }
    }
}

fn read(path: &Path, file: io::Result<File>) -> Result<VmConfig, Error> {
    let mut text = String::new();
    file.and_then(|file| file.take(CONFIG_MAX).read_to_string(&mut text))
        .map_err(|source| Error::Read { path: path.into(), source })?;
    serde_json::from_str(&text).map_err(|source| Error::Parse { path: path.into(), source })
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let factor = match unit {
        "" | "M" | "MiB" => 1,
        "G" | "GiB" => 1024,
        _ => return Err(format!("the unit {unit} is not known: use MiB or GiB")),
    };
    let number: u64 = digits.parse().map_err(|_| "a number of MiB, or as in 2GiB".to_string())?;
    number.checked_mul(factor).ok_or_else(|| "too much".into())
}

/// `key=value` pairs, each key one of `keys`.
fn pairs<'a, const N: usize>(text: &'a str, keys: [&str; N]) -> Result<[Option<&'a str>; N], String> {
    let mut values = [None; N];
    for pair in text.split(',') {
        let known = format!("one of {}", keys.join("=, ") + "=");
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("`{pair}` is not {known}"))?;
        let slot = keys.iter().position(|k| *k == key).and_then(|index| values.get_mut(index));
        *slot.ok_or_else(|| format!("`{key}=` is not {known}"))? = Some(value);
    }
    Ok(values)
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("a path is needed")?;
    let mut disk =
        DiskConfig { path: path.into(), format: DiskFormat::Raw, read_only: false, sector_bytes: 512 };
    for part in parts {
        match part {
            "format=raw" => disk.format = DiskFormat::Raw,
            "format=qcow2" => disk.format = DiskFormat::Qcow2,
            "ro" => disk.read_only = true,
            _ => return Err(format!("`{part}` is not one of format=raw, format=qcow2, ro")),
        }
    }
    Ok(disk)
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    let [socket, port, mac] = pairs(text, ["socket", "port", "mac"])?;
    Ok(NetConfig {
        socket: socket.ok_or("socket= is missing")?.into(),
        port: port.ok_or("port= is missing")?.into(),
        mac: mac.ok_or("mac= is missing")?.into(),
    })
}

fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let [cid, socket, notify] = pairs(text, ["cid", "socket", "notify"])?;
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is not a number"));
    Ok(VsockConfig {
        cid: number(cid.ok_or("cid= is missing")?)?,
        socket: socket.ok_or("socket= is missing")?.into(),
        notify_port: notify.map(number).transpose()?,
        clock_port: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_what_a_file_says() {
        let cli = Cli::parse_from([
            "lab-vmm",
            "--kernel",
            "k",
            "--memory",
            "2GiB",
            "--disk",
            "a.qcow2,format=qcow2,ro",
            "--disk",
            "b",
            "--net",
            "socket=/n,port=w1,mac=52:54:00:00:00:01",
            "--vsock",
            "cid=3,socket=/v,notify=7",
            "--cpus",
            "4",
        ]);
        let config = cli.machine().unwrap();
        assert_eq!((config.memory_mib, config.cpus), (2048, 4));
        assert_eq!(config.disks[0].format, DiskFormat::Qcow2);
        assert!(config.disks[0].read_only && !config.disks[1].read_only);
        assert_eq!(config.vsock.as_ref().unwrap().notify_port, Some(7));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_vec(&config).unwrap()).unwrap();
        let again = Cli::parse_from(["lab-vmm", "--config", file.path().to_str().unwrap()]);
        assert_eq!(again.machine().unwrap(), config);
    }

    #[test]
    fn wrong_flags_are_explained() {
        for (flags, says) in [
            (vec!["--disk", "a,rw"], "format=qcow2"),
            (vec!["--net", "socket=a"], "port= is missing"),
            (vec!["--net", "sock=a"], "socket="),
            (vec!["--vsock", "cid=x,socket=a"], "not a number"),
            (vec!["--memory", "2TB"], "MiB or GiB"),
            (vec!["--config", "c"], "cannot be used with"),
        ] {
            let args = [vec!["lab-vmm", "--kernel", "k"], flags].concat();
            let error = Cli::try_parse_from(args).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(Cli::try_parse_from(["lab-vmm"]).is_err());
    }

    #[test]
    fn a_wrong_file_is_explained() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"name":"x","kernel":"k","cpus":1,"memory_mib":64,"disc":[]}"#)
            .unwrap();
        let cli = Cli::parse_from(["lab-vmm", "--config", file.path().to_str().unwrap()]);
        let error = cli.machine().unwrap_err().to_string();
        assert!(error.contains("disc") && error.contains("line 1"), "{error}");
    }
}
