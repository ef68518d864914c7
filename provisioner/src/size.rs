//! What a lab really takes: memory of its processes, space of its files. Forks share both with the snapshot that they were
//! made from, and with each other, until they write.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
};

use serde::Serialize;

use crate::{paths::LabPaths, state};

/// What a lab takes, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Memory of its machines and its network that would be free without them.
    pub memory: u64,
    /// Memory that they use and that others may use, too: pages of snapshots that nobody has written to.
    pub memory_shared: u64,
    /// Space of its files that would be free without them.
    pub disk: u64,
    /// Space of files that something else has, too: other labs, the image store, what the next `up` starts from.
    pub disk_shared: u64,
}

/// What a lab takes now.
pub fn of_lab(dirs: &LabPaths) -> Size {
    let mut size = of_folder(&dirs.dir);
    let machines = state::nodes_on_disk(dirs).into_iter().map(|node| dirs.node_socket(&node, "ctl"));
    for socket in machines.chain([dirs.net_control()]) {
        // One that has just ended takes nothing.
        if let Ok(pid) = listener(&socket)
            && let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        {
            let (own, shared) = memory(&text);
            size.memory += own;
            size.memory_shared += shared;
        }
    }
    size
}

/// Space that the files below a folder take. A file all of whose names are below it would go with it.
pub fn of_folder(folder: &Path) -> Size {
    let mut files = BTreeMap::new();
    collect(folder, &mut files);
    let mut size = Size::default();
    for (bytes, names, seen) in files.into_values() {
        if seen < names {
            size.disk_shared += bytes;
        } else {
            size.disk += bytes;
        }
    }
    size
}

/// Of each file and folder below `folder`, by device and inode: its space, how many names it has, and how many of them
/// are here.
fn collect(folder: &Path, files: &mut BTreeMap<(u64, u64), (u64, u64, u64)>) {
    let Ok(metadata) = fs::symlink_metadata(folder) else { return };
    // Folders have one name each; the links to them are those of their own `.` and `..`.
    let names = if metadata.is_dir() { 1 } else { metadata.nlink() };
    let file = files.entry((metadata.dev(), metadata.ino())).or_insert((metadata.blocks() * 512, names, 0));
    file.2 += 1;
    if metadata.is_dir() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            collect(&entry.path(), files);
        }
    }
}

/// The process that listens at a socket (unix(7), SO_PEERCRED).
fn listener(socket: &Path) -> io::Result<i32> {
    let stream = UnixStream::connect(socket)?;
    Ok(rustix::net::sockopt::socket_peercred(&stream)?.pid.as_raw_nonzero().get())
}

/// Own and shared memory in `/proc/PID/smaps_rollup` (proc_pid_smaps(5)). A clean page of a file can be given up at any
/// time, whoever has mapped it, so it counts as shared.
fn memory(smaps: &str) -> (u64, u64) {
    let field = |name: &str| {
        let value = smaps.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    let dirty = field("Private_Dirty");
    (dirty.saturating_add(field("Swap")), field("Rss").saturating_sub(dirty))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_other_names_are_shared() {
        let home = tempfile::tempdir().unwrap();
        let lab = home.path().join("lab");
        fs::create_dir_all(lab.join("nodes/a")).unwrap();
        fs::write(home.path().join("image"), [1; 100_000]).unwrap();
        fs::hard_link(home.path().join("image"), lab.join("image")).unwrap();
        fs::write(lab.join("nodes/a/disk"), [2; 50_000]).unwrap();
        // Twice in the lab, and nowhere else.
        fs::hard_link(lab.join("nodes/a/disk"), lab.join("layer")).unwrap();
        // A hole takes nothing.
        fs::File::create(lab.join("hole")).unwrap().set_len(1 << 30).unwrap();
        let size = of_folder(&lab);
        let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
        let folders: u64 = ["", "nodes", "nodes/a"].iter().map(|dir| blocks(&lab.join(dir))).sum();
        assert_eq!(size.disk_shared, blocks(&lab.join("image")));
        assert_eq!(size.disk, blocks(&lab.join("layer")) + folders);
        let du = std::process::Command::new("du").args(["-s", "--block-size=1"]).arg(&lab).output().unwrap();
        let du: u64 = String::from_utf8(du.stdout).unwrap().split('\t').next().unwrap().parse().unwrap();
        assert_eq!(size.disk + size.disk_shared, du);
        assert_eq!(of_folder(&home.path().join("none")), Size::default());
    }

    #[test]
    fn memory_is_own_once_written() {
        let text = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:                1000 kB\nPss:                 700 kB\n\
                    Shared_Clean:        300 kB\nPrivate_Clean:       100 kB\nPrivate_Dirty:       600 kB\nSwap:                 50 kB\nSwapPss:  50 kB\n";
        assert_eq!(memory(text), (650 << 10, 400 << 10));
        assert_eq!(memory("nonsense"), (0, 0));
    }

    #[test]
    fn a_listener_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(listener(&path).unwrap(), std::process::id() as i32);
        drop(socket);
        assert!(listener(&path).is_err());
    }
}
