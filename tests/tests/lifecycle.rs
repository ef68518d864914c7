//! A lab's life through the real command, on the tiny image: up, again, into nodes, halt, restart, destroy.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_tests::{TestLab, emulated, free_port, http_get, waiting::Waiting};

fn two_nodes(name: &str, port: u16) -> String {
    format!(
        r#"
name = "{name}"
image = "tiny"

[network]
subnet = "10.77.0.0/24"

[node.master]
ip = "10.77.0.10"
memory = "128MiB"
disk = "256MiB"
forward = ["{port}:80"]

[node.worker1]
ip = "10.77.0.11"
memory = "128MiB"
disk = "256MiB"
disks = ["64MiB"]

[[step]]
name = "page"
on = "all"
run = """
mkdir -p /srv/www
echo "page of $LAB_NODE at $LAB_IP" > /srv/www/index.html
echo ran >> /srv/count
pidof httpd || httpd -h /srv/www
# Neither its script nor its output is waited for.
sleep 100000 &
"""

[[check]]
name = "the page is there"
on = "all"
run = "wget -q -O - http://$LAB_IP/ | grep page"
hint = "start httpd"
"#
    )
}

#[test]
fn a_lab_s_life() {
    let port = free_port();
    let text = two_nodes("life", port);
    let lab = TestLab::new(&text);

    assert_eq!(lab.state_of("master"), "absent");
    let plan: serde_json::Value = serde_json::from_str(&lab.run(&["plan", "-o", "json"])).unwrap();
    assert!(
        plan.as_array()
            .unwrap()
            .iter()
            .all(|entry| entry["done"] == false || entry["action"] == "image tiny")
    );
    // What the caller has open, as `flock 9 lab up` does, is not held by what runs on.
    let (held, given) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&given, rustix::io::FdFlags::empty()).unwrap();
    lab.run(&["up"]);
    drop(given);
    let mut ended = [rustix::event::PollFd::new(&held, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut ended, Some(&limit)), Ok(1), "a pipe of the caller's is still open");
    assert_eq!(lab.shell("master", "pidof sleep >/dev/null && echo left", b"").1, "left\n");
    if lab_tests::emulated() {
        // Guests have this processor's time, however badly its speed was measured at first.
        let tolerance = lab_tests::on_host("cat /sys/module/kvm/parameters/tsc_tolerance_ppm");
        assert_eq!(tolerance.trim(), "100000");
    }
    assert_eq!((lab.state_of("master"), lab.state_of("worker1")), ("running".into(), "running".into()));

    // Names, addresses and sizes are those of the file.
    assert_eq!(lab.shell("worker1", "hostname", b""), (Some(0), "worker1\n".into()));
    let (_, address) = lab.shell("worker1", "ip -4 addr show eth0", b"");
    assert!(address.contains("10.77.0.11/24"), "{address}");
    let (_, disks) = lab.shell("worker1", "cat /sys/block/vda/size /sys/block/vdb/size", b"");
    assert_eq!(disks, format!("{}\n{}\n", (256 << 20) / 512, (64 << 20) / 512));

    // Nodes see each other by name, and the outside through the gateway.
    let (status, page) = lab.shell("master", "wget -q -O - http://worker1/", b"");
    assert_eq!((status, page.as_str()), (Some(0), "page of worker1 at 10.77.0.11\n"));
    let (status, said) = lab.shell("master", "ping -c 1 -W 20 worker1 2>&1", b"");
    assert_eq!(status, Some(0), "{said}");
    let (status, said) =
        lab.shell("master", "wget -q -O - http://deb.debian.org/debian/dists/trixie/Release", b"");
    assert!(status == Some(0) && said.contains("Codename: trixie"), "{status:?} {said}");

    // The host sees the forwarded port.
    assert!(http_get(port, "/").contains("page of master at 10.77.0.10"));

    // Input, output and exit status pass.
    let blob: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let (status, sum) = lab.shell("master", "sha256sum | cut -c1-64; exit 7", &blob);
    assert_eq!(status, Some(7));
    let expected = lab_tests::output(std::process::Command::new("sha256sum"), &blob);
    assert_eq!(sum.trim(), String::from_utf8_lossy(&expected.stdout)[..64].to_string());

    // `ssh` is a terminal, with the size of this one.
    let (status, screen) = lab.terminal("worker1", (37, 101), "stty size; tty; exit 9\n");
    assert!(
        status == Some(9) && screen.contains("37 101") && screen.contains("/dev/pts/"),
        "{status:?} {screen}"
    );

    // OpenSSH by itself finds its way with `ssh-config`.
    std::fs::write(lab.dir().join("config"), lab.run(&["ssh-config"])).unwrap();
    let mut ssh = std::process::Command::new("ssh");
    ssh.arg("-F").arg(lab.dir().join("config")).args(["worker1", "hostname"]).env_remove("LAB_HOME");
    let output = lab_tests::output(ssh, b"");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "worker1\n", "{}", lab_tests::text(&output));
    // So do more at once than the node's SSH server takes; and sftp.
    let config = lab.dir().join("config");
    let at_once: Vec<_> = (0..12)
        .map(|_| {
            let mut ssh = std::process::Command::new("ssh");
            ssh.arg("-F").arg(&config).args(["worker1", "true"]).env_remove("LAB_HOME");
            ssh.stdin(std::process::Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut ssh in at_once {
        assert!(ssh.wait().unwrap().success());
    }
    let mut sftp = std::process::Command::new("sftp");
    sftp.args(["-b", "-", "-F"]).arg(&config).arg("worker1").env_remove("LAB_HOME");
    let output = lab_tests::output(sftp, b"get /etc/passwd /dev/null\n");
    assert!(output.status.success(), "{}", lab_tests::text(&output));

    // Nobody listens for others than this machine's own.
    let listeners = lab_tests::listeners();
    assert!(!listeners.is_empty() && listeners.iter().all(|at| at.starts_with("0100007F:")), "{listeners:?}");

    // Files and folders go in and come out.
    std::fs::create_dir(lab.dir().join("in")).unwrap();
    std::fs::write(lab.dir().join("in/blob"), &blob).unwrap();
    lab.run(&["cp", "in", "master:/srv/copy"]);
    lab.run(&["cp", "master:/srv/copy/blob", "out"]);
    assert_eq!(std::fs::read(lab.dir().join("out")).unwrap(), blob);

    // As by scp: the home folder, what links lead to on both sides, wildcards of the node, from node to node.
    lab.shell("master", "mkdir /tmp/cp; ln -s /tmp/cp/behind /tmp/cp/link; echo old >/tmp/cp/behind", b"");
    lab.run(&["cp", "in/blob", "master:~/blob"]);
    lab.run(&["cp", "lab.toml", "master:/tmp/cp/link"]);
    let (_, said) =
        lab.shell("master", "readlink /tmp/cp/link; cat /tmp/cp/link; sha256sum blob | cut -c1-64", b"");
    let labfile = std::fs::read_to_string(lab.dir().join("lab.toml")).unwrap();
    assert_eq!(said.trim(), format!("/tmp/cp/behind\n{labfile}{}", sum.trim()));
    lab.run(&["cp", "master:/tmp/cp/l*", "in/"]);
    assert!(std::fs::symlink_metadata(lab.dir().join("in/link")).unwrap().is_file());
    lab.run(&["cp", "master:/tmp/cp/link", "in/blob", "worker1:/tmp/"]);
    assert_eq!(lab.shell("worker1", "cat /tmp/link", b"").1.trim(), labfile.trim());
    let refused = lab_tests::output(lab.command(&["cp", "in/blob", "master:/not/there/"]), b"");
    assert_eq!(refused.status.code(), Some(1));
    assert!(lab_tests::text(&refused).contains("/not/there/"), "{}", lab_tests::text(&refused));

    // A second up changes nothing.
    let plan: serde_json::Value = serde_json::from_str(&lab.run(&["plan", "-o", "json"])).unwrap();
    assert!(plan.as_array().unwrap().iter().all(|entry| entry["done"] == true), "{plan:#}");
    lab.run(&["up"]);
    assert_eq!(lab.shell("master", "cat /srv/count", b"").1, "ran\n");

    // Checks tell a good lab from a bad one.
    lab.run(&["check"]);
    lab.shell("worker1", "killall httpd", b"");
    let results = lab.command(&["check", "-o", "json"]);
    let results = lab_tests::output(results, b"");
    assert_eq!(results.status.code(), Some(1));
    let results: serde_json::Value = serde_json::from_slice(&results.stdout).unwrap();
    let failed: Vec<_> = results.as_array().unwrap().iter().filter(|r| r["passed"] == false).collect();
    assert!(failed.len() == 1 && failed[0]["node"] == "worker1" && failed[0]["hint"] == "start httpd");
    let junit = lab_tests::output(lab.command(&["check", "--junit"]), b"");
    let said = String::from_utf8_lossy(&junit.stdout);
    assert!(junit.status.code() == Some(1) && said.contains(r#"failures="1""#), "{said}");
    assert!(said.contains(r#"classname="life.worker1""#) && said.contains("start httpd"), "{said}");

    // A step that changed runs again, and only that one.
    lab.rewrite(
        &(text.clone() + "\n[[step]]\nname = \"more\"\non = \"master\"\nrun = \"echo more >> /srv/more\"\n"),
    );
    lab.run(&["up"]);
    assert_eq!(lab.shell("master", "cat /srv/count /srv/more", b"").1, "ran\nmore\n");

    // A forward can be added to a running lab.
    let more = free_port();
    lab.run(&["forward", "add", "worker1", &format!("{more}:80")]);
    lab.run(&["provision", "worker1", "--step", "page"]);
    assert!(http_get(more, "/").contains("page of worker1"));
    lab.run(&["forward", "rm", &more.to_string()]);

    // Power off and on: what was written is there.
    lab.run(&["halt"]);
    assert_eq!((lab.state_of("master"), lab.state_of("worker1")), ("stopped".into(), "stopped".into()));
    lab.run(&["up"]);
    assert_eq!(lab.shell("master", "cat /srv/more", b"").1, "more\n");
    // A larger disk takes a restart, a smaller one a new node.
    let grows = |from: u32, to: u32| {
        let mut waiting = Waiting::new("the file system's growth", std::time::Duration::from_secs(120));
        loop {
            let mib = lab.shell("worker1", "df -m / | awk 'END { print $2 }'", b"").1;
            if mib.trim().parse().is_ok_and(|mib: u32| (from..=to).contains(&mib)) {
                break;
            }
            assert!(!waiting.is_over(&mib), "it has {mib} MiB, not {from} to {to}");
        }
    };
    grows(200, 256);
    let larger = text.replacen("disk = \"256MiB\"\ndisks", "disk = \"640MiB\"\ndisks", 1);
    lab.rewrite(&larger.replacen("disk = \"256MiB\"", "disk = \"128MiB\"", 1));
    let up = lab_tests::output(lab.command(&["up"]), b"");
    let said = lab_tests::text(&up);
    assert!(
        said.contains("has 256MiB, the labfile says 640MiB: `lab restart worker1` makes it larger"),
        "{said}"
    );
    assert!(said.contains("has 256MiB, the labfile says 128MiB: disks don't become smaller"), "{said}");
    lab.run(&["restart", "worker1"]);
    assert_eq!(lab.shell("worker1", "hostname", b"").1, "worker1\n");
    grows(550, 640);

    // The folder of its sockets has gone with the session that it was brought up in: nothing is reached, until `up` has
    // begun again.
    let home = lab_tests::home();
    lab_tests::on_host(&format!("rm -r \"$(readlink {}/labs/life/sockets)\"", home.display()));
    let up = lab_tests::output(lab.command(&["up"]), b"");
    let said = lab_tests::text(&up);
    assert!(up.status.success() && said.contains("the folder of the lab's sockets was gone"), "{said}");
    assert_eq!(lab.shell("master", "cat /srv/more", b"").1, "more\n");

    // One node can go and come back.
    lab.run(&["destroy", "--yes", "worker1"]);
    assert_eq!((lab.state_of("master"), lab.state_of("worker1")), ("running".into(), "absent".into()));
    lab.run(&["up"]);
    assert_eq!(lab.shell("worker1", "cat /srv/count", b"").1, "ran\n");
    lab.run(&["destroy", "--yes"]);
    assert_eq!(lab.state_of("master"), "absent");
}

#[test]
fn a_guest_that_reboots_comes_back() {
    let lab = TestLab::new(&two_nodes("reboot", free_port()));
    lab.run(&["up"]);
    let before = lab.shell("worker1", "cat /proc/sys/kernel/random/boot_id", b"").1;
    lab.shell("worker1", "echo kept > /srv/kept; sync; reboot", b"");
    let mut waiting = Waiting::new("the node after its reboot", std::time::Duration::from_secs(180));
    loop {
        let (status, after) = lab.shell("worker1", "cat /proc/sys/kernel/random/boot_id /srv/kept", b"");
        if status == Some(0) && !after.starts_with(before.trim()) {
            assert!(after.ends_with("kept\n"), "{after}");
            break;
        }
        assert!(!waiting.is_over(&after), "it has not come back: {status:?} {after}");
    }
}

#[test]
fn a_step_may_reboot_its_node() {
    let lab = TestLab::new(
        "name = \"reboots\"\nimage = \"tiny\"\n[node.a]\nmemory = \"128MiB\"\ndisk = \"256MiB\"\n\
         [[step]]\nname = \"reboot\"\nrun = \"\"\"\nif [ ! -e /rebooted ]; then\n    touch /rebooted\n    sync\n    reboot\n    \
         sleep 600\nfi\necho after >> /rebooted\n\"\"\"\n",
    );
    let output = lab_tests::output(lab.command(&["up"]), b"");
    let said = lab_tests::text(&output);
    assert!(output.status.success() && said.contains("the node restarted"), "{said}");
    assert_eq!(lab.shell("a", "cat /rebooted", b"").1, "after\n");
}

#[test]
fn a_node_of_debian_is_entered_over_vsock_and_reaches_the_world() {
    let lab = TestLab::new(
        "name = \"debian\"\nimage = \"debian-13\"\n[node.a]\nmemory = \"512MiB\"\ndisk = \"3GiB\"\n",
    );
    lab.run(&["up"]);
    let (status, said) =
        lab.shell("a", ". /etc/os-release; echo $ID; systemctl is-active ssh.socket; hostname", b"");
    assert_eq!((status, said.as_str()), (Some(0), "debian\nactive\na\n"));
    // Its clock is wrong now, and looked at below.
    assert_eq!(lab.shell("a", "date -s '9 minutes ago'", b"").0, Some(0));
    // Its file system has grown to its disk, or is about to.
    let grown = "systemctl start lab-growfs && df --output=size -BM / | tail -n 1 | tr -dc 0-9";
    let (status, said) = lab.shell("a", grown, b"");
    assert!(status == Some(0) && said.parse::<u32>().unwrap() > 2500, "{status:?} {said}");
    // What was deleted is given back to this machine by fstrim, as on a disk of flash memory.
    let disk = lab_tests::home().join("labs/debian/nodes/a/disk0.qcow2");
    let space = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&disk).unwrap()) / 2048;
    lab.shell("a", "head -c 60000000 /dev/urandom >/srv/blob; sync", b"");
    let full = space();
    assert_eq!(lab.shell("a", "rm /srv/blob; sync; fstrim /", b"").0, Some(0));
    assert!(full > 50 && space() + 40 < full, "{full} MiB were taken, {} are", space());
    // What Java's packages do when they are set up, whose pages are not among those that the image leaves out.
    let link = "update-alternatives --install /usr/bin/one one /bin/true 1 \
                --slave /usr/share/man/man1/one.1 one.1 /etc/hostname";
    assert_eq!(lab.shell("a", link, b"").0, Some(0));
    // An emulated host has no AVX2, which would make encryption slower by far, unless it is started with it.
    if emulated() {
        assert_eq!(lab.shell("a", "grep -m 1 -c -w avx2 /proc/cpuinfo", b"").1, "0\n");
        let said = lab.fails(1, &["host", "start", "--avx2"]);
        assert!(said.contains("runs without AVX2: `lab host stop`"), "{said}");
    }
    // Its own name is its address in the lab, any user may ping, and nobody sets its name once more.
    let (status, said) = lab.shell(
        "a",
        "getent ahosts a | awk '{ print $1 }' | sort -u; su -s /bin/sh nobody -c 'ping -c 1 -W 20 a' >/dev/null && \
         echo pings; systemctl show systemd-hostnamed -P ExecMainStartTimestampMonotonic",
        b"",
    );
    let address = lab.status()["nodes"][0]["ip"].as_str().unwrap().to_owned();
    assert_eq!(said, format!("{address}\npings\n0\n"), "{status:?}");
    // DNS and TCP to the outside.
    let fetch =
        "curl -s -m 60 -o /dev/null -w '%{http_code}' http://deb.debian.org/debian/dists/trixie/Release";
    assert_eq!(lab.shell("a", fetch, b""), (Some(0), "200".into()));
    // While it runs, its clock becomes right again: it is told the time every minute.
    let mut waiting = Waiting::new("a clock that is right", std::time::Duration::from_secs(180));
    loop {
        let (_, told) = lab.shell("a", "date +%s", b"");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        if told.trim().parse::<u64>().is_ok_and(|told| told.abs_diff(now) <= 2) {
            break;
        }
        assert!(!waiting.is_over(&told), "{told}, and it is {now}");
        std::thread::park_timeout(std::time::Duration::from_secs(2));
    }
    // Commands wait for a node that reboots.
    let boot_id = || lab.shell("a", "cat /proc/sys/kernel/random/boot_id", b"");
    let (_, before) = boot_id();
    lab.shell("a", "systemctl reboot", b"");
    let mut waiting = Waiting::new("the node's reboot", std::time::Duration::from_secs(240));
    loop {
        let (status, after) = boot_id();
        if after != before && status == Some(0) {
            break;
        }
        // Until it has gone down, the old boot may answer, or be cut off.
        assert!(!waiting.is_over(&after), "{status:?} {after}");
    }
    lab.run(&["up"]);
    // What was left running outlives the connection that it was started from, which a restore cuts off.
    assert_eq!(lab.shell("a", "nohup sleep 12345 >/dev/null 2>&1 &", b"").0, Some(0));
    lab.run(&["snapshot", "save", "with-it"]);
    lab.run(&["snapshot", "restore", "with-it"]);
    let (status, said) = lab.shell("a", "pgrep -fx 'sleep 12345'", b"");
    assert_eq!(status, Some(0), "{said}");
}
