//! Scripts of stacks whose source is not reached from everywhere, run on this machine: all paths lead into a folder, and
//! programs that would change something are stand-ins that write down how they are called.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lab_tests::{output, repository, text};

/// A folder that takes the place of a node's file system.
struct Node {
    root: tempfile::TempDir,
}

impl Node {
    fn new(programs: &[(&str, &str)]) -> Self {
        let node = Self { root: tempfile::tempdir().unwrap() };
        for folder in [
            "bin",
            "step",
            "root",
            "etc/default",
            "etc/kubernetes",
            "etc/modules-load.d",
            "etc/sysctl.d",
            "etc/systemd/system",
            "usr/local/sbin",
            "usr/local/share/lab/kubernetes",
        ] {
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

    /// Runs a script of the stack kubernetes with these options and facts.
    fn try_run(&self, script: &str, variables: &[(&str, &str)]) -> Output {
        let root = self.root.path().display();
        let moved = |below: &str| {
            let text = fs::read_to_string(repository().join("scripts/stacks").join(below)).unwrap();
            ["/etc/", "/usr/local/", "/root/", "/var/lib/", "/var/log/"]
                .iter()
                .fold(text, |text, path| text.replace(path, &format!("{root}{path}")))
                .replace("/usr/lib/apt/apt-helper", "apt-helper")
        };
        fs::write(self.path("step/settings.sh"), moved("kubernetes/settings.sh")).unwrap();
        fs::write(self.path("script"), moved("prelude.sh") + &moved(&format!("kubernetes/{script}")))
            .unwrap();
        let mut command = self.command(Path::new("sh"));
        command.arg(self.path("script")).envs(variables.iter().copied());
        output(command, b"")
    }

    /// The same of one that succeeds; how programs were called.
    fn run(&self, script: &str, variables: &[(&str, &str)]) -> String {
        let output = self.try_run(script, variables);
        assert!(output.status.success(), "{}", text(&output));
        self.calls()
    }

    /// A program that finds the stand-ins.
    fn command(&self, program: &Path) -> Command {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(program);
        command.env("PATH", path).env("LAB_STEP", self.path("step"));
        command
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap()
    }
}

/// Facts and options that the step `init` is given.
fn init(patience: &str) -> [(&str, &str); 6] {
    [
        ("LAB_OPT_NETWORK", "bridge"),
        ("LAB_OPT_POD_NETWORK", "10.244.0.0/16"),
        ("LAB_PATIENCE", patience),
        ("LAB_IP", "192.168.60.10"),
        ("LAB_NODE", "master"),
        ("LAB_NAME", "test"),
    ]
}

/// A master for the step `init` of this version of Kubernetes. `answer` is what curl does when the API server is asked for
/// the `$number`th time, from 0 on: its answer goes to the file `$said`, its logs are below `$pods`.
fn master(version: &str, answer: &str) -> Node {
    let curl = format!(
        r#"root=${{0%/bin/curl}}
        pods=$root/var/log/pods
        number=$(cat "$root/asked" 2> /dev/null || echo 0)
        echo $((number + 1)) > "$root/asked"
        while [ $# -gt 0 ]; do
            [ "$1" != -o ] || said=$2
            shift
        done
        {answer}"#
    );
    let node = Node::new(&[
        ("kubeadm", ""),
        ("curl", &curl),
        ("systemctl", ""),
        ("sleep", ""),
        ("ctr", ""),
        ("openssl", ""),
        ("journalctl", r#"for n in 1 2 3 4 5; do echo "E1129 1$n] node \"master\" not found"; done"#),
    ]);
    fs::write(node.path("etc/kubernetes/admin.conf"), "").unwrap();
    fs::write(node.path("usr/local/share/lab/kubernetes/version"), format!("{version}\n")).unwrap();
    node
}

/// kubeadm refuses `--patches` beside `--config` from 1.23 on, and knows it from 1.22 on:
/// https://github.com/kubernetes/kubernetes/pull/104065
#[test]
fn kubeadm_finds_patches_where_its_version_looks() {
    for (version, api, flag) in
        [("v1.20.2", "v1beta2", true), ("v1.30.0", "v1beta3", false), ("v1.36.1", "v1beta4", false)]
    {
        let node = master(version, "printf ok > \"$said\"");
        let calls = node.run("init.sh", &init("5"));
        let config = fs::read_to_string(node.path("etc/kubernetes/lab/config.yaml")).unwrap();
        assert!(config.contains(&format!("apiVersion: kubeadm.k8s.io/{api}\nkind: InitConfiguration")));
        let folder = node.path("etc/kubernetes/lab/patches");
        assert_eq!(config.contains(&format!("\npatches: {{directory: {}}}\n", folder.display())), !flag);
        let runs: Vec<&str> = calls.lines().filter(|call| call.starts_with("kubeadm init ")).collect();
        assert!(runs.iter().all(|run| run.contains("--config")), "{calls}");
        assert!(runs.iter().all(|run| run.contains("patches ") == flag), "{calls}");
        let patch = |part: &str| fs::read_to_string(folder.join(format!("{part}+strategic.yaml"))).unwrap();
        assert!(
            patch("etcd").contains("\n  - name: etcd\n") && patch("etcd").contains("{requests: {cpu: 250m}}")
        );
        assert!(!patch("kube-scheduler").contains("requests"));
        assert!(patch("kube-apiserver").contains("\n    readinessProbe: "));
    }
}

/// What `kubeadm init` does is done once: before the API server is waited for, when it serves, or, by who would only keep it
/// from serving others, last.
#[test]
fn each_phase_is_run_once() {
    let node = master("v1.20.2", "printf ok > \"$said\"");
    let calls = node.run("init.sh", &init("1"));
    let skipped: Vec<Vec<&str>> = calls
        .lines()
        .filter_map(|call| call.strip_prefix("kubeadm init ")?.split_once("--skip-phases "))
        .map(|(_, phases)| phases.split(',').collect())
        .collect();
    let [first, second, third] = &skipped[..] else { panic!("{calls}") };
    let before = ["certs", "kubeconfig", "kubelet-start", "control-plane/apiserver", "etcd"];
    let served = ["upload-config", "mark-control-plane", "bootstrap-token"];
    let last = ["control-plane/controller-manager", "control-plane/scheduler", "addon"];
    // lab waits in its own way, for longer than kubeadm would; its nodes are as small as their labfile wants them.
    let never = ["preflight", "wait-control-plane", "kubelet-finalize"];
    let same = |skipped: &[&str], wanted: &[&str]| {
        let sorted =
            |phases: &[&str]| std::collections::BTreeSet::from_iter(phases.iter().map(|p| p.to_string()));
        assert_eq!(sorted(skipped), sorted(wanted));
    };
    same(first, &[&never[..], &served[..], &last[..]].concat());
    same(second, &[&never[..], &before[..], &last[..]].concat());
    same(third, &[&never[..], &before[..], &served[..]].concat());
    let (start, serve) = calls.split_once("curl ").unwrap();
    assert!(
        start.matches("kubeadm init").count() == 1 && serve.matches("kubeadm init").count() == 2,
        "{calls}"
    );

    let token = fs::read_to_string(node.path("etc/kubernetes/lab/token")).unwrap();
    let (id, secret) = token.trim().split_once('.').unwrap();
    assert!(id.len() == 6 && secret.len() == 16, "{token}");
    assert!(
        (id.to_owned() + secret).bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()),
        "{token}"
    );
}

/// What serves in the end was waited for in words, and had the processors to itself where they are slow.
#[test]
fn an_api_server_is_waited_for() {
    let answer = r#"logs=$pods/kube-system_kube-apiserver-master_2/kube-apiserver
        case $number in
            0) : > "$logs/10.log"
               printf '[+]ping ok\n[-]etcd failed: withheld\n[-]poststarthook/x failed: withheld\nfailed\n' > "$said"
               echo 'curl: (22) error: 500' >&2
               printf 0.512345
               exit 22 ;;
            1) : > "$logs/11.log"
               echo 'curl: (7) refused' >&2
               printf 0.000000
               exit 7 ;;
            *) printf ok > "$said"
               printf 12.345678 ;;
        esac"#;
    for (patience, slow) in [("8", true), ("1", false)] {
        let node = master("v1.36.1", answer);
        // Starts of an earlier life are none of this one.
        let earlier = node.path("var/log/pods/kube-system_kube-apiserver-master_2/kube-apiserver");
        fs::create_dir_all(&earlier).unwrap();
        for log in ["8.log", "9.log", "9.log.20261129-180000"] {
            fs::write(earlier.join(log), "").unwrap();
        }
        let output = node.try_run("init.sh", &init(patience));
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        for line in [
            " s, started once, a TLS handshake takes 0.51 s; last seen: not done yet: etcd poststarthook/x\n",
            " s, started 2 times; last seen: curl: (7) refused\n",
            " s, started 2 times, a TLS handshake takes 12.34 s\n",
        ] {
            assert!(said.contains(line), "{line}{said}");
        }
        let calls = node.calls();
        let weights = |weight| {
            ["system.slice", "user.slice"]
                .map(|slice| format!("systemctl set-property --runtime {slice} CPUWeight={weight}\n"))
                .concat()
        };
        let (before, after) = calls.split_once("curl ").unwrap();
        let (asking, after) = after.rsplit_once("curl ").unwrap();
        assert_eq!(before.ends_with(&weights(2)), slow, "{calls}");
        assert_eq!(after.split_once('\n').unwrap().1.starts_with(&weights(100)), slow, "{calls}");
        assert_eq!(calls.matches("CPUWeight").count(), if slow { 4 } else { 0 }, "{calls}");
        assert_eq!(asking.matches("curl ").count(), 1, "{calls}");
        assert!(before.contains("kubeadm init "), "{calls}");
    }
}

/// An API server that ends again and again is given up, with what it said last and not what lies around it.
#[test]
fn the_last_words_are_those_of_the_part_that_failed() {
    let answer = r#"logs=$pods/kube-system_kube-apiserver-master_2/kube-apiserver
        mkdir -p "$logs" "$pods/kube-system_etcd-master_3/etcd"
        printf '2026-11-29T18:00:00.1Z stderr F %s\n' \
            'I1129 18:00:00.1 1 x.go:1] all is well' \
            "F1129 18:00:00.1 1 controller.go:161] Unable to do it: handshake $number" \
            'goroutine 1 [running]:' '	x.go:1' > "$logs/$number.log"
        printf '2026-11-29T18:00:00.1Z stderr F %s\n' 'a first line' 'no space left' \
            > "$pods/kube-system_etcd-master_3/etcd/0.log"
        echo 'curl: (7) refused' >&2
        exit 7"#;
    let node = master("v1.20.2", answer);
    let output = node.try_run("init.sh", &init("8"));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = String::from_utf8(output.stdout).unwrap();
    let words = "kubelet: E1129 14] node \"master\" not found
kubelet: E1129 15] node \"master\" not found
etcd: a first line
etcd: no space left
kube-apiserver: F1129 18:00:00.1 1 controller.go:161] Unable to do it: handshake 4
kube-apiserver: F1129 18:00:00.1 1 controller.go:161] Unable to do it: handshake 5
the API server has ended 5 times in ";
    let last = said.find(words).unwrap_or_else(|| panic!("{said}"));
    // All of it is among the lines that `lab` shows.
    assert!(
        said[last..].lines().count() <= 12 && said.ends_with(" s; last seen: curl: (7) refused\n"),
        "{said}"
    );
    let calls = node.calls();
    assert_eq!(calls.matches("curl ").count(), 6, "{calls}");
    assert!(calls.ends_with("user.slice CPUWeight=100\n"), "{calls}");
    assert_eq!(calls.matches("kubeadm init ").count(), 1, "{calls}");
}

/// The same of one that was never started, at the limit.
#[test]
fn what_was_not_started_has_no_last_words() {
    let node = master("v1.36.1", "echo 'curl: (7) refused' >&2; exit 7");
    let output = node.try_run("init.sh", &init("0"));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = String::from_utf8(output.stdout).unwrap();
    let words = "etcd: there is no log of it: it was not started
kube-apiserver: there is no log of it: it was not started
the API server does not serve within 0 s; last seen: curl: (7) refused\n";
    assert!(said.ends_with(words), "{said}");
}

/// The control plane at boot, and a connection that is cut off while it is waited for.
#[test]
fn the_api_server_is_first_at_boot() {
    let node = master("v1.36.1", "[ -e \"$root/down\" ] || printf ok > \"$said\"");
    node.run("init.sh", &init("8"));
    let manifests = node.path("etc/kubernetes/manifests");
    fs::create_dir_all(&manifests).unwrap();
    let all = ["etcd.yaml", "kube-apiserver.yaml", "kube-controller-manager.yaml", "kube-scheduler.yaml"];
    for name in all {
        fs::write(manifests.join(name), name).unwrap();
    }
    let there = || {
        let mut names: Vec<_> =
            fs::read_dir(&manifests).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let unit = fs::read_to_string(node.path("etc/systemd/system/lab-control-plane.service")).unwrap();
    let run = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        let mut words = line.split(' ');
        let mut command = node.command(Path::new(words.next().unwrap()));
        command.args(words);
        fs::write(node.path("calls"), "").unwrap();
        let output = output(command, b"");
        assert!(output.status.success(), "{}", text(&output));
        node.calls()
    };
    assert_eq!(run("ExecStartPre="), "");
    assert_eq!(there(), all[..2]);
    let calls = run("ExecStart=");
    assert_eq!(there(), all);
    let (before, after) = calls.split_once("curl ").unwrap();
    assert!(before.ends_with("user.slice CPUWeight=2\n"), "{calls}");
    assert!(after.ends_with("user.slice CPUWeight=100\n"), "{calls}");

    fs::write(node.path("down"), "").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut wait = node.command(&node.path("usr/local/sbin/lab-control-plane"));
    assert!(!wait.args(["wait", "9", "0", "2"]).stdout(writer).status().unwrap().success());
    assert!(node.calls().ends_with("user.slice CPUWeight=100\n"), "{}", node.calls());
}

/// What is asked of kubeadm where it answers with its version and its images.
const KUBEADM: &str = "case $1 in version) echo v1.36.1 ;; config) echo registry.k8s.io/pause:3.10 ;; esac";

/// What a kubelet says many times a second while it waits is no work for the journal, where that costs something.
#[test]
fn a_kubelet_says_less_on_a_slow_node() {
    for (patience, less) in [("8", true), ("1", false)] {
        let node = Node::new(&[("kubeadm", KUBEADM), ("systemctl", ""), ("modprobe", ""), ("sysctl", "")]);
        let baked = node.run("settings.sh", &[]);
        assert!(
            baked.contains("systemctl enable containerd.service kubelet.service lab-pod-network.service")
        );
        let facts = [("LAB_SOURCE", "bundle"), ("LAB_IP", "192.168.60.10"), ("LAB_PATIENCE", patience)];
        let calls = node.run("runtime.sh", &facts);
        let units = node.path("etc/systemd/system/kubelet.service.d");
        let limited = "[Service]\nLogRateLimitIntervalSec=30s\nLogRateLimitBurst=20\n";
        let unit = fs::read_to_string(units.join("lab-slow.conf"));
        assert_eq!(unit.ok().as_deref(), less.then_some(limited));
        // systemd learns of it, and kubeadm is started in neither case: both take seconds on a slow node.
        let calls = calls.strip_prefix(&baked).unwrap();
        assert_eq!(calls.contains("systemctl daemon-reload"), !less, "{calls}");
        assert!(!calls.contains("kubeadm"), "{calls}");
        let settings = fs::read_to_string(node.path("etc/containerd/config.toml")).unwrap();
        assert!(settings.contains("sandbox_image = \"registry.k8s.io/pause:3.10\"\n"), "{settings}");
        // A kubelet that can only fail is not started again and again.
        let unit = fs::read_to_string(units.join("lab.conf")).unwrap();
        assert!(
            unit.contains("\nConditionPathExists=") && unit.ends_with("/kubelet/config.yaml\n"),
            "{unit}"
        );
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
        // https://github.com/kubernetes/kubernetes/pull/104942
        assert!(calls.contains("DirAvailable--etc-kubernetes-manifests") != stays, "{calls}");
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
        ("LAB_OPT_IMAGES", ""),
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

/// The key of pkgs.k8s.io.
const UPSTREAM: &str = "DE15B14486CD377B9E876E1A234654DA9A296436";

/// Runs packages-upstream.sh with these options; the calls, with apt's sources and settings when packages are installed.
fn packages_upstream(options: &[(&str, &str)]) -> String {
    let gpg = format!(
        "case $(cat \"$4\") in *docker*) key=9DC858229FC7DD38854AE2D88D81803C0EBFCD88 ;; own*) key=0123 ;; *) key={UPSTREAM} ;; esac
        printf 'pub:x\\nfpr:::::::::%s:\\n' $key"
    );
    let apt = r#"etc=${0%/bin/*}/etc/apt
        case $* in *" install "*) cat "$etc"/*.d/* >> "${0%/bin/*}/calls" ;; esac"#;
    let node = Node::new(&[
        ("dpkg-query", ""),
        ("dpkg", "[ \"$1\" != --print-architecture ] || echo amd64"),
        ("apt-get", apt),
        ("apt-helper", "echo \"$4\" > \"$5\""),
        ("gpg", &gpg),
        ("apt-mark", ""),
        ("kubeadm", KUBEADM),
        ("systemctl", ""),
    ]);
    for (file, text) in [
        ("etc/apt/sources.list.d/debian.sources", ""),
        ("etc/apt/apt.conf.d/70debconf", ""),
        ("etc/apt/preferences.d/none", ""),
        ("etc/os-release", "ID=debian\nVERSION_CODENAME=trixie\n"),
    ] {
        fs::create_dir_all(node.path(file).parent().unwrap()).unwrap();
        fs::write(node.path(file), text).unwrap();
    }
    let unset = ["LAB_OPT_PACKAGES", "LAB_OPT_PACKAGES_KEY", "LAB_OPT_MIRROR_CA"].map(|name| (name, ""));
    let set = [("LAB_OPT_VERSION", "1.36"), ("LAB_OPT_STORAGE", "none")];
    let calls = node.run("packages-upstream.sh", &[&unset[..], &set[..], options].concat());
    // The repository's key is there when packages are installed, and later.
    assert!(node.path("etc/apt/keyrings/kubernetes.asc").exists(), "{calls}");
    let left = node.path("etc/apt/sources.list.d/kubernetes.sources");
    assert!(!left.exists() && !node.path("etc/apt/apt.conf.d/90lab-mirror").exists());
    if let Some((_, ca)) = options.iter().find(|(name, _)| *name == "LAB_OPT_MIRROR_CA") {
        let file = node.path("usr/local/share/ca-certificates/lab-mirror.crt");
        assert_eq!(fs::read_to_string(file).unwrap().trim_end(), *ca);
    }
    calls
}

#[test]
fn packages_come_from_upstream_or_its_mirror() {
    let calls = packages_upstream(&[]);
    let fetched = "download-file https://pkgs.k8s.io/core:/stable:/v1.36/deb/Release.key ";
    assert!(calls.contains(fetched), "{calls}");
    assert!(calls.contains("URIs: https://pkgs.k8s.io/core:/stable:/v1.36/deb/\nSuites: /\nArch"), "{calls}");
    assert!(calls.contains("URIs: https://download.docker.com/linux/debian\nSuites: trixie\n"), "{calls}");
    assert!(calls.contains("recommends containerd.io iptables"), "{calls}");
    assert!(calls.contains("Pin: origin \"pkgs.k8s.io\"\n"), "{calls}");

    // A mirror of what upstream has signed.
    let mirror = ("LAB_OPT_PACKAGES", "https://mirror.example.org:8443/k8s/");
    let calls = packages_upstream(&[mirror, ("LAB_OPT_MIRROR_CA", "a certificate\nof two lines")]);
    let url = "https://mirror.example.org:8443/k8s/core:/stable:/v1.36/deb/";
    assert!(calls.contains(&format!("download-file {url}Release.key ")), "{calls}");
    assert!(calls.contains(&format!("URIs: {url}\n")) && !calls.contains("docker"), "{calls}");
    assert!(calls.contains("Acquire::https::mirror.example.org::CaInfo \""), "{calls}");
    assert!(calls.contains("Pin: origin \"mirror.example.org\"\n"), "{calls}");
    assert!(calls.contains("recommends containerd runc iptables"), "{calls}");

    // One that signs itself.
    let calls = packages_upstream(&[mirror, ("LAB_OPT_PACKAGES_KEY", "own key")]);
    assert!(!calls.contains("download-file") && !calls.contains("CaInfo"), "{calls}");
    assert!(calls.contains(&format!("URIs: {url}\n")), "{calls}");
}

/// Images of a mirror get the names that everything else knows them by.
#[test]
fn images_come_from_a_mirror() {
    let kubeadm = r#"case "$*" in
        version*) echo v1.36.1 ;;
        *list*) printf 'registry.k8s.io/%s\n' pause:3.10.1 coredns/coredns:v1.13.1 ;;
        *) exit 1 ;;
    esac"#;
    // This one keeps the paths of upstream.
    let ctr = "case $* in *pull*/coredns:v1.13.1) case $* in *coredns/coredns*) ;; *) exit 1 ;; esac ;; esac";
    let node = Node::new(&[("kubeadm", kubeadm), ("ctr", ctr), ("systemctl", "")]);
    let calls = node.run(
        "images-upstream.sh",
        &[
            ("LAB_OPT_NETWORK", "bridge"),
            ("LAB_OPT_METRICS_SERVER", "false"),
            ("LAB_OPT_LOAD_BALANCER", ""),
            ("LAB_OPT_GATEWAY", "false"),
            ("LAB_OPT_STORAGE", "none"),
            ("LAB_OPT_IMAGES", "registry.example.org:5000/k8s"),
            ("LAB_OPT_MIRROR_CA", "a certificate"),
        ],
    );
    for (there, here) in
        [("pause:3.10.1", "pause:3.10.1"), ("coredns/coredns:v1.13.1", "coredns/coredns:v1.13.1")]
    {
        let tag =
            format!("images tag --force registry.example.org:5000/k8s/{there} registry.k8s.io/{here}\n");
        assert!(calls.contains(&tag), "{calls}");
    }
    assert_eq!(calls.matches("images pull --hosts-dir").count(), 5, "{calls}");
    let hosts = node.path("etc/containerd/certs.d/registry.example.org:5000");
    let settings = fs::read_to_string(hosts.join("hosts.toml")).unwrap();
    assert!(settings.contains("[host.\"https://registry.example.org:5000\"]"), "{settings}");
    assert!(settings.contains(&format!("ca = \"{}\"", hosts.join("ca.crt").display())), "{settings}");
    assert_eq!(fs::read_to_string(hosts.join("ca.crt")).unwrap(), "a certificate\n");
}
