//! Snapshots of a whole running lab: saved, changed, restored, interrupted, damaged.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use lab_tests::{OtherHome, TestLab, kill_after, lab_host, load::Load, scratch};

/// A lab of two small nodes under a name of its own.
fn labfile(name: &str) -> String {
    format!(
        r#"
name = "{name}"
image = "tiny"

[node.a]
memory = "128MiB"

[node.b]
memory = "128MiB"
disks = ["64MiB"]
"#
    )
}

fn ask(lab: &TestLab, node: &str, script: &str) -> String {
    let (status, said) = lab.shell(node, script, b"");
    assert_eq!(status, Some(0), "{node}: {script}: {said}");
    said.trim().into()
}

fn number(lab: &TestLab, node: &str, script: &str) -> u64 {
    ask(lab, node, script).parse().unwrap_or(0)
}

fn snapshots(lab: &TestLab) -> Vec<String> {
    let list: serde_json::Value = serde_json::from_str(&lab.run(&["snapshot", "ls", "-o", "json"])).unwrap();
    list.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
}

/// The lab's folder below LAB_HOME.
fn folder(name: &str) -> std::path::PathBuf {
    lab_tests::home().join("labs").join(name)
}

fn layers(name: &str) -> usize {
    std::fs::read_dir(folder(name).join("layers")).map_or(0, Iterator::count)
}

#[test]
fn a_running_lab_comes_back_as_it_was() {
    let name = "snap";
    let lab = TestLab::new(&labfile(name));
    lab.run(&["up"]);
    assert!(lab.fails(1, &["snapshot", "restore", "none"]).contains("has no snapshot `none`"));
    let load = Load::of(&lab);
    load.start();
    ask(&lab, "b", "dd if=/dev/urandom of=/dev/vdb bs=1M count=4 2>/dev/null; md5sum </dev/vdb >/tmp/vdb");
    load.wait_for_more(10);
    lab.run(&["snapshot", "save", "one"]);
    assert!(lab.fails(1, &["snapshot", "save", "one"]).contains("has a snapshot `one`"));
    assert!(lab.fails(1, &["snapshot", "save", "../x"]).contains("is no name"));
    // It went on after it was saved.
    let at_least = load.wait_for_more(load.got());
    load.check();
    ask(&lab, "a", "echo later >/root/later; echo later >/tmp/later; sync");
    ask(&lab, "b", "dd if=/dev/zero of=/dev/vdb bs=1M count=4 2>/dev/null; sync");

    for _ in 0..2 {
        lab.run(&["snapshot", "restore", "one"]);
        assert_eq!(ask(&lab, "a", "ls /root/later /tmp/later 2>/dev/null; true"), "");
        assert_eq!(ask(&lab, "b", "md5sum </dev/vdb | cmp - /tmp/vdb && echo same"), "same");
        // The connection from before goes on, over and beyond what came after the snapshot.
        load.wait_for_more(at_least);
        load.check();
        assert_eq!(ask(&lab, "a", "ping -c 1 -W 20 b >/dev/null && echo there"), "there");
    }
    for node in ["a", "b"] {
        let kernel = ask(&lab, node, "dmesg");
        assert!(kernel.contains("crng reseeded due to virtual machine fork"), "{node}: {kernel}");
    }
    let random = |node| ask(&lab, node, "head -c 16 /dev/urandom | md5sum");
    assert_ne!(random("a"), random("b"));

    // A snapshot of a restored lab; with it, nothing depends on the first one any more.
    ask(&lab, "a", "echo second >/root/second; sync");
    lab.run(&["snapshot", "save", "two"]);
    assert_eq!(snapshots(&lab), ["first-up", "one", "two"]);
    lab.run(&["snapshot", "rm", "one"]);
    lab.run(&["snapshot", "restore", "two"]);
    assert_eq!(ask(&lab, "a", "cat /root/second"), "second");
    load.check();
    assert!(lab.run(&["up"]).contains("running"));

    // A damaged one is refused, and what is on the disks then is what was there when it was made.
    ask(&lab, "a", "rm /root/second; sync");
    let memory = folder(name).join("snapshots/two/a/memory");
    let file = std::fs::OpenOptions::new().write(true).open(memory).unwrap();
    file.write_all_at(&[0x5a; 4096], 1 << 20).unwrap();
    let why = lab.fails(1, &["snapshot", "restore", "two"]);
    assert!(why.contains("a: ") && why.contains("it is damaged"), "{why}");
    lab.run(&["up"]);
    assert_eq!(ask(&lab, "a", "cat /root/second"), "second");
    // Layers go with the last that stands on them.
    lab.run(&["snapshot", "rm", "two"]);
    assert!(snapshots(&lab) == ["first-up"] && layers(name) >= 3, "{} layers", layers(name));
    lab.run(&["snapshot", "rm", "first-up"]);
    lab.run(&["destroy", "--yes", "a", "b"]);
    assert_eq!(layers(name), 0, "layers that nothing stands on");
}

/// Changes what a snapshot's CPUs were told by a leaf of CPUID: EAX to EDX. The format is that of vmm/src/snapshot.
fn change_cpuid(state: &Path, leaf: u32, change: impl Fn(&mut [u32; 4])) {
    const HEADER: usize = 32;
    let mut bytes = std::fs::read(state).unwrap();
    let mut body: serde_json::Value = serde_json::from_slice(&bytes[HEADER..]).unwrap();
    let cpus = body["cpus"].as_array_mut().unwrap().iter_mut();
    for entry in cpus.flat_map(|cpu| cpu["cpuid"].as_array_mut().unwrap()) {
        // struct kvm_cpuid_entry2, byte by byte.
        let raw: Vec<u8> = serde_json::from_value(entry.clone()).unwrap();
        let mut words: Vec<u32> =
            raw.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        if words[0] == leaf {
            change((&mut words[3..7]).try_into().unwrap());
            *entry = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        }
    }
    let body = serde_json::to_vec(&body).unwrap();
    bytes.truncate(HEADER);
    bytes[20..24].copy_from_slice(&crc32fast::hash(&body).to_le_bytes());
    bytes[24..32].copy_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend(body);
    std::fs::write(state, bytes).unwrap();
}

#[test]
fn a_destroyed_lab_is_up_again_at_once() {
    let text = |step: &str| {
        let id = "head -c 8 /dev/urandom | md5sum >/tmp/id; cp /tmp/id /root/id";
        labfile("kept") + &format!("[[step]]\nname = \"id\"\non = \"a\"\nrun = \"{id}{step}\"\n")
    };
    let lab = TestLab::new(&text(""));
    let up = |arguments: &[&str]| {
        let said = lab_tests::output(lab.command(arguments), b"");
        assert!(said.status.success(), "{}", lab_tests::text(&said));
        // In memory and on the disk.
        assert_eq!(ask(&lab, "a", "cmp /tmp/id /root/id && echo same"), "same");
        assert_eq!(ask(&lab, "b", "ping -c 1 -W 20 a >/dev/null && echo there"), "there");
        (ask(&lab, "a", "cat /tmp/id"), String::from_utf8(said.stderr).unwrap())
    };
    let (first, _) = up(&["up"]);
    assert_eq!(snapshots(&lab), ["first-up"]);
    ask(&lab, "a", "echo mess >/tmp/id; echo mess >/root/id; sync");
    lab.run(&["destroy", "--yes"]);
    let (second, said) = up(&["up"]);
    assert_eq!(second, first, "{said}");
    // What the snapshot was made from need not be there any more.
    lab.run(&["destroy", "--yes"]);
    assert_eq!(up(&["up"]).0, first);
    lab.run(&["destroy", "--yes"]);
    let (fresh, said) = up(&["up", "--fresh"]);
    assert_ne!(fresh, first, "{said}");
    // Something that matters.
    lab.run(&["destroy", "--yes"]);
    lab.rewrite(&text("; true"));
    let (changed, said) = up(&["up"]);
    assert!(changed != fresh && said.contains("since a: step/id has changed"), "{said}");
    // Something that does not.
    lab.run(&["destroy", "--yes"]);
    lab.rewrite(&(text("; true") + "[[check]]\nname = \"c\"\nrun = \"true\"\n"));
    assert_eq!(up(&["up"]).0, changed);
    assert!(lab.run(&["check"]).contains("c"));
    // What is in the way and no fault of the snapshot's: it is there the next time.
    lab.run(&["destroy", "--yes"]);
    let log = folder("kept").join("net/net.log");
    std::fs::create_dir_all(&log).unwrap();
    assert!(lab.fails(1, &["up"]).contains("net.log"));
    std::fs::remove_dir(&log).unwrap();
    assert_eq!(up(&["up"]).0, changed);
    // Made on another core of a processor, whose caches are not the same: it goes on.
    lab.run(&["destroy", "--yes"]);
    let state = lab_tests::home().join("kept/kept/snapshots/first-up/a/state");
    for leaf in [2, 4, 0x8000_0005, 0x8000_0006, 0x8000_001d] {
        change_cpuid(&state, leaf, |registers| {
            registers.iter_mut().for_each(|register| *register ^= 0x0101_0000)
        });
    }
    assert_eq!(up(&["up"]).0, changed);
    // Made on a processor with a feature that this one lacks: that is told, and all is done again.
    lab.run(&["destroy", "--yes"]);
    change_cpuid(&state, 7, |[_, ebx, ..]| *ebx |= 1 << 22);
    let (changed, said) = up(&["up"]);
    assert!(said.contains("does not offer: bit 22 of Ebx in CPUID 0x7.0"), "{said}");
    // A damaged one, too.
    lab.run(&["destroy", "--yes"]);
    std::fs::write(&state, "no state").unwrap();
    let (again, said) = up(&["up"]);
    assert!(again != changed && said.contains("is of no use"), "{said}");
    lab.run(&["destroy", "--yes", "--forget"]);
    let (last, _) = up(&["up"]);
    assert_ne!(last, again);
    lab.run(&["destroy", "--yes", "--forget"]);
}

#[test]
fn a_suspended_lab_goes_on_once() {
    let lab = TestLab::new(&labfile("suspended"));
    lab.run(&["up"]);
    assert!(lab.fails(1, &["resume"]).contains("is not suspended"));
    let load = Load::of(&lab);
    load.start();
    let mut got = load.wait_for_more(5);
    for back in ["resume", "up", "restart"] {
        lab.run(&["suspend"]);
        assert_eq!(lab.state_of("a"), "suspended");
        let (status, _) = lab.shell("a", "true", b"");
        assert_ne!(status, Some(0), "a suspended node runs nothing");
        lab.run(&[back]);
        assert_eq!(lab.state_of("a"), "running");
        got = load.wait_for_more(got);
        load.check();
        assert_eq!(snapshots(&lab), ["first-up"], "it goes on once");
        assert!(lab.fails(1, &["resume"]).contains("is not suspended"));
    }
    // The machine that labs run on is another one.
    if lab_tests::emulated() {
        lab.run(&["suspend"]);
        lab_host(None, &["stop", "--force"]);
        lab_host(None, &["start"]);
        lab.run(&["resume"]);
        got = load.wait_for_more(got);
        load.check();
    }
    // Cut off at any moment, it is still there, suspended or not.
    for delay in [400, 1500, 2500] {
        kill_after(&lab, &["suspend"], Duration::from_millis(delay));
        lab.up_after_kill();
        got = load.wait_for_more(got);
        load.check();
    }
    lab.run(&["suspend"]);
    for delay in [700, 2000, 3500] {
        kill_after(&lab, &["resume"], Duration::from_millis(delay));
    }
    lab.up_after_kill();
    load.wait_for_more(got);
    load.check();
    // One that is damaged: nothing is lost but what was in memory.
    ask(&lab, "a", "echo there >/root/there; echo there >/tmp/there; sync");
    lab.run(&["suspend"]);
    std::fs::write(folder("suspended").join("snapshots/suspended/a/state"), "no state").unwrap();
    let up = lab_tests::output(lab.command(&["up"]), b"");
    let said = String::from_utf8_lossy(&up.stderr);
    assert!(up.status.success() && said.contains("it does not begin as a snapshot does"), "{said}");
    assert_eq!(ask(&lab, "a", "cat /root/there /tmp/there 2>/dev/null; true"), "there");
    assert_eq!(snapshots(&lab), ["first-up", "not-resumed"]);
}

#[test]
fn a_kill_leaves_the_old_or_the_new() {
    let lab = TestLab::new(&labfile("snapkill"));
    lab.run(&["up"]);
    ask(&lab, "a", "echo old >/root/state; sync");
    let mut known = Vec::new();
    for (round, delay) in [300, 900, 1500, 2200].into_iter().enumerate() {
        let name = format!("s{round}");
        kill_after(&lab, &["snapshot", "save", &name], Duration::from_millis(delay));
        lab.up_after_kill();
        assert_eq!(ask(&lab, "a", "cat /root/state"), "old");
        assert_eq!(ask(&lab, "b", "ping -c 1 -W 20 a >/dev/null && echo there"), "there");
        let now = snapshots(&lab);
        assert!(known.iter().all(|name| now.contains(name)), "{known:?}, then {now:?}");
        known = now;
    }
    lab.run(&["snapshot", "save", "last"]);
    for delay in [400, 1200, 2000, 3000] {
        ask(&lab, "a", "echo new >/root/state; sync");
        kill_after(&lab, &["snapshot", "restore", "last"], Duration::from_millis(delay));
        lab.up_after_kill();
        let state = ask(&lab, "a", "cat /root/state");
        assert!(["old", "new"].contains(&&*state), "{state}");
        assert_eq!(ask(&lab, "b", "ping -c 1 -W 20 a >/dev/null && echo there"), "there");
    }
    // Those that are listed are whole.
    for name in snapshots(&lab).iter().filter(|name| *name != "first-up") {
        lab.run(&["snapshot", "restore", name]);
        assert_eq!(ask(&lab, "a", "cat /root/state"), "old");
    }
}

#[test]
fn an_exported_lab_goes_on_where_nothing_else_is() {
    let name = "exported";
    let text = format!(
        "name = \"{name}\"\nimage = \"tiny\"\n[node.a]\nmemory = \"128MiB\"\n\
         [[step]]\nname = \"own\"\nscript = \"scripts/own.sh\"\n"
    );
    let there = scratch();
    let file = there.path().join("before.lab");
    let shown = file.to_str().unwrap();
    let export = ["snapshot", "export", "before", shown];
    let counted;
    {
        let lab = TestLab::new(&text);
        std::fs::create_dir(lab.dir().join("scripts")).unwrap();
        std::fs::write(lab.dir().join("scripts/own.sh"), "echo own >/root/own\n").unwrap();
        assert!(lab.fails(1, &["up", "--locked"]).contains("lab.lock"));
        lab.run(&["up"]);
        lab.run(&["up", "--locked"]);
        let count = "(i=0; while :; do i=$((i+1)); echo $i >/tmp/n; mv /tmp/n /tmp/count; sleep 0.2; done)";
        ask(&lab, "a", &format!("echo there >/root/there; sync; {count} >/dev/null 2>&1 </dev/null &"));
        ask(&lab, "a", "until [ -e /tmp/count ]; do sleep 0.1; done");
        counted = number(&lab, "a", "cat /tmp/count");
        lab.run(&["snapshot", "save", "before"]);
        assert!(lab.fails(1, &["snapshot", "export", "none", shown]).contains("has no snapshot `none`"));
        for delay in [100, 300] {
            if !kill_after(&lab, &export, Duration::from_millis(delay)) || file.exists() {
                std::fs::remove_file(&file).unwrap();
            }
        }
        lab.run(&export);
        assert!(lab.fails(1, &export).contains("exists already"));
        assert_eq!(std::fs::read_dir(there.path()).unwrap().count(), 1, "nothing else is left");
    }
    let home = OtherHome::new();
    let lab = TestLab::to_import(home.path());
    let folder = lab.folder().to_str().unwrap();
    let import = ["snapshot", "import", shown, folder];
    for delay in [50, 200, 500] {
        if !kill_after(&lab, &import, Duration::from_millis(delay))
            || home.path().join("labs").join(name).exists()
        {
            lab.run(&["destroy", "--yes"]);
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
    lab.run(&import);
    assert!(lab.fails(1, &import).contains("there is a lab `exported` already"));
    assert_eq!(snapshots(&lab), ["before"]);
    assert_eq!(lab.state_of("a"), "absent");
    lab.run(&["snapshot", "restore", "before"]);
    assert_eq!(ask(&lab, "a", "cat /root/there /root/own"), "there\nown");
    let end = Instant::now() + Duration::from_secs(60);
    while number(&lab, "a", "cat /tmp/count") <= counted + 5 {
        assert!(Instant::now() < end, "what ran does not go on");
    }
    // All that it is made from came along; nothing was built.
    lab.run(&["up", "--locked"]);
    assert!(!home.path().join("images").exists());
    std::fs::write(lab.folder().join("scripts/own.sh"), "echo other >/root/own\n").unwrap();
    assert!(lab.fails(1, &["up", "--locked"]).contains("step own: was "));
    assert_eq!(ask(&lab, "a", "cat /root/own"), "own");
}
