//! labfiles/kubernetes.toml on a bundle: a master and a worker, and what a cluster has to be able to do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use std::process::Command;

use lab_tests::{
    cluster::{self, Cluster},
    free_port, http_get, on_host, output, text,
};

/// A web server on each node, and a job that leaves something on a volume.
const WORKLOADS: &str = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: each
        image: lab.local/busybox:1
        imagePullPolicy: IfNotPresent
        command: [sh, -c, 'mkdir -p /tmp/www; echo "on $NODE" > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www']
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: box}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 100Mi}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: writer}
spec:
  template:
    spec:
      restartPolicy: OnFailure
      containers:
      - name: writer
        image: lab.local/busybox:1
        imagePullPolicy: IfNotPresent
        command: [sh, -c, 'echo "left by the job" > /box/note']
        volumeMounts: [{name: box, mountPath: /box}]
      volumes: [{name: box, persistentVolumeClaim: {claimName: box}}]
"#;

/// The cluster, and the port of this machine that leads to its application.
struct Test {
    cluster: Cluster,
    port: u16,
}

impl std::ops::Deref for Test {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Test {
    /// The address of the pod `each` on a node.
    fn pod_on(&self, node: &str) -> String {
        self.kubectl(&format!(
            "get pods -l app=each --field-selector spec.nodeName={node} -o 'jsonpath={{.items[0].status.podIP}}'"
        ))
    }

    /// Waits until the application is served at the worker's port, then at the one of this machine that leads there.
    fn serves(&self, what: &str, version: &str) {
        let page = "curl -s --max-time 20 http://192.168.60.11:30080/";
        self.until_holds(what, &format!("{page} | grep -q 'version {version}'"));
        assert!(http_get(self.port, "/").contains("hello from "), "{what}");
    }

    /// Waits until a node's kubelet has reported this boot, and that it is ready.
    fn is_ready(&self, node: &str) {
        let (_, boot) = self.lab.shell(node, "cat /proc/sys/kernel/random/boot_id", b"");
        let reported = format!(
            "[ \"$(kubectl get node {node} -o 'jsonpath={{.status.nodeInfo.bootID}}')\" = {} ]",
            boot.trim()
        );
        self.until_holds(&format!("{node} has reported its boot"), &reported);
        self.kubectl(&format!("wait --for=condition=Ready node/{node} --timeout=600s"));
    }

    fn pods_reach_each_other(&self) {
        let (here, there) =
            ("get pods -l app=each --field-selector spec.nodeName=master -o name", self.pod_on("worker1"));
        let pod = self.kubectl(here);
        let said = self.kubectl(&format!("exec {pod} -- wget -q -O - http://{there}:8080/"));
        assert_eq!(said, "on worker1");
    }
}

#[test]
fn a_master_and_a_worker() {
    if !cluster::can_be_had("a Kubernetes cluster") {
        return;
    }
    let (port, api) = (free_port(), free_port());
    let lab = cluster::example("k8s-test", port, api);
    let cluster = Test { cluster: Cluster { lab }, port };
    let lab = &cluster.lab;

    // A version that the bundle does not have is refused before anything is started.
    let labfile = std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    lab.rewrite(&labfile.replace("[stack.kubernetes]", "[stack.kubernetes]\nversion = \"1.99.0\""));
    let said = lab.fails(1, &["up"]);
    for part in ["1.99.0", "LAB_BUNDLES", "scripts/bundle-kubernetes", "source = \"upstream\""] {
        assert!(said.contains(part), "{said}");
    }
    lab.rewrite(&labfile);

    // The labfile leaves it to lab where Kubernetes comes from.
    let without_bundle = || {
        let mut plan = lab.command(&["plan"]);
        plan.env_remove("LAB_BUNDLES");
        text(&output(plan, b""))
    };
    let said = without_bundle();
    assert!(said.contains("stacks: kubernetes 1.") && said.contains(" from upstream\n"), "{said}");
    assert!(lab.run(&["plan"]).contains(" from bundle\n"));

    lab.run(&["up"]);
    lab.run(&["check"]);
    // What nodes stand on stays, whatever is found later, and is told.
    let said = without_bundle();
    assert!(said.contains("no bundle has the file") && said.contains("scripts/bundle-kubernetes"), "{said}");
    assert!(lab.run(&["status"]).contains("stacks: kubernetes from bundle\n"));
    let status: serde_json::Value = serde_json::from_str(&lab.run(&["status", "-o", "json"])).unwrap();
    assert_eq!(status["stacks"][0]["source"], "bundle");
    assert!(std::fs::read_to_string(lab.dir().join("lab.lock")).unwrap().contains("source = \"bundle\""));
    cluster.serves("after up", "1");

    // What steps gave each other is secret.
    let secrets = lab_tests::home().join("labs/k8s-test/secrets");
    for file in ["kubernetes.join", "kubernetes.kubeconfig"] {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(secrets.join(file)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let (_, left) = lab.shell("worker1", "ls /run/lab-step 2>&1", b"");
    assert!(left.contains("No such file"), "{left}");

    kubeconfig(&cluster, api);
    workloads(&cluster);
    rolling_update(&cluster);
    names(&cluster);
    comes_back(&cluster);
    leaves(&cluster);
}

/// kubectl on this machine, by the user's kubeconfig.
fn kubeconfig(cluster: &Test, api: u16) {
    let lab = &cluster.lab;
    let (kubectl, config) = (lab.dir().join("kubectl"), lab.dir().join("kube/config"));
    lab.run(&["cp", "master:/usr/bin/kubectl", kubectl.to_str().unwrap()]);
    let mut merge = lab.command(&["kubeconfig"]);
    merge.env("KUBECONFIG", &config);
    let merged = output(merge, b"");
    assert!(merged.status.success(), "{}", text(&merged));
    let mut get = Command::new(&kubectl);
    get.args(["--context", "lab-k8s-test", "get", "nodes", "-o", "name"]).env("KUBECONFIG", &config);
    let got = output(get, b"");
    assert_eq!(String::from_utf8_lossy(&got.stdout), "node/master\nnode/worker1\n", "{}", text(&got));
    assert!(lab.run(&["kubeconfig", "--print"]).contains(&format!("https://127.0.0.1:{api}")));
}

fn workloads(cluster: &Test) {
    let (status, said) = cluster.lab.shell("master", "cat > /root/workloads.yaml", WORKLOADS.as_bytes());
    assert_eq!(status, Some(0), "{said}");
    cluster.kubectl("apply -f /root/workloads.yaml");
    cluster.kubectl("wait --for=condition=complete job/writer --timeout=900s");
    assert_eq!(cluster.kubectl("get pvc box -o 'jsonpath={.status.phase}'"), "Bound");
    // The job may have run on either node; the share is the master's.
    assert_eq!(cluster.master("cat /srv/volumes/*/note"), "left by the job");
    cluster.kubectl("rollout status daemonset/each --timeout=900s");
    cluster.pods_reach_each_other();
}

fn rolling_update(cluster: &Test) {
    cluster.kubectl("scale deployment/web --replicas=1");
    cluster.kubectl("set env deployment/web VERSION=2");
    cluster.kubectl("rollout status deployment/web --timeout=900s");
    cluster.serves("after the update", "2");
    cluster.kubectl("rollout undo deployment/web");
    cluster.kubectl("rollout status deployment/web --timeout=900s");
    cluster.serves("after the way back", "1");
}

/// Names of the cluster and of the lab, asked by a pod.
fn names(cluster: &Test) {
    let address = cluster.kubectl("get service web -o 'jsonpath={.spec.clusterIP}'");
    let pod = cluster.kubectl("get pods -l app=each -o 'jsonpath={.items[0].metadata.name}'");
    for (name, wanted) in [("web.default.svc.cluster.local", address.as_str()), ("worker1", "192.168.60.11")]
    {
        let said = cluster.kubectl(&format!("exec {pod} -- nslookup -type=a {name}. 10.96.0.10"));
        assert!(said.contains(wanted), "{name}: {said}");
    }
}

/// From a worker's SIGKILL, a snapshot, a power off, and from what the first `up` came to.
fn comes_back(cluster: &Test) {
    let lab = &cluster.lab;
    lab.run(&["snapshot", "save", "good"]);
    on_host("kill -KILL $(lab_pid k8s-test/nodes/worker1/vmm.lock)");
    lab.run(&["up"]);
    cluster.is_ready("worker1");
    cluster.until_holds("a pod on worker1 serves again", "curl -sf --max-time 20 http://$(kubectl get pods -l app=each --field-selector spec.nodeName=worker1 -o 'jsonpath={.items[0].status.podIP}'):8080/");

    cluster.kubectl("delete deployment web --wait=false");
    lab.run(&["snapshot", "restore", "good"]);
    cluster.serves("after the restore", "1");
    cluster.pods_reach_each_other();
    // Controllers, scheduler and kubelets go on with the tokens and clocks that they have.
    cluster.kubectl("create job again --image=lab.local/busybox:1 -- true");
    cluster.kubectl("wait --for=condition=complete job/again --timeout=900s");

    lab.run(&["halt"]);
    lab.run(&["up"]);
    // kubectl would give up a TLS handshake that takes 10 s.
    let ready = "[ \"$(curl -sk --max-time 60 https://127.0.0.1:6443/readyz)\" = ok ]";
    cluster.until_holds("the API server answers", ready);
    for node in ["master", "worker1"] {
        cluster.is_ready(node);
    }
    cluster.serves("after halt and up", "1");
}

/// A worker that is no longer in the labfile, and the lab itself.
fn leaves(cluster: &Test) {
    let lab = &cluster.lab;
    let labfile = std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    let (start, end) = ("[node.\"worker{n}\"]", "[stack.kubernetes]");
    let (start, end) = (labfile.find(start).unwrap(), labfile.find(end).unwrap());
    lab.rewrite(&format!("{}{}", &labfile[..start], &labfile[end..]));
    lab.run(&["up"]);
    assert_eq!(cluster.kubectl("get nodes -o name"), "node/master");
    cluster.kubectl("rollout status deployment/web --timeout=900s");
    lab.run(&["destroy", "--yes", "worker1"]);
    lab.rewrite(&labfile);

    let config = lab.dir().join("kube/config");
    let mut destroy = lab.command(&["destroy", "--yes"]);
    destroy.env("KUBECONFIG", &config);
    assert!(output(destroy, b"").status.success());
    assert!(!std::fs::read_to_string(&config).unwrap().contains("lab-k8s-test"));
    lab.run(&["up"]);
    cluster.serves("after destroy and up", "1");
}
