//! The disk of the host is full: the guest gets an I/O error, its VMM goes on, and so does the guest once there is room.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use lab_tests::{TestLab, output, program, scratch, text};

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
        let home = Self(scratch());
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
    // One command from before to after: while its file system is full, lab cannot ask the emulated host for another.
    let write = "dd if=/dev/urandom of=/dev/vdb bs=1M count=32 oflag=direct 2>&1";
    let script = format!("while read -r word; do said=$({write}); echo $said; done");
    let mut command = lab.command(&["exec", "node1", "sh", "-c", &script]);
    let mut node = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut asked, said) = (node.stdin.take().unwrap(), node.stdout.take().unwrap());
    let mut said = BufReader::new(said).lines();
    let mut write = || {
        asked.write_all(b"go\n").unwrap();
        said.next().unwrap().unwrap()
    };
    let filler = home.path().join("filler");
    let full = output(shell(&format!("cat /dev/zero > {}", filler.display())), b"");
    assert!(!full.status.success(), "the file system was not full");
    let line = write();
    assert!(line.contains("Input/output error"), "{line}");
    // The node and its VMM have gone on, and go on.
    std::fs::remove_file(&filler).unwrap();
    let line = write();
    assert!(line.contains("32+0 records out"), "{line}");
    drop(asked);
    assert!(node.wait().unwrap().success());
    assert_eq!(lab.state_of("node1"), "running");

    // A snapshot that there is no room for is none, and the node goes on.
    let leave =
        "kib=$(df -k --output=avail . | tail -n 1); head -c $(((kib - 16384) * 1024)) /dev/zero >filler";
    run(shell(leave).current_dir(home.path()));
    let why = lab.fails(1, &["snapshot", "save", "one"]);
    assert!(why.contains("No space left on device"), "{why}");
    assert!(!lab.run(&["snapshot", "ls"]).contains("one"));
    assert_eq!(lab.shell("node1", "echo there", b""), (Some(0), "there\n".into()));
    std::fs::remove_file(&filler).unwrap();
    lab.run(&["snapshot", "save", "one"]);
    lab.run(&["snapshot", "restore", "one"]);
    assert_eq!(lab.shell("node1", "echo there", b""), (Some(0), "there\n".into()));
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}
