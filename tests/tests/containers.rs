//! Containers without root's daemon, and without Docker: the option `rootless` of the stack docker, and the stack
//! containerd; both with the lab's registry. They take long, for what is new in them: scripts/soak runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use lab_tests::{TestLab, free_port, long, page_with};

/// Runs a shell command on the only node; what it wrote.
fn sh(lab: &TestLab, script: &str) -> String {
    let (status, said) = lab.shell("master", &format!("exec 2>&1\n{script}"), b"");
    assert_eq!(status, Some(0), "{script}: {said}");
    said.trim().into()
}

#[test]
fn docker_without_root() {
    if !long("Docker without root") {
        return;
    }
    let port = free_port();
    let lab = TestLab::example("docker.toml", |text| {
        let text = text.replacen("name = \"docker\"", "name = \"rootless-test\"", 1);
        // The master alone, its forward, and the steps that make images.
        let at = |part: &str| text.find(part).unwrap();
        let (start, end) = (at("[node.\"worker{n}\"]"), at("[stack.docker]"));
        let steps = at("[[step]]\nname = \"web server\"");
        let text = format!("{}forward = [\"{port}:8080\"]\n\n{}", &text[..start], &text[end..steps]);
        assert!(text.contains("[stack.docker]\n"));
        text.replacen("[stack.docker]\n", "[stack.docker]\nrootless = \"yes\"\n", 1)
    });
    lab.run(&["up"]);
    assert!(sh(&lab, "docker info --format '{{.SecurityOptions}}'").contains("rootless"));
    assert_eq!(sh(&lab, "ps -o user= -C dockerd"), "lab");
    // Root in a container is nobody special outside; its port is the node's all the same.
    sh(
        &lab,
        "docker run -d --name page --restart unless-stopped -p 8080:8080 master:5000/lab/busybox \
         sh -c 'mkdir -p /www && echo a page >/www/index.html && exec httpd -f -p 8080 -h /www'",
    );
    page_with(port, "/", &["a page"]);
    assert_eq!(
        sh(&lab, "ps -o user= -C busybox; ps -o user= -C httpd").split_whitespace().next(),
        Some("lab")
    );
    // From the lab's registry, and after a boot nobody has to log in.
    sh(&lab, "docker rmi -f master:5000/lab/web; docker pull -q master:5000/lab/web");
    lab.run(&["restart", "master"]);
    sh(&lab, "end=$(($(date +%s) + 300)); until docker info || [ $(date +%s) -ge $end ]; do sleep 2; done");
    page_with(port, "/", &["a page"]);
    // And back to root's daemon.
    let text = std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    lab.rewrite(&text.replace("rootless = \"yes\"\n", ""));
    lab.run(&["up"]);
    assert!(!sh(&lab, "docker info --format '{{.SecurityOptions}}'").contains("rootless"));
    assert_eq!(sh(&lab, "ps -o user= -C dockerd"), "root");
}

const CONTAINERD: &str = r#"
name = "containerd-test"
image = "debian-13"
[network]
subnet = "192.168.52.0/24"
[node.master]
ip = "192.168.52.10"
memory = "1GiB"
[stack.containerd]
[stack.registry]
"#;

/// An image as `docker save` writes it, made of the node's busybox.
const ARCHIVE: &str = r#"
set -eu
cd "$(mktemp -d)"
mkdir -p root/bin
cp "$(command -v busybox)" root/bin/
for name in sh echo hostname wget; do ln -s busybox root/bin/$name; done
tar -C root -cf layer.tar .
printf '{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$(sha256sum layer.tar | cut -d' ' -f1)" > config.json
echo '[{"Config":"config.json","RepoTags":["example.org/box:1"],"Layers":["layer.tar"]}]' > manifest.json
tar -cf /root/box.tar manifest.json config.json layer.tar
"#;

#[test]
fn containerd_without_docker() {
    if !long("containerd without Docker") {
        return;
    }
    let lab = TestLab::new(CONTAINERD);
    lab.run(&["up"]);
    sh(&lab, ARCHIVE);
    let archive = lab.dir().join("box.tar");
    lab.run(&["cp", "master:/root/box.tar", archive.to_str().unwrap()]);
    assert!(lab.run(&["image", "push", archive.to_str().unwrap()]).contains("master:5000/box:1"));
    sh(&lab, "ctr images pull --hosts-dir /etc/containerd/certs.d master:5000/box:1");
    // A container with an address of its own, which reaches the node.
    let run = "ctr run --rm --cni master:5000/box:1 one";
    assert_eq!(sh(&lab, &format!("{run} echo hello")), "hello");
    let page = sh(&lab, &format!("{run} wget -q -O - http://192.168.52.10:9000/ || true"));
    assert!(page.contains("refused"), "{page}");
    // What runs is there after a boot, the daemon that is; containers of `ctr` are not started again.
    lab.run(&["restart", "master"]);
    assert_eq!(sh(&lab, &format!("{run} hostname | wc -l")), "1");
}
