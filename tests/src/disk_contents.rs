//! What is on the ext4 file system of a disk: names, types, modes, owners, links, extended attributes, contents. Read by
//! debugfs, which needs neither root nor a mount.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Inode of the root folder.
const ROOT: u64 = 2;
/// What debugfs writes before a device's numbers.
const DEVICE: &str = "Device major/minor number:";

/// All that is on a disk.
pub struct Contents {
    dir: tempfile::TempDir,
    /// Path from the root, without a slash in front, and what `describe` says of it.
    entries: BTreeMap<String, String>,
}

impl Contents {
    /// Reads a qcow2 disk with all that it stands on.
    pub fn of(disk: &Path) -> Self {
        let dir = super::scratch();
        let raw = dir.path().join("raw");
        let mut convert = Command::new("qemu-img");
        // Nobody writes to it, whoever has it open.
        convert.args(["convert", "-U", "-O", "raw"]).args([disk, &raw]);
        ran(convert);
        fs::create_dir(dir.path().join("files")).unwrap();
        debugfs(&raw, &format!("rdump / {}\n", dir.path().join("files").display()));
        let inodes = walk(&raw);
        let described = describe(&raw, inodes.values().copied());
        fs::remove_file(&raw).unwrap();
        let entries = inodes.into_iter().map(|(path, inode)| (path, described[&inode].clone())).collect();
        Self { dir, entries }
    }

    /// What is on one of the two alone, or not the same on both, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (path, here) in &self.entries {
            match other.entries.get(path) {
                None => found.push(format!("{path}: only on the first ({here})")),
                Some(there) if here != there => found.push(format!("{path}: {here}, and {there}")),
                Some(_) if here.starts_with("regular") && self.read(path) != other.read(path) => {
                    found.push(format!("{path}: other contents"));
                }
                Some(_) if here.starts_with("symlink") && self.target(path) != other.target(path) => {
                    found.push(format!("{path}: another target"));
                }
                Some(_) => {}
            }
        }
        let more = other.entries.iter().filter(|(path, _)| !self.entries.contains_key(*path));
        found.extend(more.map(|(path, there)| format!("{path}: only on the second ({there})")));
        found
    }

    fn file(&self, path: &str) -> PathBuf {
        self.dir.path().join("files").join(path)
    }

    fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn target(&self, path: &str) -> PathBuf {
        fs::read_link(self.file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }
}

/// Inodes of all paths.
fn walk(raw: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(PathBuf::new(), ROOT)];
    while !folders.is_empty() {
        let asked: String = folders.iter().fold(String::new(), |mut all, (_, inode)| {
            writeln!(all, "ls -p <{inode}>").unwrap();
            all
        });
        let said = debugfs(raw, &asked);
        let mut answers = said.split("debugfs: ls -p ").skip(1);
        let mut next = Vec::new();
        for (folder, _) in &folders {
            for line in answers.next().unwrap().lines().skip(1).filter(|line| line.starts_with('/')) {
                // /INODE/MODE/USER/GROUP/NAME/SIZE/
                let parts: Vec<&str> = line.split('/').collect();
                let (inode, mode, name): (u64, _, _) = (parts[1].parse().unwrap(), parts[2], parts[5]);
                if inode == 0 || name == "." || name == ".." {
                    continue;
                }
                let path = folder.join(name);
                found.insert(path.to_str().unwrap().to_owned(), inode);
                if mode.starts_with("04") {
                    next.push((path, inode));
                }
            }
        }
        folders = next;
    }
    found
}

/// Type, mode, owner, links, device and extended attributes of inodes.
fn describe(raw: &Path, inodes: impl Iterator<Item = u64>) -> BTreeMap<u64, String> {
    let inodes: Vec<u64> = inodes.collect::<std::collections::BTreeSet<_>>().into_iter().collect();
    let asked: String = inodes.iter().fold(String::new(), |mut all, inode| {
        writeln!(all, "stat <{inode}>").unwrap();
        all
    });
    let said = debugfs(raw, &asked);
    let answers = said.split("debugfs: stat ").skip(1);
    inodes.into_iter().zip(answers.map(of_stat)).collect()
}

/// The parts of what debugfs says of an inode that are the same on two disks with the same files.
fn of_stat(said: &str) -> String {
    let word_after = |label: &str| {
        let rest = said.split_once(label).map_or("", |(_, rest)| rest);
        rest.split_whitespace().next().unwrap_or_default().to_owned()
    };
    let kind = word_after("Type:");
    let mut all =
        format!("{kind} {} of {}:{}", word_after("Mode:"), word_after("User:"), word_after("Group:"));
    // A folder's are those in it, and its size depends on what has been in it.
    if kind != "directory" {
        write!(all, ", {} links, {} bytes", word_after("Links:"), word_after("Size:")).unwrap();
    }
    if said.contains(DEVICE) {
        write!(all, ", {}", word_after(DEVICE)).unwrap();
    }
    if let Some((_, attributes)) = said.split_once("Extended attributes:\n") {
        for line in attributes.lines().take_while(|line| line.starts_with("  ")) {
            write!(all, ", {}", line.trim()).unwrap();
        }
    }
    all
}

/// Runs commands of debugfs; what it said.
fn debugfs(raw: &Path, commands: &str) -> String {
    let file = raw.with_extension("commands");
    fs::write(&file, commands).unwrap();
    let mut command = Command::new("debugfs");
    command.arg("-f").arg(&file).arg(raw);
    ran(command)
}

/// Runs a command that must succeed; its standard output.
fn ran(mut command: Command) -> String {
    // e2fsprogs are in sbin, which is not in every user's PATH.
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with these files in a folder of the host.
    fn disk(dir: &Path, change: impl FnOnce(&Path)) -> Contents {
        let (files, raw) = (dir.join("source"), dir.join("disk.raw"));
        fs::create_dir_all(files.join("etc/a b")).unwrap();
        fs::write(files.join("etc/a b/one"), "1").unwrap();
        fs::write(files.join("etc/two"), "2").unwrap();
        std::os::unix::fs::symlink("two", files.join("etc/link")).unwrap();
        change(&files);
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-F", "-t", "ext4", "-d"]).args([&files, &raw]).arg("8M");
        ran(make);
        let disk = dir.join("disk.qcow2");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &disk]);
        ran(convert);
        Contents::of(&disk)
    }

    #[test]
    fn what_differs_is_told() {
        use std::os::unix::fs::PermissionsExt;
        if ["qemu-img", "mke2fs", "debugfs"].iter().any(|name| {
            !Path::new("/usr/bin").join(name).exists() && !Path::new("/usr/sbin").join(name).exists()
        }) {
            eprintln!("\nSKIPPED: contents of disks: qemu-img, mke2fs or debugfs is missing");
            return;
        }
        let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let first = disk(dirs[0].path(), |_| {});
        let same = disk(dirs[1].path(), |_| {});
        assert_eq!(first.differences(&same), [""; 0]);
        let other = disk(dirs[2].path(), |files| {
            fs::write(files.join("etc/two"), "3").unwrap();
            fs::write(files.join("etc/three"), "").unwrap();
            fs::remove_file(files.join("etc/link")).unwrap();
            std::os::unix::fs::symlink("2wo", files.join("etc/link")).unwrap();
            fs::set_permissions(files.join("etc/a b/one"), PermissionsExt::from_mode(0o640)).unwrap();
        });
        let found = first.differences(&other);
        let of = |path: &str| found.iter().find(|line| line.starts_with(path)).map_or("", |line| line);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(of("etc/a b/one").contains("0644") && of("etc/a b/one").contains("0640"), "{found:?}");
        assert!(of("etc/link").contains("another target"), "{found:?}");
        assert!(of("etc/three").contains("only on the second"), "{found:?}");
        assert!(of("etc/two").contains("other contents"), "{found:?}");
    }
}
