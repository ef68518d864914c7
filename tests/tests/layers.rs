//! Layers: what is baked once is not done again, for other nodes, in other labs, after `lab destroy`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lab_tests::{TestLab, disk_contents::Contents, long};

/// A lab with two baked steps, the second of them for b alone. `mark` makes its layers its own; `two` is what step two
/// writes.
fn labfile(name: &str, mark: u32, two: &str) -> String {
    format!(
        r#"
name = "{name}"
image = "tiny"
[node.a]
memory = "128MiB"
disk = "256MiB"
[node.b]
memory = "128MiB"
disk = "256MiB"
[[step]]
name = "late"
run = "cat /root/one >/root/late"
[[step]]
name = "one"
bake = true
run = ": {mark}; head -c 8 /dev/urandom | md5sum >/root/one"
[[step]]
name = "two"
bake = true
on = "b"
run = "cat /root/one >/root/two; echo {two} >>/root/two"
"#
    )
}

fn cat(lab: &TestLab, node: &str, file: &str) -> String {
    let (status, text) = lab.shell(node, &format!("cat {file}"), b"");
    assert_eq!(status, Some(0), "{node}: {file}");
    text
}

/// Runs `lab up`; what it said.
fn up(lab: &TestLab, arguments: &[&str]) -> String {
    let output = lab_tests::output(lab.command(&[&["up"], arguments].concat()), b"");
    assert!(output.status.success(), "{}", lab_tests::text(&output));
    String::from_utf8(output.stderr).unwrap()
}

fn layers(lab: &TestLab) -> Vec<serde_json::Value> {
    serde_json::from_str(&lab.run(&["layer", "ls", "-o", "json"])).unwrap()
}

/// Keys of the layers of a step.
fn all_keys(lab: &TestLab, step: &str) -> Vec<String> {
    let of_step = layers(lab).into_iter().filter(|layer| layer["step"] == step);
    of_step.map(|layer| layer["key"].as_str().unwrap().to_owned()).collect()
}

fn states(lab: &TestLab, action: &str) -> Vec<String> {
    let plan: serde_json::Value = serde_json::from_str(&lab.run(&["plan", "-o", "json"])).unwrap();
    let of_action = plan.as_array().unwrap().iter().filter(|entry| entry["action"] == action);
    of_action.map(|entry| entry["state"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_is_baked_is_done_once() {
    let mark = std::process::id();
    let lab = TestLab::new(&labfile("baked", mark, "2"));
    // Others may be there, of a test that was cut off.
    let old = [all_keys(&lab, "step/one"), all_keys(&lab, "step/two")].concat();
    let keys = |lab: &TestLab, step: &str| {
        let all = all_keys(lab, step).into_iter();
        all.filter(|key| !old.contains(key)).collect::<Vec<_>>()
    };

    // Killed while a layer is made: none is there, and nothing of it runs on.
    let mut child = lab.command(&["up"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let making = lab_tests::home().join("labs");
    let made = |start: &str| {
        let names = std::fs::read_dir(&making).into_iter().flatten().flatten().map(|entry| entry.path());
        names
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(start))
            .collect::<Vec<_>>()
    };
    let end = Instant::now() + Duration::from_secs(120);
    while !made(".build-").iter().any(|path| path.join("nodes/build/vmm.log").exists()) {
        assert!(Instant::now() < end, "no layer is being made after two minutes");
        std::thread::park_timeout(Duration::from_millis(100));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    lab.up_after_kill();
    assert!(made(".build-").is_empty(), "{:?}", made(".build-"));
    assert_eq!((keys(&lab, "step/one").len(), keys(&lab, "step/two").len()), (1, 1));

    // Once for both nodes, and before what is not baked.
    let one = cat(&lab, "a", "/root/one");
    assert_eq!(cat(&lab, "b", "/root/one"), one);
    assert_eq!(cat(&lab, "b", "/root/two"), format!("{one}2\n"));
    assert_eq!(cat(&lab, "a", "/root/late"), one);
    assert_ne!(lab.shell("a", "cat /root/two", b"").0, Some(0), "step two is for b alone");
    assert_eq!(states(&lab, "layer step/one"), ["not needed"]);

    // In another lab.
    let other = TestLab::new(&labfile("baked-too", mark, "2"));
    assert_eq!(states(&other, "layer step/two"), ["cached"]);
    assert_eq!(states(&other, "step/one"), ["in its layer", "in its layer"]);
    let said = up(&other, &["--fresh"]);
    assert!(!said.contains("step/one") && !said.contains("step/two"), "{said}");
    assert_eq!(cat(&other, "b", "/root/two"), format!("{one}2\n"));
    other.run(&["destroy", "--yes", "--forget"]);

    // A step that has changed: in nodes that are there it runs; for new ones it and what follows it is made again.
    lab.rewrite(&labfile("baked", mark, "3"));
    let said = up(&lab, &[]);
    assert!(said.contains("step/two") && !said.contains("layer") && !said.contains("step/one"), "{said}");
    assert_eq!(cat(&lab, "b", "/root/two"), format!("{one}3\n"));
    lab.run(&["destroy", "--yes", "b"]);
    let said = up(&lab, &[]);
    assert!(said.contains("layer step/two") && !said.contains("step/one"), "{said}");
    assert_eq!(cat(&lab, "b", "/root/two"), format!("{one}3\n"));
    assert_eq!(keys(&lab, "step/two").len(), 2);

    // What a lab stands on is kept, also by the snapshot of its first up; what is removed is not missed by it.
    lab.run(&["layer", "prune"]);
    assert_eq!((keys(&lab, "step/one").len(), keys(&lab, "step/two").len()), (1, 2));
    lab.run(&["layer", "rm", &keys(&lab, "step/one")[0]]);
    assert!(keys(&lab, "step/one").is_empty() && keys(&lab, "step/two").is_empty());
    assert!(lab.fails(1, &["layer", "rm", "0000zz"]).contains("there is no layer `0000zz`"));
    lab.run(&["restart", "b"]);
    assert_eq!(cat(&lab, "b", "/root/two"), format!("{one}3\n"));
}

/// What may differ between a layer that was made without a node and one that was made in a node: logs, what the boot of
/// that leaves, and what daemons make at their first start, which is in the node that stands on the layer otherwise.
const MAY_DIFFER: [&str; 9] = [
    "etc/cni",
    "etc/machine-id",
    "tmp/",
    "var/cache/ldconfig/",
    "var/lib/containerd",
    "var/lib/dbus/machine-id",
    "var/lib/docker",
    "var/lib/systemd/linger",
    "var/log/",
];

/// The image's files are put aside, without which layers are made in nodes; they come back with the end of the value.
struct WithoutFiles {
    files: PathBuf,
    aside: PathBuf,
}

impl WithoutFiles {
    fn of(image: &Path) -> Self {
        let (files, aside) = (image.join("root.tar.zst"), image.join("root.tar.zst.aside"));
        std::fs::rename(&files, &aside).unwrap();
        Self { files, aside }
    }
}

impl Drop for WithoutFiles {
    fn drop(&mut self) {
        std::fs::rename(&self.aside, &self.files).unwrap();
    }
}

/// Makes the first layer of a stack without a node and in one, and compares what is on them.
fn the_same_both_ways(stack: &str, step: &str) {
    if !lab_tests::emulated() {
        eprintln!("\nSKIPPED: layers without a node: where KVM works, they are made in nodes");
        return;
    }
    let name = format!("both-ways-{stack}");
    let lab = TestLab::new(&format!(
        r#"
name = "{name}"
image = "debian-13"
[node.a]
role = "worker"
cpus = 2
memory = "2GiB"
disk = "8GiB"
[stack.{stack}]
"#
    ));
    let made = || {
        let keys = all_keys(&lab, step);
        assert_eq!(keys.len(), 1, "{step}");
        let of_lab = lab_tests::home().join("labs").join(&name);
        Contents::of(&of_lab.join("layers").join(&keys[0]).join("overlay.qcow2"))
    };
    let forget = || {
        lab.run(&["destroy", "--yes", "--forget"]);
        for key in all_keys(&lab, step) {
            lab.run(&["layer", "rm", &key]);
        }
    };

    forget();
    let said = up(&lab, &[]);
    assert!(!said.contains("baked in a node"), "{said}");
    let without = made();
    forget();

    let put_aside = WithoutFiles::of(&lab_tests::home().join("images/debian-13"));
    up(&lab, &[]);
    drop(put_aside);
    let within = made();
    forget();

    let (expected, found): (Vec<_>, Vec<_>) = without
        .differences(&within)
        .into_iter()
        .partition(|line| MAY_DIFFER.iter().any(|start| line.starts_with(start)));
    // Both have been read, and only one of them has booted.
    assert!(expected.iter().any(|line| line.starts_with("etc/machine-id: ")), "{expected:?}");
    assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
}

#[test]
fn a_layer_is_the_same_without_a_node() {
    the_same_both_ways("prometheus", "prometheus/exporter");
}

#[test]
fn docker_s_layer_is_the_same_without_a_node() {
    if long("Docker's layer, made in both ways") {
        the_same_both_ways("docker", "docker/install");
    }
}
