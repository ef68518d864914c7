//! Interrupted at random moments, the next `lab up` converges, and no file that a node had synced is lost.
//!
//! LAB_TEST_KILLS says how many kills (4 in scripts/test, 20 and more in scripts/soak), LAB_TEST_SEED repeats a run.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    process::Stdio,
    time::{Duration, SystemTime},
};

use lab_tests::{TestLab, emulated, free_port, home, on_host};

/// What is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    /// A `lab up` at work, by SIGKILL.
    Command,
    /// A `lab up` at work, by Ctrl-C.
    Interrupt,
    /// A node's `lab-vmm`.
    Machine,
    /// The lab's `lab-net`.
    Network,
    /// The emulated host; where there is none, everything of the lab at once.
    Host,
}

const VICTIMS: [Victim; 5] =
    [Victim::Machine, Victim::Command, Victim::Network, Victim::Host, Victim::Interrupt];

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *seed >> 33
}

#[test]
fn killed_at_random_moments_it_converges_and_keeps_what_was_synced() {
    let kills: usize = std::env::var("LAB_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let mut seed = std::env::var("LAB_TEST_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(now);
    eprintln!("seed {seed}");
    let lab = TestLab::new(
        "name = \"kills\"\nimage = \"tiny\"\n[node.\"n{n}\"]\ncount = 2\nmemory = \"128MiB\"\ndisk = \"256MiB\"\n\
         [[step]]\nname = \"mark\"\nrun = \"echo done > /mark\"\n",
    );
    lab.run(&["up"]);
    let mut synced: Vec<String> = Vec::new();
    for round in 0..kills {
        let victim = VICTIMS[round % VICTIMS.len()];
        let wait = Duration::from_millis(random(&mut seed) % 4000);
        eprintln!("round {round}: {victim:?} after {wait:?}");
        let file = format!("/srv/{round}");
        let (status, _) = lab.shell("n1", &format!("mkdir -p /srv; echo {round} > {file}; sync"), b"");
        assert_eq!(status, Some(0));
        synced.push(file);
        kill(&lab, victim, wait);
        lab.run(&["up"]);
        let (status, said) = lab.shell("n1", &format!("cat {} /mark", synced.join(" ")), b"");
        let expected: String = (0..=round).map(|n| format!("{n}\n")).collect::<String>() + "done\n";
        assert_eq!((status, said), (Some(0), expected), "after round {round}, {victim:?}");
        let (status, _) = lab.shell("n2", "ping -c 1 -W 20 n1", b"");
        assert_eq!(status, Some(0), "the network works after round {round}, {victim:?}");
    }
}

fn kill(lab: &TestLab, victim: Victim, wait: Duration) {
    match victim {
        Victim::Command | Victim::Interrupt => {
            // There must be something to do for it.
            lab.run(&["halt", "--force", "n2"]);
            let mut up = lab.command(&["up"]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
            std::thread::sleep(wait);
            let signal = if matches!(victim, Victim::Interrupt) { "INT" } else { "KILL" };
            let pid = up.id().to_string();
            drop(std::process::Command::new("kill").args([&format!("-{signal}"), &pid]).status());
            up.wait().unwrap();
            lab.up_after_kill();
        }
        Victim::Machine => {
            on_host(&format!("sleep {}; kill -9 $(lab_pid kills/nodes/n1/vmm.lock)", wait.as_secs_f32()));
        }
        Victim::Network => drop(on_host("kill -9 $(lab_pid kills/net/net.lock)")),
        Victim::Host if emulated() => {
            // The process that stands for it; QEMU dies with it.
            let state = std::fs::read_to_string(home().join("host/machine")).unwrap();
            let state: serde_json::Value = serde_json::from_str(&state).unwrap();
            let pid = state["pid"].as_u64().unwrap().to_string();
            assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        }
        Victim::Host => drop(on_host(
            "kill -9 $(lab_pid kills/nodes/n1/vmm.lock) $(lab_pid kills/nodes/n2/vmm.lock) $(lab_pid kills/net/net.lock)",
        )),
    }
}

#[test]
fn two_labs_at_once_do_not_meet() {
    let text = |name: &str, port: u16| {
        format!(
            "name = \"{name}\"\nimage = \"tiny\"\n[network]\nsubnet = \"10.78.0.0/24\"\n[node.a]\nip = \"10.78.0.10\"\nmemory = \"128MiB\"\ndisk = \"256MiB\"\nforward = [\"{port}:22\"]\n"
        )
    };
    let (one, two) = (TestLab::new(&text("one", free_port())), TestLab::new(&text("two", free_port())));
    one.run(&["up"]);
    two.run(&["up"]);
    one.shell("a", "echo one > /who", b"");
    two.shell("a", "echo two > /who", b"");
    assert_eq!(one.shell("a", "cat /who", b"").1, "one\n");
    assert_eq!(two.shell("a", "cat /who", b"").1, "two\n");
    let labs: serde_json::Value = serde_json::from_str(&one.run(&["ls", "-o", "json"])).unwrap();
    assert_eq!(labs.as_array().unwrap().iter().filter(|lab| lab["running"] == 1).count(), 2, "{labs:#}");
    one.run(&["destroy", "--yes"]);
    assert_eq!(two.shell("a", "cat /who", b"").1, "two\n");
}
