//! The disk of the host is full: the guest gets an I/O error, its VMM goes on, and so does the guest once there is room.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{path::Path, process::Command};

use lab_tests::{TestLab, output, program, text};

const LABFILE: &str = r#"
name = "full"
image = "tiny"

[node.node1]
memory = "128MiB"
disk = "64MiB"
disks = ["64MiB"]
"#;

/// A LAB_HOME on a small file system of its own, with the image in it.
struct SmallHome(tempfile::TempDir);

impl SmallHome {
    fn new(mib: u32) -> Self {
        let home = Self(tempfile::tempdir_in("/var/tmp").unwrap());
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(home.path()));
        run(lab_at(None).args(["image", "build", "tiny"]));
        let images =
            Path::new(&std::env::var_os("LAB_HOME").expect("LAB_HOME is set by scripts/test")).join("images");
        run(Command::new("mkdir").arg(home.path().join("images")));
        run(Command::new("cp").arg("-a").arg(images.join("tiny")).arg(home.path().join("images")));
        home
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallHome {
    fn drop(&mut self) {
        run(lab_at(Some(self.path())).args(["host", "stop", "--force"]));
        run(Command::new("umount").arg(self.path()));
    }
}

fn lab_at(home: Option<&Path>) -> Command {
    let mut command = Command::new(program());
    command.arg("-q").envs(home.map(|home| ("LAB_HOME", home)));
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
}

#[test]
fn a_full_disk_is_an_io_error_in_the_guest() {
    if !output(Command::new("id"), b"").stdout.starts_with(b"uid=0(") {
        eprintln!(
            "SKIPPED: a_full_disk_is_an_io_error_in_the_guest: only root can mount a small file system"
        );
        return;
    }
    let home = SmallHome::new(400);
    let lab = TestLab::at_home(LABFILE, home.path());
    lab.run(&["up"]);
    let write = "dd if=/dev/urandom of=/dev/vdb bs=1M count=32 oflag=direct 2>&1";
    let filler = home.path().join("filler");
    let full = output(shell(&format!("cat /dev/zero > {}", filler.display())), b"");
    assert!(!full.status.success(), "the file system was not full");
    let (status, said) = lab.shell("node1", write, b"");
    assert!(status == Some(1) && said.contains("I/O error"), "{status:?} {said}");
    // The node and its VMM go on.
    assert_eq!(lab.state_of("node1"), "running");
    assert_eq!(lab.shell("node1", "hostname", b""), (Some(0), "node1\n".into()));
    std::fs::remove_file(&filler).unwrap();
    let (status, said) = lab.shell("node1", write, b"");
    assert_eq!(status, Some(0), "{said}");
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}
