//! Memory that this process may still use: the host's, and that of the control groups it is in (a container, a unit with
//! `MemoryMax=`, a job of a CI system), which kill who takes more.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// How much there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// In MiB.
    pub mib: u64,
    /// The file of the control group that has less than the host.
    pub limited_by: Option<PathBuf>,
}

/// What can be had now; `None` where the kernel does not tell.
pub fn available() -> Option<Available> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mib = meminfo(&read("/proc/meminfo"), "MemAvailable")?;
    let group = in_control_groups(Path::new("/sys/fs/cgroup"), &read("/proc/self/cgroup"));
    Some(match group {
        Some((bytes, file)) if bytes >> 20 < mib => Available { mib: bytes >> 20, limited_by: Some(file) },
        _ => Available { mib, limited_by: None },
    })
}

/// A field of /proc/meminfo in MiB.
pub fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split(':').next() == Some(field))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

/// The least that a control group of this process, or one above it, has left in bytes, and the file with its limit. `root`
/// is /sys/fs/cgroup and `groups` the text of /proc/self/cgroup (cgroups(7)), with the unified hierarchy or the first.
fn in_control_groups(root: &Path, groups: &str) -> Option<(u64, PathBuf)> {
    let of = |controller: &str| {
        groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            controllers.split(',').any(|name| name == controller).then(|| path.trim_start_matches('/'))
        })
    };
    let (root, path, [limit, usage, cache]) = match (of("memory"), of("")) {
        (Some(path), _) => (
            root.join("memory"),
            path,
            ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
        ),
        (None, Some(path)) => (root.into(), path, ["memory.max", "memory.current", "inactive_file"]),
        _ => return None,
    };
    // In a container the path may be that of the host, whose folders are not there: its root then is the container's own.
    let inner = root.join(path);
    let folders = inner.ancestors().take_while(|folder| folder.starts_with(&root));
    let left = folders.filter_map(|folder| {
        let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        let file = folder.join(limit);
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        // Files that were read lately are dropped when memory is wanted, as in MemAvailable.
        let dropped = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
        let used = number(usage)?.saturating_sub(dropped.unwrap_or(0));
        Some((number(limit)?.saturating_sub(used), file))
    });
    left.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let text = "MemTotal:       24684096 kB\nMemFree: 1 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(2048));
        assert_eq!(meminfo(text, "Mem"), None);
        assert!(available().is_some_and(|available| available.mib > 0));
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (group, max, current) in
            [("ci", "3221225472\n", "1073741824\n"), ("ci/job", "max\n", "1048576\n"), ("", "max\n", "9\n")]
        {
            write(&format!("{group}/memory.max"), max);
            write(&format!("{group}/memory.current"), current);
            write(&format!("{group}/memory.stat"), "anon 4\ninactive_file 536870912\nactive_file 7\n");
        }
        let found = |groups: &str| in_control_groups(dir.path(), groups);
        assert_eq!(found("0::/ci/job\n"), Some(((2 << 30) + (512 << 20), dir.path().join("ci/memory.max"))));
        assert_eq!(found("0::/\n"), None, "no limit");
        assert_eq!(found("0::/not/there\n"), None);
        assert_eq!(found(""), None);

        write("memory/docker/7/memory.limit_in_bytes", "1073741824\n");
        write("memory/docker/7/memory.usage_in_bytes", "1048576\n");
        write("memory/docker/7/memory.stat", "inactive_file 1\ntotal_inactive_file 1048576\n");
        let file = dir.path().join("memory/docker/7/memory.limit_in_bytes");
        assert_eq!(found("5:cpu,cpuacct:/x\n4:memory:/docker/7\n0::/ci\n"), Some((1 << 30, file)));
    }
}
