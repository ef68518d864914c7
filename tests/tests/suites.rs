//! Nodes of other Debian releases than the one that all other tests are about: booted, used, saved, restored, powered off.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_tests::{TestLab, long, output, text};

/// What differs from release to release is how a node is entered, named, told the time and switched off, and what systemd has
/// that a virtual machine does not want.
fn lives(image: &str, release: &str) {
    let lab = TestLab::new(&format!(
        "name = \"suite\"\nimage = \"{image}\"\n[network]\nsubnet = \"10.90.0.0/24\"\n\
         [node.a]\nmemory = \"512MiB\"\ndisk = \"3GiB\"\n"
    ));
    lab.run(&["up"]);
    let (status, said) = lab.shell(
        "a",
        "systemctl is-system-running --wait; . /etc/os-release; echo $PRETTY_NAME; hostname; getent hosts a; \
         setpriv --reuid 65534 --regid 65534 --clear-groups ping -qc 1 10.90.0.1 >/dev/null; echo $?; \
         systemctl start lab-growfs; df --output=size -BM / | tail -n 1 | tr -dc 0-9",
        b"",
    );
    let lines: Vec<&str> = said.lines().collect();
    assert!(status == Some(0) && lines.len() == 6, "{status:?} {said}");
    assert_eq!((lines[0], lines[2], lines[4]), ("running", "a", "0"), "{said}");
    assert!(lines[1].contains(release), "{said}");
    assert!(lines[3].starts_with("10.90.0.10 "), "{said}");
    assert!(lines[5].parse::<u32>().is_ok_and(|mib| mib > 2500), "{said}");
    let (status, said) =
        lab.shell("a", "apt-get -qq update && apt-cache policy hello | grep -c Candidate", b"");
    assert_eq!((status, said.trim()), (Some(0), "1"));

    // What is left running is there after a restore, and what was done since is not.
    lab.shell("a", "nohup sleep 9999 >/dev/null 2>&1 &", b"");
    lab.run(&["snapshot", "save", "one"]);
    lab.run(&["cp", "lab.toml", "a:/srv/since"]);
    assert_eq!(lab.shell("a", "test -s /srv/since", b"").0, Some(0));
    lab.run(&["snapshot", "restore", "one"]);
    let (status, said) = lab.shell("a", "pgrep -xc sleep; ls /srv; date +%s", b"");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (count, clock) = said.trim().split_once('\n').unwrap();
    assert!(status == Some(0) && count == "1", "{status:?} {said}");
    assert!(clock.parse::<u64>().unwrap().abs_diff(now) <= 5, "{said}, and it is {now}");

    // The power button ends it in order, and it comes back with what was written.
    lab.run(&["cp", "lab.toml", "a:/srv/since"]);
    lab.run(&["halt"]);
    assert_eq!(lab.state_of("a"), "stopped");
    lab.run(&["up"]);
    assert_eq!(lab.shell("a", "test -s /srv/since", b"").0, Some(0));
}

#[test]
fn a_node_of_debian_12() {
    lives("debian-12", "bookworm");
}

/// Unstable changes every day: one that can't be installed today is no fault of lab's.
#[test]
fn a_node_of_debian_sid() {
    if !long("a node of Debian sid") {
        return;
    }
    let lab = TestLab::new("name = \"sid\"\nimage = \"debian-sid\"\n[node.a]\n");
    let built = output(lab.command(&["image", "build", "debian-sid"]), b"");
    let said = text(&built);
    let today = [
        "are not valid today",
        "unmet dependencies",
        "Unable to correct problems",
        "Unable to locate package",
    ];
    if let Some(line) = said.lines().find(|line| today.iter().any(|reason| line.contains(reason))) {
        eprintln!("SKIPPED: a node of Debian sid: it can't be installed today: {line}");
        return;
    }
    assert!(built.status.success(), "{said}");
    lives("debian-sid", "/sid");
}
