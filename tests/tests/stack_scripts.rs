//! Scripts of stacks whose source is not reached from everywhere, run on this machine: all paths lead into a folder, and
//! programs that would change something are stand-ins that write down how they are called.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use lab_tests::{output, repository, text};

/// A folder that takes the place of a node's file system.
struct Node {
    root: tempfile::TempDir,
}

impl Node {
    fn new(programs: &[(&str, &str)]) -> Self {
        let node = Self { root: tempfile::tempdir().unwrap() };
        for folder in ["bin", "step", "root", "etc/systemd/system", "etc/kubernetes", "usr/local/sbin"] {
            fs::create_dir_all(node.path(folder)).unwrap();
        }
        for (name, does) in programs {
            let file = node.path("bin").join(name);
            let calls = node.path("calls").display().to_string();
            fs::write(&file, format!("#!/bin/sh\necho \"{name} $*\" >> {calls}\n{does}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        node
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.path().join(below)
    }

    /// Runs a script of the stack kubernetes with these options and facts; how programs were called.
    fn run(&self, script: &str, variables: &[(&str, &str)]) -> String {
        let read = |below: &str| fs::read_to_string(repository().join("scripts/stacks").join(below)).unwrap();
        let whole = read("prelude.sh") + &read(&format!("kubernetes/{script}"));
        let root = self.root.path().display();
        let moved = ["/etc/", "/usr/local/", "/root/", "/var/lib/"]
            .iter()
            .fold(whole, |text, path| text.replace(path, &format!("{root}{path}")))
            .replace("/usr/lib/apt/apt-helper", "apt-helper");
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        fs::write(self.path("script"), moved).unwrap();
        let mut command = Command::new("sh");
        command.arg(self.path("script")).env("PATH", path).env("LAB_STEP", self.path("step"));
        command.envs(variables.iter().copied());
        let output = output(command, b"");
        assert!(output.status.success(), "{}", text(&output));
        fs::read_to_string(self.path("calls")).unwrap()
    }
}

/// kubeadm refuses `--patches` beside `--config` from 1.23 on, and knows it from 1.22 on:
/// https://github.com/kubernetes/kubernetes/pull/104065
#[test]
fn kubeadm_finds_patches_where_its_version_looks() {
    for (version, api, flag) in
        [("v1.20.2", "v1beta2", true), ("v1.30.0", "v1beta3", false), ("v1.36.1", "v1beta4", false)]
    {
        let kubeadm =
            format!("case $1 in version) echo {version} ;; token) echo abcdef.0123456789abcdef ;; esac");
        let node = Node::new(&[
            ("kubeadm", &kubeadm),
            ("kubectl", "echo ok"),
            ("systemctl", ""),
            ("ctr", ""),
            ("openssl", ""),
        ]);
        fs::write(node.path("etc/kubernetes/admin.conf"), "").unwrap();
        let calls = node.run(
            "init.sh",
            &[
                ("LAB_OPT_NETWORK", "bridge"),
                ("LAB_OPT_POD_NETWORK", "10.244.0.0/16"),
                ("LAB_PATIENCE", "5"),
                ("LAB_IP", "192.168.60.10"),
                ("LAB_NODE", "master"),
                ("LAB_NAME", "test"),
            ],
        );
        let config = fs::read_to_string(node.path("etc/kubernetes/lab/config.yaml")).unwrap();
        assert!(config.contains(&format!("apiVersion: kubeadm.k8s.io/{api}\nkind: InitConfiguration")));
        let folder = node.path("etc/kubernetes/lab/patches");
        assert_eq!(config.contains(&format!("\npatches: {{directory: {}}}\n", folder.display())), !flag);
        let phases: Vec<&str> = calls.lines().filter(|call| call.starts_with("kubeadm init phase")).collect();
        assert_eq!(phases.len(), 11, "{calls}");
        assert!(phases.iter().all(|call| call.contains("--config")), "{calls}");
        assert_eq!(phases.iter().filter(|call| call.contains("patches ")).count(), if flag { 4 } else { 0 });
        assert!(folder.join("etcd+strategic.yaml").exists());
    }
}

/// A worker stays in its cluster, unless its master is another one by now.
#[test]
fn a_worker_leaves_a_cluster_that_is_gone() {
    // SHA-256 of nothing, which is what this openssl says of a certificate.
    let ours = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    for (authority, stays) in [(ours, true), ("00", false)] {
        let node = Node::new(&[
            ("kubeadm", "[ $1 = reset ] || cat > /dev/null < \"$3\""),
            ("openssl", ""),
            ("systemctl", ""),
        ]);
        fs::write(node.path("etc/kubernetes/kubelet.conf"), "").unwrap();
        let join = format!("token=t.t\nauthority=sha256:{authority}\napi=v1beta4\n");
        fs::write(node.path("step/join"), join).unwrap();
        let calls = node.run("join.sh", &[("LAB_NODE", "worker1"), ("LAB_MASTER_IP", "192.168.60.10")]);
        let reset = "kubeadm reset --force --cri-socket unix:///run/containerd/containerd.sock\n";
        assert_eq!(calls.ends_with("systemctl start kubelet.service\n"), stays, "{calls}");
        assert!(calls.contains(reset) != stays && calls.contains("kubeadm join ") != stays, "{calls}");
    }
}

/// What a labfile asks for later is fetched where pods run already, and they go on.
#[test]
fn options_are_added_to_a_node_of_a_cluster() {
    // A manifest has the name of its file as its image.
    let helper = r#"for file; do :; done; [ ! -e "$file" ] || exit 1
        printf '  image: "%s:1"\n        - --metric-resolution=15s\n' "${4##*/}" > "$file""#;
    let node =
        Node::new(&[("kubeadm", "echo v1.36.1"), ("crictl", ""), ("systemctl", ""), ("apt-helper", helper)]);
    let options = [
        ("LAB_OPT_NETWORK", "flannel"),
        ("LAB_OPT_POD_NETWORK", "10.244.0.0/16"),
        ("LAB_OPT_METRICS_SERVER", "true"),
        ("LAB_OPT_LOAD_BALANCER", "192.168.60.200-192.168.60.210"),
        ("LAB_OPT_STORAGE", "nfs"),
        ("LAB_OPT_GATEWAY", "true"),
    ];
    fs::create_dir_all(node.path("etc/containerd")).unwrap();
    let settings = node.path("etc/containerd/config.toml");
    fs::write(&settings, "of the package").unwrap();
    let made = node.run("images-upstream.sh", &options);
    for image in
        ["kube-flannel.yml", "components.yaml", "metallb-native.yaml", "csi-nfs-node.yaml", "install.yaml"]
    {
        assert!(made.contains(&format!("sock pull {image}:1\n")), "{made}");
    }
    assert!(made.contains("sock pull docker.io/envoyproxy/envoy:distroless-"), "{made}");
    assert!(!settings.exists() && made.ends_with("systemctl stop containerd.service\n"), "{made}");

    fs::write(node.path("etc/kubernetes/kubelet.conf"), "").unwrap();
    fs::write(&settings, "of the cluster").unwrap();
    let all = node.run("images-upstream.sh", &options);
    let later = all.strip_prefix(&made).unwrap();
    assert!(later.contains("pull components.yaml:1\n") && !later.contains("stop containerd"), "{later}");
    assert_eq!(fs::read_to_string(&settings).unwrap(), "of the cluster");
}
