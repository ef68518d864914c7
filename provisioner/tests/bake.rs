//! Steps that are baked without a node: what they make, what they reach, and what is left of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use lab::bake::{self, Disk, Error, Event, Step};

const LIMIT: Duration = Duration::from_secs(120);

/// A root file system of a few programs of this machine, packed as an image's files are.
struct Root {
    dir: tempfile::TempDir,
}

impl Root {
    fn new(programs: &[&str]) -> Self {
        let root = Self { dir: tempfile::tempdir_in("/var/tmp").unwrap() };
        let tree = root.path("tree");
        for folder in ["usr/bin", "usr/lib", "usr/lib64", "root", "etc"] {
            fs::create_dir_all(tree.join(folder)).unwrap();
        }
        for folder in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{folder}"), tree.join(folder)).unwrap();
        }
        for program in ["sh", "cat"].iter().chain(programs) {
            let path =
                ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(|folder| Path::new(folder).join(program));
            let path = path.iter().find(|path| path.exists()).unwrap_or_else(|| panic!("no {program}"));
            fs::copy(path, tree.join("usr/bin").join(program)).unwrap();
            let libraries = Command::new("ldd").arg(path).output().unwrap();
            for library in String::from_utf8(libraries.stdout).unwrap().split_whitespace() {
                let target = tree.join(library.trim_start_matches('/'));
                if library.starts_with('/') && !target.exists() {
                    fs::create_dir_all(target.parent().unwrap()).unwrap();
                    fs::copy(library, target).unwrap();
                }
            }
        }
        let tar = Command::new("tar").args(["-c", "-C"]).arg(&tree).arg(".").output().unwrap();
        let packed = zstd::encode_all(tar.stdout.as_slice(), 1).unwrap();
        fs::write(root.path("root.tar.zst"), packed).unwrap();
        root
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bake(&self, steps: &[Step], limit: Duration, event: &mut dyn FnMut(Event<'_>)) -> Result<(), Error> {
        let lab = Path::new(env!("CARGO_BIN_EXE_lab"));
        let (packages, log) = (self.path("packages"), self.path("log"));
        bake::run(lab, &self.path("root.tar.zst"), steps, &packages, &log, limit, event)
    }

    /// What debugfs(8) tells of a disk.
    fn of_disk(&self, disk: &str, request: &str) -> String {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        let mut debugfs = Command::new("debugfs");
        let output = debugfs.args(["-R", request]).arg(self.path(disk)).env("PATH", path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

fn step(name: &str, script: &str, disk: Option<&Path>) -> Step {
    let disk = disk.map(|path| Disk { file: File::create(path).unwrap(), bytes: 64 << 20 });
    Step { name: name.into(), script: script.into(), environment: Vec::new(), files: None, disk }
}

/// Whether namespaces can be made here; says why not.
fn can_be_had() -> bool {
    let mut unshare = Command::new("unshare");
    let unshared = unshare.args(["--user", "--mount", "--map-root-user", "true"]).output().unwrap();
    if !unshared.status.success() {
        eprintln!("SKIPPED: no user namespaces here: {}", String::from_utf8_lossy(&unshared.stderr).trim());
    }
    unshared.status.success()
}

#[test]
fn steps_stand_on_each_other_and_become_disks() {
    if !can_be_had() {
        return;
    }
    let root = Root::new(&["chown", "chmod"]);
    let script = "cat $LAB_STEP/file > /one; echo $WORD >> /one";
    let mut one = step("s/one", script, Some(&root.path("one.img")));
    let variables = [("LAB_STEP", "/run/lab-step"), ("WORD", "two words")];
    one.environment = variables.map(|(key, value)| (key.into(), value.into())).into();
    let mut archive = tar::Builder::new(tempfile::tempfile().unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o600);
    archive.append_data(&mut header, "file", b"file\n".as_slice()).unwrap();
    let mut archive = archive.into_inner().unwrap();
    std::io::Seek::rewind(&mut archive).unwrap();
    one.files = Some(archive);
    let script = "chmod 4751 /one; chown 7:8 /etc; echo scratch > /tmp/scratch; echo three > /three
        cat /run/lab-step/* 2> /dev/null || echo nothing there";
    let two = step("s/two", script, Some(&root.path("two.img")));
    let mut seen = Vec::new();
    root.bake(&[one, two], LIMIT, &mut |event| {
        seen.push(match event {
            Event::Begins(number) => format!("begins {number}"),
            Event::Made(number) => format!("made {number}"),
            Event::Line(line) => line.into(),
        });
    })
    .unwrap();
    assert_eq!(seen, ["begins 0", "made 0", "begins 1", "nothing there", "made 1"]);
    assert_eq!(root.of_disk("one.img", "cat /one"), "file\ntwo words\n");
    let three = ["one.img", "two.img"].map(|disk| root.of_disk(disk, "cat /three"));
    assert!(!three[0].contains("three\n") && three[1] == "three\n", "{three:?}");
    let mode = root.of_disk("two.img", "stat /one");
    assert!(mode.contains("Mode:  04751") && mode.contains("User:     0"), "{mode}");
    let owner = root.of_disk("two.img", "stat /etc");
    assert!(owner.contains("User:     7   Group:     8"), "{owner}");
    // What belongs to the step alone is in no disk.
    for folder in ["/tmp", "/run", "/dev", "/proc"] {
        let list = root.of_disk("two.img", &format!("ls -p {folder}"));
        assert_eq!(list.lines().filter(|line| line.starts_with('/')).count(), 2, "{folder}: {list}");
    }
}

#[test]
fn a_step_reaches_nothing_but_the_cache() {
    if !can_be_had() {
        return;
    }
    let root = Root::new(&["mount", "unshare", "ls", "id"]);
    let script = "
        id -u
        echo first process $$
        while read name rest; do case $name in *:) echo card $name ;; esac; done < /proc/net/dev
        while read -r name value; do
            case $name in Seccomp: | NoNewPrivs:) echo $name $value ;; esac
        done < /proc/self/status
        mount -t tmpfs none /tmp 2> /dev/null && echo mounted
        unshare --user ls 2> /dev/null && echo unshared
        ls /
        ls /proc/1/root/
        echo 1 2> /dev/null > /proc/sys/vm/drop_caches && echo dropped
        cat /run/lab/apt-proxy
        for file in /proc/self/fd/*; do case ${file##*/} in 0 | 1 | 2) ;; *) [ ! -f $file ] || [ $file -ef /run/lab-script ] || echo open file ;; esac; done
        exit 0";
    let mut lines = Vec::new();
    root.bake(&[step("s/curious", script, Some(&root.path("disk")))], LIMIT, &mut |event| {
        if let Event::Line(line) = event {
            lines.push(line.to_owned());
        }
    })
    .unwrap();
    let has = |line: &str| lines.iter().any(|said| said == line);
    // It is root, the first process, under a filter, with no card but the loopback.
    for line in
        ["0", "first process 1", "card lo:", "NoNewPrivs: 1", "Seccomp: 2", "etc", "http://127.0.0.1:3142"]
    {
        assert!(has(line), "{line}: {lines:#?}");
    }
    // Folders that this machine has, and the image has not.
    for line in ["mounted", "unshared", "dropped", "open file", "home", "var", "sys"] {
        assert!(!has(line), "{line}: {lines:#?}");
    }
    assert_eq!(lines.iter().filter(|line| line.starts_with("card ")).count(), 1, "{lines:#?}");
}

#[test]
fn a_step_that_fails_is_told_and_nothing_of_one_that_hangs_is_left() {
    if !can_be_had() {
        return;
    }
    let root = Root::new(&[]);
    let steps = [
        step("s/good", "echo good > /good", Some(&root.path("good.img"))),
        step("s/bad", "echo too bad >&2; exit 3", None),
        step("s/never", "echo never", None),
    ];
    let mut made = Vec::new();
    let error = root.bake(&steps, LIMIT, &mut |event| {
        if let Event::Made(number) = event {
            made.push(number);
        }
    });
    assert_eq!(error.unwrap_err().to_string(), "s/bad: it ended with status 3: too bad");
    assert_eq!((made, root.of_disk("good.img", "cat /good").as_str()), (vec![0], "good\n"));

    let mark = format!("LAB_BAKE_TEST={}", std::process::id());
    let mut hangs = step("s/hangs", "echo hangs; while :; do :; done", None);
    hangs.environment = vec![("LAB_BAKE_TEST".into(), std::process::id().to_string())];
    let error = root.bake(&[hangs], Duration::from_secs(5), &mut |_| ());
    assert_eq!(error.unwrap_err().to_string(), "s/hangs: it had not ended after 5 s: hangs");
    let running = || {
        let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("environ"));
        let environments = processes.filter_map(|path| fs::read(path).ok());
        let marked =
            |environment: &Vec<u8>| environment.split(|byte| *byte == 0).any(|word| word == mark.as_bytes());
        environments.filter(marked).count()
    };
    let end = Instant::now() + Duration::from_secs(20);
    while running() > 0 {
        assert!(Instant::now() < end, "{} processes of the step run on", running());
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn this_program_needs_no_folder_that_others_can_enter() {
    if !can_be_had() {
        return;
    }
    let root = Root::new(&[]);
    let private = root.path("private");
    fs::create_dir(&private).unwrap();
    let lab = private.join("lab");
    fs::copy(env!("CARGO_BIN_EXE_lab"), &lab).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
    let steps = [step("s/one", "echo one > /one", Some(&private.join("one.img")))];
    let (archive, packages, log) = (root.path("root.tar.zst"), root.path("packages"), root.path("log"));
    bake::run(&lab, &archive, &steps, &packages, &log, LIMIT, &mut |_| ()).unwrap();
    assert_eq!(root.of_disk("private/one.img", "cat /one"), "one\n");
}
