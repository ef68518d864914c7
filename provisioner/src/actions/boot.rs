//! A node's machine: a `lab-vmm` with its disks and its card in the lab's network.

use std::{
    cmp::Ordering,
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lab_vmm::{
    config::{ConsoleConfig, DiskConfig, DiskFormat, NetConfig, VmConfig, VsockConfig},
    control as vmm, qcow2,
};

use super::{Action, Error, cloud_init, disk, ready};
use crate::{
    channel, child, control, json_file, lab,
    lab::Lab,
    labfile::{show_size as size, topology::Node},
    progress::Task,
    snapshot,
    state::{self, NodeState},
};

/// Port where systemd in a guest reports to `lab-vmm`.
const NOTIFY_PORT: u32 = 9091;
/// Context id of every guest: each `lab-vmm` has an address space of its own for vsock.
const CID: u32 = 3;
/// How long `lab-vmm` may take until it answers, with KVM.
const START_LIMIT_S: u32 = 10;
/// Time between two looks for that answer, with KVM.
const PAUSE: Duration = Duration::from_millis(20);
/// What a slow node's kernel is told: its timers come with its tick, every 4 ms. Each that comes between two costs several
/// exits, and the runtime of Go programs sets one every 20 µs (`sysmon`, runtime/proc.go): without this, two of three timer
/// interrupts of a node that starts Docker.
const SLOW: &str = "highres=off";

/// The kernel's command line: the image's, with what is the node's own.
fn cmdline(image: &str, machine_id: &str, slow: bool) -> String {
    let slow = if slow { format!(" {SLOW}") } else { String::new() };
    format!("{image}{slow} systemd.machine_id={machine_id}")
}

/// The resolv.conf(5) of nodes on a host with that one: where the host has search domains, a node has them behind the lab's
/// own, whose names win.
fn resolv_conf(lab: &str, gateway: Ipv4Addr, host: &str) -> String {
    let search = lab_net::dns::search::parse(host);
    let name_server = format!("nameserver {gateway}\n");
    match search.is_empty() {
        true => name_server,
        false => format!("{name_server}search {lab}.lab {}\n", search.join(" ")),
    }
}

/// Starts a node's machine.
pub struct Boot {
    /// The node.
    pub node: Node,
    /// Folder of a snapshot that the machine goes on from, standing still at first.
    pub snapshot: Option<PathBuf>,
}

impl Action for Boot {
    fn describe(&self) -> String {
        "boot".into()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        if state::node_state(&lab.dirs, &self.node.name) != NodeState::Running || self.stands_still(lab) {
            return Ok(false);
        }
        let running: Option<VmConfig> = json_file::read(&lab.dirs.node(&self.node.name).join("vm.json"))?;
        if let Some(running) = running {
            for (what, is, wanted) in [
                ("cpus", u64::from(running.cpus), u64::from(self.node.cpus)),
                ("nested", u64::from(running.nested), u64::from(self.node.nested)),
                ("memory in MiB", running.memory_mib, self.node.memory_mib),
                (
                    "disks",
                    running.disks.iter().filter(|disk| !disk.read_only).count() as u64,
                    1 + self.node.extra_disks_bytes.len() as u64,
                ),
            ] {
                if is != wanted {
                    let name = &self.node.name;
                    lab.progress.warn(&format!(
                        "{name} runs with {what} {is}, the labfile says {wanted}: `lab restart {name}` applies it"
                    ));
                }
            }
        }
        for (index, (is, wanted)) in self.disk_sizes(lab)?.into_iter().enumerate() {
            let name = &self.node.name;
            match is.cmp(&wanted) {
                Ordering::Less => lab.progress.warn(&format!(
                    "disk {index} of {name} has {}, the labfile says {}: `lab restart {name}` makes it larger",
                    size(is),
                    size(wanted)
                )),
                _ => self.warn_if_too_large(lab, index, is, wanted),
            }
        }
        Ok(true)
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        let Node { name, role, ip, mac, cpus, nested, memory_mib, .. } = &self.node;
        serde_json::to_string(&(name, role, ip, mac, cpus, nested, memory_mib)).ok()
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let name = &self.node.name;
        if self.stands_still(lab) {
            control::ask_vmm(&lab.dirs.node_socket(name, "ctl"), vmm::Action::Resume)?;
            return Ok(snapshot::catch_up(lab, name, &|seen| task.detail(seen)).map_err(Box::new)?);
        }
        let dir = lab.dirs.node(name);
        // What was known of an earlier machine is void.
        drop(fs::remove_file(ready::marker(lab, name)));
        drop(fs::remove_file(ready::behind(lab, name)));
        lab.channel(name).close();
        // A snapshot's disks are as large as its machine knows them.
        if self.snapshot.is_none() {
            self.grow_disks(lab)?;
        }
        let host_key = channel::ensure_key(&dir.join("ssh_host_ed25519_key"))?;
        let trusted = format!("{name} {host_key}\n");
        json_file::write_bytes(&channel::known_hosts(&lab.dirs, name), trusted.as_bytes())?;
        let config = self.config(lab)?;
        let file = dir.join("vm.json");
        json_file::write(&file, &config)?;
        let log = dir.join("vmm.log");
        let io = |action: &'static str, path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Io { action, path, source }
        };
        let stderr = File::create(&log).map_err(io("write", &log))?;
        let program = lab::sibling("lab-vmm");
        let mut command = Command::new(&program);
        command.arg("--config").arg(&file).current_dir(&dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let mut process = child::detach(&mut command, lab.bound).spawn().map_err(io("start", &program))?;
        let socket = lab.dirs.node_socket(name, "ctl");
        let end = Instant::now() + lab.limit(START_LIMIT_S);
        loop {
            let answer = control::vmm_status(&socket);
            if let Ok(status) = &answer
                && status.pid == process.id()
            {
                return Ok(());
            }
            if let Err(error) = &answer {
                task.detail(&error.to_string());
            }
            // A slow host has better things to do than to ask.
            let ended = child::wait(&mut process, PAUSE * lab.patience).map_err(io("watch", &program))?;
            let last = fs::read_to_string(&log).unwrap_or_default();
            if ended.is_some() {
                return Err(Error::NotStarted { program: "lab-vmm", reason: last.trim().into() });
            }
            if Instant::now() > end {
                drop(process.kill());
                drop(process.wait());
                let seen = answer.err().map(|error| error.to_string()).unwrap_or_default();
                return Err(Error::NotStarted { program: "lab-vmm", reason: format!("{seen}\n{last}") });
            }
        }
    }
}

impl Boot {
    /// Whether the machine is paused: by a command that was interrupted.
    fn stands_still(&self, lab: &Lab) -> bool {
        let socket = lab.dirs.node_socket(&self.node.name, "ctl");
        control::vmm_status(&socket).is_ok_and(|status| status.paused)
    }

    /// How large each disk is, and how large the labfile wants it, in bytes. Of a labfile that has more disks than the node,
    /// those that are there.
    fn disk_sizes(&self, lab: &Lab) -> Result<Vec<(u64, u64)>, Error> {
        let (manifest, _) = lab.image_of(&self.node.name)?;
        let root = self.node.disk_bytes.max(manifest.root_bytes);
        let wanted = [root].into_iter().chain(self.node.extra_disks_bytes.iter().copied());
        let disks = wanted.enumerate().map(|(index, wanted)| (self.disk(lab, index), wanted));
        disks
            .filter(|(disk, _)| disk.exists())
            .map(|(disk, wanted)| Ok((qcow2::info(&disk)?.size_bytes, wanted)))
            .collect()
    }

    fn disk(&self, lab: &Lab, index: usize) -> PathBuf {
        lab.dirs.node(&self.node.name).join(disk::file_name(index))
    }

    /// Makes disks larger that the labfile wants larger; file systems on them grow as the guest likes.
    fn grow_disks(&self, lab: &Lab) -> Result<(), Error> {
        for (index, (is, wanted)) in self.disk_sizes(lab)?.into_iter().enumerate() {
            qcow2::grow(&self.disk(lab, index), wanted)?;
            self.warn_if_too_large(lab, index, is, wanted);
        }
        Ok(())
    }

    fn warn_if_too_large(&self, lab: &Lab, index: usize, is: u64, wanted: u64) {
        if is > wanted {
            let name = &self.node.name;
            lab.progress.warn(&format!(
                "disk {index} of {name} has {}, the labfile says {}: disks don't become smaller; `lab destroy {name}` and \
                 `lab up` make the node anew",
                size(is),
                size(wanted)
            ));
        }
    }

    fn config(&self, lab: &Lab) -> Result<VmConfig, Error> {
        let name = &self.node.name;
        let dir = lab.dirs.node(name);
        let (manifest, image) = lab.image_of(name)?;
        let record = lab.record_of(name)?.ok_or_else(|| lab::Error::NotThere(lab.topology.name.clone()))?;
        let seed = dir.join("seed.cpio");
        json_file::write_bytes(&seed, &self.seed(lab)?)?;
        let disk = |index| DiskConfig {
            path: dir.join(disk::file_name(index)),
            format: disk::FORMAT,
            read_only: false,
            // Extra disks are empty, and partitioned by the guest.
            sector_bytes: if index == 0 { manifest.root_sector_bytes } else { 512 },
        };
        let mut disks: Vec<_> = (0..=self.node.extra_disks_bytes.len()).map(disk).collect();
        if manifest.cloud_init {
            disks.push(self.cloud_init(lab, &record.machine_id)?);
        }
        Ok(VmConfig {
            name: name.clone(),
            kernel: image.join("kernel"),
            initrd: vec![image.join("initrd"), seed],
            cmdline: cmdline(&manifest.cmdline, &record.machine_id, lab.patience > 1),
            cpus: self.node.cpus,
            nested: self.node.nested,
            memory_mib: self.node.memory_mib,
            disks,
            nets: vec![NetConfig {
                socket: lab.dirs.net_socket(),
                port: name.clone(),
                mac: self.node.mac.clone(),
            }],
            vsock: Some(VsockConfig {
                cid: CID,
                socket: lab.dirs.node_socket(name, "vsock"),
                notify_port: Some(NOTIFY_PORT),
                clock_port: manifest.clock_port,
            }),
            console: ConsoleConfig {
                log: Some(dir.join("console.log")),
                socket: Some(lab.dirs.node_socket(name, "console")),
                stdio: false,
            },
            control: Some(lab.dirs.node_socket(name, "ctl")),
            lock: Some(state::vmm_lock(&dir)),
            restore: self.snapshot.clone(),
            // Forks are for sharing.
            prefetch: self.snapshot.is_some() && lab.fork.is_none(),
            paused: self.snapshot.is_some(),
        })
    }

    /// The disk for an imported image's cloud-init, behind all others.
    fn cloud_init(&self, lab: &Lab, instance: &str) -> Result<DiskConfig, Error> {
        let dir = lab.dirs.node(&self.node.name);
        let host_key = dir.join("ssh_host_ed25519_key");
        let io = |action: &'static str, path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Io { action, path, source }
        };
        let path = dir.join(cloud_init::FILE);
        let seed = cloud_init::Seed {
            name: &self.node.name,
            instance,
            authorized_key: &channel::ensure_key(&lab.dirs.identity())?,
            host_key: &fs::read_to_string(&host_key).map_err(io("read", &host_key))?,
            host_key_public: &channel::ensure_key(&host_key)?,
        };
        let bytes = cloud_init::disk(&seed).map_err(io("make", &path))?;
        json_file::write_bytes(&path, &bytes)?;
        Ok(DiskConfig { path, format: DiskFormat::Raw, read_only: true, sector_bytes: 512 })
    }

    /// The files that this node finds in its `/run`: name, keys, and where to report. They come with each boot, so
    /// nothing of them is on the disk or on the kernel's command line.
    fn seed(&self, lab: &Lab) -> Result<Vec<u8>, Error> {
        let read = |path: std::path::PathBuf| {
            fs::read(&path).map_err(|source| Error::Io { action: "read", path, source })
        };
        let key = channel::ensure_key(&lab.dirs.identity())?;
        let host_key = read(lab.dirs.node(&self.node.name).join("ssh_host_ed25519_key"))?;
        let name = self.node.name.as_bytes();
        let notify = format!("vsock-stream:2:{NOTIFY_PORT}");
        let proxy = format!("http://{}:{}\n", lab.topology.network.gateway, lab_net::cache::PORT);
        let key = format!("{key}\n");
        // Without the file, it has no search domains.
        let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let resolv_conf = resolv_conf(&lab.topology.name, lab.topology.network.gateway, &host);
        let files: &[(&str, u32, &[u8])] = &[
            ("node/run/lab/hostname", 0o644, name),
            ("node/run/lab/resolv.conf", 0o644, resolv_conf.as_bytes()),
            ("node/run/lab/apt-proxy", 0o644, proxy.as_bytes()),
            ("node/run/lab/authorized_keys", 0o600, key.as_bytes()),
            ("node/run/lab/ssh_host_ed25519_key", 0o600, &host_key),
            ("node/run/credentials/@initrd/system.hostname", 0o400, name),
            ("node/run/credentials/@initrd/ssh.authorized_keys.root", 0o400, key.as_bytes()),
            ("node/run/credentials/@initrd/vmm.notify_socket", 0o400, notify.as_bytes()),
        ];
        Ok(lab_images::initramfs::node_cpio(files)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_looks_for_names_in_the_lab_first_and_then_where_the_host_does() {
        let gateway = [192, 168, 100, 1].into();
        assert_eq!(resolv_conf("shop", gateway, "nameserver 192.0.2.1\n"), "nameserver 192.168.100.1\n");
        assert_eq!(
            resolv_conf("shop", gateway, "search corp.example example\n"),
            "nameserver 192.168.100.1\nsearch shop.lab corp.example example\n"
        );
    }

    #[test]
    fn a_slow_node_has_fewer_timers() {
        assert_eq!(cmdline("root=/dev/vda quiet", "1f", false), "root=/dev/vda quiet systemd.machine_id=1f");
        assert_eq!(cmdline("root=/dev/vda", "1f", true), "root=/dev/vda highres=off systemd.machine_id=1f");
    }
}
