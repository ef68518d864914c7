//! The flagship: labfiles/docker.toml, three nodes of Debian 13 with Docker running inside.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_tests::{TestLab, free_port, http_get, output};

#[test]
fn three_nodes_with_docker() {
    let port = free_port();
    let lab = TestLab::example("docker.toml", |text| {
        let text = text.replacen("name = \"docker\"", "name = \"docker-test\"", 1);
        assert!(text.contains("\"8080:"), "the example forwards port 8080");
        text.replace("\"8080:", &format!("\"{port}:"))
    });
    lab.run(&["up"]);
    for node in ["master", "worker1", "worker2"] {
        assert_eq!(lab.state_of(node), "running");
        let (status, said) = lab.shell(node, "docker info --format '{{.ServerVersion}}'", b"");
        assert_eq!(status, Some(0), "{said}");
        // An image made from what the node has, and a container of it that has run.
        let (status, said) = lab.shell(node, "docker run --rm lab/busybox echo hello", b"");
        assert_eq!(status, Some(0), "{said}");
    }
    // From the host, through the forwarded port, to a container.
    assert!(http_get(port, "/").contains("worker1"));
    // A container on the master, to a worker's container, by the worker's name.
    let (status, said) =
        lab.shell("master", "docker run --rm lab/busybox wget -q -T 60 -O - http://worker2/", b"");
    assert!(status == Some(0) && said.contains("worker2"), "{status:?} {said}");
    lab.run(&["check"]);
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
