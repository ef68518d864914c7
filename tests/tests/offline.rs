//! A bundle has all that an `up` would fetch or build: the lab comes up from it where nothing else is, and nothing is built.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::os::unix::fs::PermissionsExt;

use lab_tests::{OtherHome, TestLab, cluster, free_port, http_get, long, scratch, text};

/// A lab with a baked and an ordinary step, which take files along.
fn labfile(two: &str) -> String {
    format!(
        r#"
name = "offline"
image = "tiny"
[node.a]
memory = "128MiB"
disk = "256MiB"
[[step]]
name = "baked"
bake = true
files = ["app"]
run = "cp -r $LAB_STEP/app /root/app; date >/root/made; echo {two} >>/root/app/list"
[[step]]
name = "own"
files = ["note"]
run = "cp $LAB_STEP/note /root/note"
"#
    )
}

fn lab(lab: TestLab, two: &str) -> TestLab {
    std::fs::create_dir_all(lab.dir().join("app/bin")).unwrap();
    let tool = lab.dir().join("app/bin/tool");
    std::fs::write(&tool, "#!/bin/sh\necho from the tool\n").unwrap();
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(lab.dir().join("note"), "a note\n").unwrap();
    lab.rewrite(&labfile(two));
    lab
}

fn ask(lab: &TestLab, script: &str) -> String {
    let (status, said) = lab.shell("a", script, b"");
    assert_eq!(status, Some(0), "{script}: {said}");
    said
}

#[test]
fn a_lab_from_a_bundle() {
    let there = scratch();
    let file = there.path().join("offline.labbundle");
    let (file, made) = {
        let lab = lab(TestLab::new(""), "one");
        let shown = file.to_str().unwrap();
        lab.run(&["bundle", "build", "--to", shown]);
        assert!(lab.fails(1, &["bundle", "build", "--to", shown]).contains("exists already"));
        assert_eq!(lab.state_of("a"), "absent", "a bundle is made without the lab");
        let said = lab.fails(1, &["snapshot", "import", shown]);
        assert!(said.contains("lab up --offline"), "{said}");
        lab.run(&["up"]);
        assert_eq!(
            ask(&lab, "/root/app/bin/tool; cat /root/note; ls -d /run/lab-step 2>&1 || true").lines().count(),
            3
        );
        assert_eq!(
            ask(&lab, "/root/app/bin/tool; cat /root/app/list /root/note"),
            "from the tool\none\na note\n"
        );
        // A file that has changed is a step that has changed.
        std::fs::write(lab.dir().join("note"), "another\n").unwrap();
        lab.run(&["up"]);
        assert_eq!(ask(&lab, "cat /root/note"), "another\n");
        (shown.to_owned(), ask(&lab, "cat /root/made"))
    };
    let home = OtherHome::new();
    let lab = lab(TestLab::at_home("", home.path()), "one");
    let damaged = there.path().join("damaged");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let said = lab.fails(1, &["up", "--offline", damaged.to_str().unwrap()]);
    assert!(said.contains("damaged at byte"), "{said}");
    assert!(!home.path().join("images/tiny").exists());

    let output = lab_tests::output(lab.command(&["up", "--offline", &file]), b"");
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("take in the bundle") && !said.contains("layer step"), "{said}");
    assert_eq!(ask(&lab, "cat /root/made"), made, "the layer is the bundle's");
    assert_eq!(ask(&lab, "/root/app/bin/tool; cat /root/note"), "from the tool\na note\n");
    lab.run(&["destroy", "--yes", "--forget"]);

    // A layer of the same key that was made elsewhere is another disk: what stands on the bundle's needs the bundle's.
    let layers: Vec<_> =
        std::fs::read_dir(home.path().join("layers")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let layer = layers.iter().map(|path| path.join("layer.json")).find(|path| path.exists()).unwrap();
    let read = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&layer).unwrap()).unwrap();
    let theirs = read();
    let mut ours = theirs.clone();
    ours["created_s"] = 1.into();
    std::fs::write(&layer, ours.to_string()).unwrap();
    lab.run(&["up", "--offline", &file]);
    assert_eq!(read(), theirs);
    lab.run(&["destroy", "--yes", "--forget"]);

    // What the bundle has not is named, and not made: neither an image nor a layer.
    lab.rewrite(&labfile("one").replace("\"tiny\"", "\"debian-13\""));
    let said = lab.fails(1, &["up", "--offline", &file]);
    assert!(said.contains("the image debian-13 is not in the bundle"), "{said}");
    lab.rewrite(&labfile("two"));
    let said = lab.fails(1, &["up", "--offline", &file]);
    assert!(said.contains("layer step/baked") && said.contains("lab bundle build"), "{said}");
}

/// Programs, packages and container images of a cluster, on a machine that reaches nobody.
#[test]
fn a_cluster_without_a_network() {
    if !long("a cluster without a network") || !cluster::can_be_had("a cluster without a network") {
        return;
    }
    let there = scratch();
    let file = there.path().join("cluster.labbundle");
    let shown = file.to_str().unwrap();
    let port = free_port();
    let labfile = {
        let lab = cluster::example("cluster-offline", port, free_port());
        lab.run(&["bundle", "build", "--to", shown]);
        std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap()
    };
    let home = OtherHome::new();
    let unplugged = home.unplug();
    let lab = TestLab::at_home(&labfile, home.path());
    lab.rewrite(&labfile.replace("[stack.kubernetes]", "[stack.kubernetes]\nsource = \"bundle\""));
    let said = lab.fails(1, &["up"]);
    assert!(said.contains("LAB_BUNDLES"), "{said}");
    lab.rewrite(&labfile);
    lab.run(&["up", "--offline", shown]);
    lab.run(&["check"]);
    assert!(http_get(port, "/").contains("hello from "));
    let (reached, said) = lab.shell("master", "curl -sS --max-time 20 http://deb.debian.org/ 2>&1", b"");
    assert!(!unplugged || reached != Some(0), "the network was there: {said}");
}
