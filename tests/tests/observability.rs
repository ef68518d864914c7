//! labfiles/observability.toml: every node is a target, a page shows them, and who goes missing is told of.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::time::{Duration, Instant};

use lab_tests::{TestLab, free_port, http_get};

/// Asks for a page until it has `wanted` in it.
fn page_with(port: u16, path: &str, wanted: &[&str]) -> String {
    let end = Instant::now() + Duration::from_secs(300);
    loop {
        let page = http_get(port, path);
        if wanted.iter().all(|part| page.contains(part)) {
            return page;
        }
        assert!(Instant::now() < end, "{path} has not {wanted:?}: {page}");
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

#[test]
fn nodes_are_seen_and_missed() {
    let (prometheus, alerts) = (free_port(), free_port());
    let lab = TestLab::example("observability.toml", |text| {
        let text = text.replacen("name = \"observability\"", "name = \"metrics-test\"", 1);
        assert!(text.contains("\"9090:") && text.contains("\"9093:"));
        text.replace("\"9090:", &format!("\"{prometheus}:")).replace("\"9093:", &format!("\"{alerts}:"))
    });
    lab.run(&["up"]);
    // Both have been asked for their metrics at least once, and a page shows them.
    let both = ["\"node\":\"master\"", "\"node\":\"worker1\""];
    page_with(prometheus, "/api/v1/query?query=up%7Bjob%3D%22node%22%7D%3D%3D1", &both);
    page_with(prometheus, "/consoles/nodes.html", &["<td>master</td>", "<td>worker1</td>", "<td>yes</td>"]);
    for page in ["cluster", "containers"] {
        page_with(prometheus, &format!("/consoles/{page}.html"), &["[stack.kubernetes]"]);
    }
    lab.run(&["check"]);

    // A node that cannot be asked becomes an alert, which Alertmanager has been told.
    lab.shell("worker1", "systemctl stop prometheus-node-exporter", b"");
    page_with(alerts, "/api/v2/alerts", &["NodeDown", "worker1 cannot be asked"]);
    lab.fails(1, &["check", "no alert fires"]);

    // A node that is no longer in the labfile is no target any more.
    let text = std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    let start = text.find("[node.\"worker{n}\"]").unwrap();
    let end = text.find("[stack.prometheus]").unwrap();
    lab.rewrite(&format!("{}{}", &text[..start], &text[end..]));
    lab.run(&["up"]);
    lab.run(&["destroy", "--yes", "worker1"]);
    let targets = page_with(prometheus, "/api/v1/targets?state=active", &["192.168.70.10:9100"]);
    assert!(!targets.contains("192.168.70.11"), "{targets}");
    page_with(alerts, "/api/v2/alerts", &["[]"]);
}
