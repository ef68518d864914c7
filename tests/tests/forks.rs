//! Forks of a running lab: the same inside, apart from each other, sharing what they have not changed.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{process::Command, time::Duration};

use lab_tests::TestLab;

const LAB: &str = r#"
name = "forked"
image = "tiny"

[node.a]
memory = "256MiB"
forward = ["8098:80"]

[node.b]
memory = "256MiB"
"#;

/// What takes the forks away, also if the test fails.
struct Forks<'a>(&'a TestLab);

impl Drop for Forks<'_> {
    fn drop(&mut self) {
        lab_tests::output(self.0.command(&["destroy", "--yes", "--all-forks"]), b"");
    }
}

/// Runs a shell command in a node of a fork; 0 is the lab itself.
fn ask(lab: &TestLab, fork: u32, node: &str, script: &str) -> String {
    let number = fork.to_string();
    let of_fork: &[&str] = if fork == 0 { &[] } else { &["--fork", &number] };
    lab.run(&[of_fork, &["exec", node, "sh", "-c", script]].concat()).trim().into()
}

fn page(port: u32) -> String {
    let answer = lab_tests::http_get(u16::try_from(port).unwrap(), "/id");
    answer.lines().last().unwrap_or_default().into()
}

#[test]
fn forks_are_the_same_and_apart() {
    let lab = TestLab::new(LAB);
    let forks = Forks(&lab);
    lab.run(&["up"]);
    assert!(lab.fails(1, &["fork", "none"]).contains("has no snapshot `none`"));
    assert!(lab.fails(1, &["--fork", "1", "up"]).contains("there is no fork 1"));
    assert!(lab.fails(1, &["exec", "--all-forks", "a", "true"]).contains("the lab has no forks"));
    ask(&lab, 0, "a", "mkdir -p /srv; echo lab >/srv/id; echo lab >/tmp/id; sync; httpd -h /srv");
    ask(&lab, 0, "b", "(while nc -l -p 7000 >>/tmp/got; do :; done) >/dev/null 2>&1 </dev/null &");
    lab.run(&["snapshot", "save", "base"]);

    // Killed on its way, it goes on.
    let mut child = lab.command(&["fork", "base", "--count", "3"]).spawn().unwrap();
    std::thread::park_timeout(Duration::from_secs(3));
    child.kill().unwrap();
    child.wait().unwrap();
    let made = || {
        let output = lab_tests::output(lab.command(&["fork", "base", "--count", "3"]), b"");
        let busy = String::from_utf8_lossy(&output.stderr).contains("another lab command");
        assert!(busy || output.status.success(), "{}", lab_tests::text(&output));
        !busy
    };
    while !made() {
        std::thread::park_timeout(Duration::from_millis(500));
    }
    assert!(made(), "all are there already");

    // The same inside: names, addresses, what ran; and each has its own from there on.
    assert!((1..=3).all(|fork| page(20_000 + 100 * fork) == "lab"));
    for fork in 1..=3 {
        let address = "ip -4 -o addr show | awk '$4 ~ /^192/ { print $4 }'";
        assert_eq!(ask(&lab, fork, "b", address), ask(&lab, 0, "b", address));
        let change = format!(
            "echo {fork} >/srv/id; echo {fork} >/tmp/id; sync; echo {fork} | nc -w 10 b 7000; ping -c 1 -W 20 b >/dev/null"
        );
        ask(&lab, fork, "a", &change);
    }
    for fork in 1..=3 {
        let own = fork.to_string();
        assert_eq!(page(20_000 + 100 * fork), own);
        assert_eq!(ask(&lab, fork, "a", "cat /tmp/id"), own);
        assert_eq!(ask(&lab, fork, "b", "cat /tmp/got"), own, "b of fork {fork} hears another's a");
    }
    assert!(page(8098) == "lab" && ask(&lab, 0, "b", "cat /tmp/got; true").is_empty());
    let all = lab.run(&["exec", "--all-forks", "a", "cat", "/srv/id"]);
    let mut lines: Vec<_> = all.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["forked-1: 1", "forked-2: 2", "forked-3: 3"]);
    assert!(
        lab.fails(1, &["exec", "--all-forks", "a", "sh", "-c", "exit 7"])
            .contains("forked-2: it ended with status 7")
    );
    let random = |fork| ask(&lab, fork, "a", "head -c 16 /dev/urandom | md5sum");
    assert_ne!(random(1), random(2));

    what_they_take_is_told(&lab);

    // One that was made but not told the time before its maker was killed is told by the next.
    ask(&lab, 1, "a", "date -s @1000000000");
    lab_tests::on_host("cd ${XDG_RUNTIME_DIR:-/run}/lab/forked-1-*/ && touch a.behind");
    lab.run(&["fork", "base", "--count", "3"]);
    let since = ask(&lab, 1, "a", "echo $(($(date +%s) - 1000000000))");
    assert!(since.parse::<u64>().unwrap() > 500_000_000, "{since} s");

    somebody_else_gets_in(&lab);

    // Each is a lab of its own, with what its nodes wrote.
    lab.run(&["--fork", "2", "snapshot", "save", "mine"]);
    lab.run(&["--fork", "2", "snapshot", "restore", "base"]);
    assert_eq!(ask(&lab, 2, "a", "cat /srv/id /tmp/id"), "lab\nlab");
    lab.run(&["--fork", "2", "snapshot", "restore", "mine"]);
    assert_eq!(ask(&lab, 2, "a", "cat /srv/id"), "2");
    lab.run(&["--fork", "3", "destroy", "--yes"]);
    assert!(!names(&lab).contains(&"forked-3".into()));

    // They need the lab no more.
    lab.run(&["destroy", "--yes", "--forget"]);
    assert_eq!(ask(&lab, 1, "a", "cat /srv/id"), "1");
    lab.run(&["--fork", "1", "restart", "a"]);
    assert_eq!(ask(&lab, 1, "a", "cat /srv/id"), "1");
    drop(forks);
    assert!(names(&lab).iter().all(|name| !name.starts_with("forked")), "{:?}", names(&lab));
}

/// With a key of their own, at the fork's port.
fn somebody_else_gets_in(lab: &TestLab) {
    let key = lab.dir().join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.unwrap().success());
    let (private, public) = (key.to_str().unwrap(), format!("{}.pub", key.display()));
    assert!(lab.fails(1, &["--fork", "2", "share", "--key", private]).contains("is a private key"));
    let way = || -> serde_json::Value {
        serde_json::from_str(&lab.run(&["--fork", "2", "share", "-o", "json", "--key", &public])).unwrap()
    };
    let told = way();
    assert_eq!(way(), told, "given twice, it is the same");
    let known = lab.dir().join("known_hosts");
    std::fs::write(&known, format!("{}\n", told["host_key"].as_str().unwrap())).unwrap();
    let enter = || {
        let mut command = Command::new("ssh");
        command.args([
            "-p",
            "20280",
            "-i",
            private,
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "BatchMode=yes",
            "-F",
            "none",
        ]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", known.display()));
        let output = lab_tests::output(
            {
                command.args(["root@127.0.0.1", "cat /srv/id"]);
                command
            },
            b"",
        );
        assert!(output.status.success(), "{}", lab_tests::text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(told["command"], "ssh -p 20280 root@127.0.0.1");
    assert_eq!(enter(), "2\n");
    // The key is the node's now, whatever else the lab gives it when it boots.
    lab.run(&["--fork", "2", "restart", "a"]);
    assert_eq!(enter(), "2\n");
    lab.run(&["--fork", "2", "exec", "a", "httpd", "-h", "/srv"]);
}

fn labs(lab: &TestLab) -> Vec<serde_json::Value> {
    serde_json::from_str(&lab.run(&["ls", "--size", "-o", "json"])).unwrap()
}

fn names(lab: &TestLab) -> Vec<String> {
    labs(lab).iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
}

/// `lab ls --size` against the file system and /proc.
fn what_they_take_is_told(lab: &TestLab) {
    let folder = lab_tests::home().join("labs/forked-1");
    let size = || {
        let entry = labs(lab).into_iter().find(|entry| entry["name"] == "forked-1").unwrap();
        move |field: &str| entry["size"][field].as_u64().unwrap()
    };
    ask(lab, 1, "a", "sync");
    let told = size();
    // Summed up over all mappings of all its processes.
    let said = lab_tests::on_host(&format!(
        "for lock in nodes/a/vmm.lock nodes/b/vmm.lock net/net.lock; do cat /proc/$(lab_pid forked-1/$lock)/smaps; done | \
         awk '/^Private_Dirty:|^Swap:/ {{ own += $2 }} /^Rss:/ {{ all += $2 }} END {{ print own * 1024, all * 1024 }}'; \
         du -s --block-size=1 {} | cut -f1",
        folder.display()
    ));
    let numbers: Vec<u64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [own, all, disk] = numbers[..] else { panic!("{said}") };
    let near = |a: u64, b: u64| a.abs_diff(b) * 100 <= b;
    let (memory, memory_shared) = (told("memory"), told("memory_shared"));
    assert!(near(memory, own), "{memory} bytes of memory were told, {own} are there");
    assert!(
        near(memory + memory_shared, all),
        "{memory} + {memory_shared} bytes of memory were told, {all} are there"
    );
    let total = told("disk") + told("disk_shared");
    assert!(near(total, disk), "{total} bytes of disk were told, {disk} are there");
    // Two nodes that have done next to nothing, and a network.
    assert!(memory < 2 * (40 << 20), "{memory} bytes of memory are its own");
    assert!(told("disk") < 2 * (5 << 20), "{} bytes of disk are its own", told("disk"));
    assert!(told("disk_shared") > 10 << 20 && told("memory_shared") > 10 << 20);
}
