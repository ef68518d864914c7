//! labfiles/observability.toml: every node is a target, a page shows them, and who goes missing is told of. And a cluster
//! with the same stack.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use lab_tests::{
    TestLab,
    cluster::{self, Cluster},
    free_port, long, output, page_with, text,
};

#[test]
fn nodes_are_seen_and_missed() {
    let (prometheus, alerts) = (free_port(), free_port());
    let lab = TestLab::example("observability.toml", |text| {
        let text = text.replacen("name = \"observability\"", "name = \"metrics-test\"", 1);
        assert!(text.contains("\"9090:") && text.contains("\"9093:"));
        text.replace("\"9090:", &format!("\"{prometheus}:")).replace("\"9093:", &format!("\"{alerts}:"))
    });
    lab.run(&["up"]);
    // That it is up means that both have been asked for their metrics, also after a restore.
    lab.run(&["check"]);
    lab.run(&["destroy", "--yes"]);
    assert!(text(&output(lab.command(&["up"]), b"")).contains("restore snapshot first-up"));
    lab.run(&["check"]);
    let both = ["\"node\":\"master\"", "\"node\":\"worker1\""];
    page_with(prometheus, "/api/v1/query?query=up%7Bjob%3D%22node%22%7D%3D%3D1", &both);
    page_with(prometheus, "/consoles/nodes.html", &["<td>master</td>", "<td>worker1</td>", "<td>yes</td>"]);
    for page in ["cluster", "containers"] {
        page_with(prometheus, &format!("/consoles/{page}.html"), &["[stack.kubernetes]"]);
    }

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

/// A pod that tells something.
const METERED: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: metered
  annotations: {prometheus.io/scrape: "true", prometheus.io/port: "8080", prometheus.io/path: /metrics.txt}
spec:
  containers:
  - name: metered
    image: lab.local/busybox:1
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'mkdir -p /tmp/www; echo "teapots 17" > /tmp/www/metrics.txt; exec httpd -f -p 8080 -h /tmp/www']
"#;

#[test]
fn a_cluster_is_seen() {
    if !long("metrics of a cluster") || !cluster::can_be_had("metrics of a cluster") {
        return;
    }
    let (port, api, web) = (free_port(), free_port(), free_port());
    let lab = TestLab::example("kubernetes.toml", |text| {
        let text = text.replacen("name = \"kubernetes\"", "name = \"seen-test\"", 1);
        let (forward, after) = ("forward = [\"6443:6443\"]", "storage = \"nfs\"");
        assert!([forward, after, "\"8080:", "memory = \"2GiB\""].iter().all(|part| text.contains(part)));
        text.replace(forward, &format!("forward = [\"{api}:6443\", \"{port}:9090\"]"))
            .replace("\"8080:", &format!("\"{web}:"))
            .replace("memory = \"2GiB\"", "memory = \"3GiB\"")
            .replace(after, &format!("{after}\n[stack.prometheus]"))
    });
    let cluster = Cluster { lab };
    cluster.lab.run(&["up"]);
    cluster.lab.run(&["check"]);
    let up = |job: &str| format!("/api/v1/query?query=up%7Bjob%3D%22{job}%22%7D%3D%3D1");
    page_with(port, &up("apiserver"), &["\"node\":\"master\""]);
    for job in ["node", "kubelet", "cadvisor"] {
        page_with(port, &up(job), &["\"node\":\"master\"", "\"node\":\"worker1\""]);
    }
    page_with(port, "/consoles/cluster.html", &["<td>worker1</td>", "deployments.apps", "API server"]);
    page_with(port, "/consoles/containers.html", &["kube-apiserver", "web-", "<td>worker1</td>"]);
    // What a pod tells of itself.
    let (status, said) = cluster.lab.shell("master", "cat > /root/metered.yaml", METERED.as_bytes());
    assert_eq!(status, Some(0), "{said}");
    cluster.kubectl("apply -f /root/metered.yaml");
    page_with(port, "/api/v1/query?query=teapots", &["\"pod\":\"metered\"", "\"17\""]);
}
