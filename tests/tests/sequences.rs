//! A lab under load, saved, restored, forked, suspended and killed in random order: nothing that must last is lost.
//!
//! LAB_TEST_ROUNDS says how many (12 in scripts/test, 200 in scripts/soak), LAB_TEST_SEED repeats a run.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::{Duration, SystemTime};

use lab_tests::{TestLab, kill_after, load::Load, on_host};

/// What is done in a round.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Save,
    Restore,
    Fork,
    Suspend,
    /// Any of the above, killed on its way.
    Cut,
    /// Both machines.
    KillMachines,
    KillNetwork,
}

const DEEDS: [Deed; 8] = [
    Deed::Save,
    Deed::Restore,
    Deed::Fork,
    Deed::Suspend,
    Deed::Cut,
    Deed::Cut,
    Deed::KillMachines,
    Deed::KillNetwork,
];

/// Most snapshots at a time.
const SNAPSHOTS: usize = 3;

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

/// A snapshot, and how much was synced when it was made.
struct Saved {
    name: String,
    synced: u64,
}

#[test]
fn in_any_order_nothing_is_lost() {
    let rounds: usize = std::env::var("LAB_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("LAB_TEST_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(now);
    eprintln!("seed {seed}");
    let mut dice = Dice(seed);
    let lab = TestLab::new(
        "name = \"sequences\"\nimage = \"tiny\"\n[node.a]\nmemory = \"128MiB\"\n[node.b]\nmemory = \"128MiB\"\n",
    );
    lab.run(&["up"]);
    let load = Load::of(&lab);
    load.start();
    let mut now = load.check();
    let mut saved: Vec<Saved> = Vec::new();
    for round in 0..rounds {
        let deed = DEEDS[dice.below(DEEDS.len())];
        eprintln!("round {round} of {rounds}: {deed:?}");
        let before = now.synced;
        let name = format!("r{round}");
        // No fewer lines than these must be in the journal afterwards.
        let least = match deed {
            Deed::Restore if !saved.is_empty() => {
                let from = &saved[dice.below(saved.len())];
                lab.run(&["snapshot", "restore", &from.name]);
                from.synced
            }
            Deed::Fork if !saved.is_empty() => {
                let from = &saved[dice.below(saved.len())];
                lab.run(&["fork", &from.name]);
                check_fork(&lab, from.synced);
                before
            }
            Deed::Suspend => {
                lab.run(&["suspend"]);
                lab.run(&[["resume", "up"][dice.below(2)]]);
                before
            }
            Deed::Cut => {
                let delay = Duration::from_millis(dice.below(5000) as u64);
                let from = (!saved.is_empty()).then(|| &saved[dice.below(saved.len())]);
                match (dice.below(4), from) {
                    (0, Some(from)) => {
                        kill_after(&lab, &["snapshot", "restore", &from.name], delay);
                        lab.up_after_kill();
                        from.synced.min(before)
                    }
                    (1, Some(from)) => {
                        kill_after(&lab, &["fork", &from.name], delay);
                        lab.after_kill(&["fork", &from.name]);
                        check_fork(&lab, from.synced);
                        before
                    }
                    (2, _) => {
                        kill_after(&lab, &["suspend"], delay);
                        lab.up_after_kill();
                        before
                    }
                    _ => {
                        if !kill_after(&lab, &["snapshot", "save", &name], delay) {
                            saved.push(Saved { name, synced: before });
                        }
                        lab.up_after_kill();
                        before
                    }
                }
            }
            Deed::KillMachines => {
                on_host(
                    "kill -9 $(lab_pid sequences/nodes/a/vmm.lock) $(lab_pid sequences/nodes/b/vmm.lock)",
                );
                lab.up_after_kill();
                let written = load.check_journal();
                assert!(written >= before, "{before} lines were synced, {written} are there");
                load.start();
                0
            }
            Deed::KillNetwork => {
                on_host("kill -9 $(lab_pid sequences/net/net.lock)");
                lab.up_after_kill();
                before
            }
            Deed::Save | Deed::Restore | Deed::Fork => {
                lab.run(&["snapshot", "save", &name]);
                saved.push(Saved { name, synced: before });
                before
            }
        };
        now = load.check();
        load.wait_for_more(now.got);
        assert!(now.written >= least, "{least} lines were synced, {} are there", now.written);
        if saved.len() > SNAPSHOTS {
            let gone = saved.swap_remove(dice.below(saved.len()));
            lab.run(&["snapshot", "rm", &gone.name]);
        }
    }
}

/// The first fork goes on as the lab did, and goes.
fn check_fork(lab: &TestLab, least: u64) {
    let load = Load::of_fork(lab, 1);
    let now = load.check();
    load.wait_for_more(now.got);
    assert!(now.written >= least, "{least} lines were synced, {} are there in the fork", now.written);
    lab.run(&["--fork", "1", "destroy", "--yes"]);
}
