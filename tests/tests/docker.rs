//! The flagship: labfiles/docker.toml, nodes of Debian 13 with Docker running inside, and a registry of their own. One
//! worker instead of two: emulated, each is minutes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_tests::{TestLab, free_port, http_get, output};

#[test]
fn nodes_with_docker() {
    let port = free_port();
    let lab = TestLab::example("docker.toml", |text| {
        let text = text.replacen("name = \"docker\"", "name = \"docker-test\"", 1);
        assert!(text.contains("\"8080:"), "the example forwards port 8080");
        assert!(text.contains("count = 2"), "the example has two workers");
        // What the registry mirrors is itself: no other can be reached from everywhere.
        let text = text.replace("[stack.registry]", "[stack.registry]\nmirror_of = \"https://master:5000\"");
        let text = text.replace("[stack.docker]", "[stack.docker]\nmirror = \"https://master:5001\"");
        text.replace("\"8080:", &format!("\"{port}:")).replace("count = 2", "count = 1")
    });
    lab.run(&["up"]);
    for node in ["master", "worker1"] {
        assert_eq!(lab.state_of(node), "running");
        let (status, said) = lab.shell(node, "docker info --format '{{.ServerVersion}}'", b"");
        assert_eq!(status, Some(0), "{said}");
        // An image made from what the node has, and a container of it that has run.
        let (status, said) = lab.shell(node, "docker run --rm master:5000/lab/busybox echo hello", b"");
        assert_eq!(status, Some(0), "{said}");
    }
    // From the host, through the forwarded port, to a container.
    assert!(http_get(port, "/").contains("worker1"));
    // A container on the master, to a worker's container, by the worker's name.
    let (status, said) = lab.shell(
        "master",
        "docker run --rm master:5000/lab/busybox wget -q -T 60 -O - http://worker1/",
        b"",
    );
    assert!(status == Some(0) && said.contains("worker1"), "{status:?} {said}");
    lab.run(&["check"]);
    registry(&lab);
    push(&lab);
    // Nothing is left to do.
    let plan: serde_json::Value = serde_json::from_str(&lab.run(&["plan", "-o", "json"])).unwrap();
    assert!(plan.as_array().unwrap().iter().all(|entry| entry["done"] == true), "{plan:#}");
    // A lab that was destroyed is up again as it was: nothing is installed, and the containers still run.
    let running = lab.shell("worker1", "docker ps --no-trunc --format '{{.ID}} {{.Names}}'", b"");
    lab.run(&["destroy", "--yes"]);
    let again = output(lab.command(&["up"]), b"");
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success() && said.contains("restore snapshot first-up"), "{said}");
    assert!(!said.contains("docker/install"), "{said}");
    assert_eq!(lab.shell("worker1", "docker ps --no-trunc --format '{{.ID}} {{.Names}}'", b""), running);
    assert!(http_get(port, "/").contains("worker1"));
    lab.run(&["check"]);
}

/// An image of this machine's, as an archive, gets into the registry and from there into a container.
fn push(lab: &TestLab) {
    for plugin in ["buildx", "compose"] {
        assert_eq!(lab.shell("master", &format!("docker {plugin} version"), b"").0, Some(0), "{plugin}");
    }
    let (status, said) = lab.shell(
        "master",
        "docker tag master:5000/lab/busybox example.org/ours:1 && docker save -o /root/ours.tar example.org/ours:1",
        b"",
    );
    assert_eq!(status, Some(0), "{said}");
    let archive = lab.dir().join("ours.tar");
    lab.run(&["cp", "master:/root/ours.tar", archive.to_str().unwrap()]);
    assert!(lab.run(&["image", "push", archive.to_str().unwrap()]).contains("master:5000/ours:1"));
    let (status, said) = lab.shell("worker1", "docker run --rm master:5000/ours:1 echo pushed", b"");
    assert!(status == Some(0) && said.contains("pushed"), "{status:?} {said}");
    // As if it were Docker Hub's: it comes through the mirror, which keeps it.
    let (status, said) = lab.shell("worker1", "docker pull -q lab/busybox", b"");
    assert_eq!(status, Some(0), "{said}");
    let (_, said) =
        lab.shell("master", "ls /var/lib/docker-registry-mirror/docker/registry/v2/repositories/lab", b"");
    assert_eq!(said.trim(), "busybox");
    let none = lab.fails(1, &["image", "push", "no-such-image"]);
    assert!(none.contains("docker save"), "{none}");
}

/// What was pushed is in the lab's registry, whose certificate holds on this machine, too.
fn registry(lab: &TestLab) {
    lab.run(&["forward", "add", "master", "45000:5000"]);
    let ca = lab_tests::home().join("labs/docker-test/secrets/registry.ca.crt");
    let mut curl = std::process::Command::new("curl");
    curl.args(["-sS", "--cacert"]).arg(ca).arg("https://127.0.0.1:45000/v2/_catalog");
    let catalog = output(curl, b"");
    assert!(String::from_utf8_lossy(&catalog.stdout).contains("lab/web"), "{}", lab_tests::text(&catalog));
    lab.run(&["forward", "rm", "45000"]);
    // The key stays on the master, and belongs to the registry alone.
    let (_, said) = lab.shell(
        "master",
        "stat -c '%a %U %G' /etc/docker/registry/registry.key; ls /etc/docker/registry",
        b"",
    );
    assert!(said.starts_with("640 root docker-registry") && !said.contains("ca.key"), "{said}");
}
