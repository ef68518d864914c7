//! Kubernetes by the way that it comes from upstream: packages of kubeadm, kubelet and kubectl, images of a registry. Upstream
//! is not reached from everywhere, so its mirrors are this machine: a repository like that of pkgs.k8s.io and a registry,
//! with the programs and images of a bundle.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use lab_tests::{
    cluster::{self, Cluster},
    emulated, free_port, http_get, long, output, repository, text,
};
use serde_json::Value;

/// How long the registry may take to start.
const LIMIT: Duration = Duration::from_secs(60);
/// What the mirrors' paths begin with.
const PATH: &str = "kubernetes";

/// Where the mirrors listen on this machine, and how nodes get there.
struct Place {
    bind: Ipv4Addr,
    address: Ipv4Addr,
}

impl Place {
    /// From the emulated host its gateway is this machine's loopback, which nodes of other hosts don't reach.
    fn find() -> Option<Self> {
        if emulated() {
            return Some(Self { bind: Ipv4Addr::LOCALHOST, address: Ipv4Addr::new(10, 0, 2, 2) });
        }
        // Nothing is sent: this asks for the address by which this machine would.
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("198.51.100.1:9").ok()?;
        match socket.local_addr().ok()?.ip() {
            IpAddr::V4(ip) if !ip.is_loopback() && !ip.is_unspecified() => {
                Some(Self { bind: ip, address: ip })
            }
            _ => None,
        }
    }
}

/// The mirrors of a bundle's version.
struct Mirrors {
    folder: tempfile::TempDir,
    registry: Child,
    /// Of Kubernetes: 1.20.
    minor: String,
    /// URL of the packages.
    packages: String,
    /// Address, port and path of the images.
    images: String,
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        self.registry.kill().unwrap();
        self.registry.wait().unwrap();
    }
}

impl Mirrors {
    fn serve(place: &Place, version: &str, programs: &Path, images: &Path) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut make = Command::new(repository().join("tests/mirror/make"));
        make.arg(folder.path()).arg(version).arg(programs).arg(images).arg(place.address.to_string());
        let made = output(make, b"");
        assert!(made.status.success(), "{}", text(&made));

        store(folder.path());
        let port = free_port();
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {root}/store}}}}\n\
             http:\n  addr: {bind}:{port}\n  tls: {{certificate: {root}/tls.crt, key: {root}/tls.key}}\n",
            root = folder.path().display(),
            bind = place.bind,
        );
        fs::write(folder.path().join("registry.yml"), config).unwrap();
        let mut registry = Command::new(folder.path().join("docker-registry"));
        registry.arg("serve").arg(folder.path().join("registry.yml"));
        let registry = registry.spawn().unwrap();
        let end = Instant::now() + LIMIT;
        while let Err(error) = TcpStream::connect((place.bind, port)) {
            assert!(Instant::now() < end, "the registry does not listen: {error}");
            std::thread::park_timeout(Duration::from_millis(100));
        }

        // The gateway keeps packages by their URL: no two tests have the same.
        let name = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
        let listener = TcpListener::bind((place.bind, 0)).unwrap();
        let packages = format!("http://{}:{}/{name}", place.address, listener.local_addr().unwrap().port());
        let root = folder.path().join("packages");
        std::thread::spawn(move || {
            for node in listener.incoming().flatten() {
                let (root, name) = (root.clone(), name.clone());
                // A node that goes away is no failure of the server's.
                std::thread::spawn(move || drop(answer(node, &root, &name)));
            }
        });
        let minor = version.rsplit_once('.').unwrap().0.to_owned();
        let images = format!("{}:{port}/{PATH}", place.address);
        Self { folder, registry, minor, packages, images }
    }
}

/// Answers one request: a file below `/NAME/`, or that there is none.
fn answer(mut node: TcpStream, root: &Path, name: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(node.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.replace("%3a", ":").replace("%3A", ":");
    let below = path.strip_prefix(&format!("/{name}/")).filter(|below| !below.contains(".."));
    let body = below.and_then(|below| fs::read(root.join(below)).ok());
    let status = if body.is_some() { "200 OK" } else { "404 Not Found" };
    let body = body.unwrap_or_default();
    write!(node, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    if method == "GET" { node.write_all(&body) } else { Ok(()) }
}

/// Puts the images of an OCI layout into a registry's store, as the registry lays it out.
fn store(folder: &Path) {
    let (oci, store) = (folder.join("oci/blobs/sha256"), folder.join("store/docker/registry/v2"));
    let json = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let write = |path: PathBuf, text: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let take = |digest: &str| {
        let hash = digest.strip_prefix("sha256:").unwrap();
        let blob = store.join("blobs/sha256").join(&hash[..2]).join(hash).join("data");
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        if !blob.exists() {
            fs::hard_link(oci.join(hash), blob).unwrap();
        }
        hash.to_owned()
    };
    for image in json(&folder.join("oci/index.json"))["manifests"].as_array().unwrap() {
        let name = image["annotations"]["io.containerd.image.name"].as_str().unwrap();
        let (name, tag) = name.rsplit_once('/').unwrap().1.split_once(':').unwrap();
        let of_it = store.join("repositories").join(PATH).join(name);
        let digest = image["digest"].as_str().unwrap();
        let hash = take(digest);
        let tags = of_it.join("_manifests/tags").join(tag);
        for link in [
            of_it.join("_manifests/revisions/sha256").join(&hash),
            tags.join("current"),
            tags.join("index/sha256").join(&hash),
        ] {
            write(link.join("link"), digest);
        }
        let manifest = json(&oci.join(&hash));
        for blob in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
            let digest = blob["digest"].as_str().unwrap();
            write(of_it.join("_layers/sha256").join(take(digest)).join("link"), digest);
        }
    }
}

/// Version and files of the bundle.
fn bundle() -> (String, PathBuf, PathBuf) {
    let folders = std::env::var_os("LAB_BUNDLES").unwrap();
    for folder in std::env::split_paths(&folders) {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let version =
                name.strip_prefix("k8s-").and_then(|rest| rest.strip_suffix("-node-binaries.tar.zst"));
            if let Some(version) = version {
                let images = folder.join(format!("k8s-{version}-images.oci.tar.zst"));
                return (version.to_owned(), entry.path(), images);
            }
        }
    }
    panic!("LAB_BUNDLES has no bundle of Kubernetes");
}

#[test]
fn a_cluster_from_upstream_s_mirrors() {
    let what = "Kubernetes from mirrors of upstream";
    if !long(what) || !cluster::can_be_had(what) {
        return;
    }
    let Some(place) = Place::find() else {
        eprintln!("SKIPPED: {what}: this machine has no address but its loopback, which nodes don't reach");
        return;
    };
    let (version, programs, images) = bundle();
    let mirrors = Mirrors::serve(&place, &version, &programs, &images);

    let port = free_port();
    let lab = cluster::example("upstream-test", port, free_port());
    let labfile = fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    let (stack, storage) = ("[stack.kubernetes]", "storage = \"nfs\"");
    let (application, driver) = ("docker.io/library/busybox:1.37", "# its driver comes from elsewhere");
    assert!([stack, storage, application].iter().all(|part| labfile.contains(part)));
    let options = format!(
        "{stack}\nversion = \"{}\"\npackages = \"{}\"\npackages_key = \"mirror.asc\"\nimages = \"{}\"\n\
         mirror_ca = \"ca.crt\"\n",
        mirrors.minor, mirrors.packages, mirrors.images
    );
    for file in ["mirror.asc", "ca.crt"] {
        fs::copy(mirrors.folder.path().join(file), lab.dir().join(file)).unwrap();
    }
    let labfile = labfile.replacen(stack, &options, 1).replace(storage, driver);
    lab.rewrite(&labfile.replace(application, &format!("{}/busybox:1", mirrors.images)));
    // That there is a bundle of this version changes nothing: it has no mirrors.
    assert!(lab.run(&["plan"]).contains(&format!("stacks: kubernetes {} from upstream\n", mirrors.minor)));

    lab.run(&["up"]);
    lab.run(&["check"]);
    assert!(http_get(port, "/").contains("hello from "));
    assert_eq!(lab.status()["stacks"][0]["source"], "upstream");
    let lock = fs::read_to_string(lab.dir().join("lab.lock")).unwrap();
    assert!(lock.contains("source = \"upstream\"") && !lock.contains("BEGIN "), "{lock}");

    let cluster = Cluster { lab };
    // Programs are those of packages, and so is the service that runs kubelet.
    let owners =
        cluster.master("dpkg -S /usr/bin/kubelet /usr/bin/kubeadm /opt/cni/bin/bridge | sed 's/:.*//'");
    assert_eq!(owners, "kubelet\nkubeadm\nkubernetes-cni");
    let unit = cluster.master("systemctl show -p FragmentPath -p DropInPaths kubelet.service");
    assert!(
        unit.contains("/usr/lib/systemd/system/kubelet.service") && unit.contains("10-kubeadm.conf"),
        "{unit}"
    );
    // The API server's image came from the mirror, and has the name that kubeadm knows it by.
    let named = "ctr --namespace k8s.io images ls | awk '/kube-apiserver:/ { print $1, $3 }'";
    let images = cluster.master(named);
    let digests: Vec<&str> = images.lines().filter_map(|line| Some(line.split_once(' ')?.1)).collect();
    assert!(images.contains(&format!("{}/kube-apiserver:v{version} ", mirrors.images)), "{images}");
    assert!(digests.len() >= 2 && digests.iter().all(|digest| *digest == digests[0]), "{images}");
    // The repository's key was for the installation.
    let (_, left) = cluster.lab.shell("master", "ls /etc/apt/sources.list.d/kubernetes.sources 2>&1", b"");
    assert!(left.contains("No such file"), "{left}");
}
