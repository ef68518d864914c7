//! A node that runs a virtual machine of its own, which goes on where it was when the node is restored.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_images::initramfs::Builder;
use lab_tests::{TestLab, home, output, program, text, waiting::Waiting};

/// What the machine in the node does: it counts on its console.
const COUNTS: &[u8] = b"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
i=0
while :; do echo count $i >/dev/hvc0; i=$((i + 1)); /bin/busybox sleep 1; done
";

/// How far it has counted.
fn count(lab: &TestLab, more_than: u32) -> u32 {
    let mut waiting = Waiting::new("a machine in a node", std::time::Duration::from_secs(180));
    loop {
        let (_, said) = lab.shell("a", "tail -n 1 /root/log; cat /root/said", b"");
        let count = said.trim().strip_prefix("count ").and_then(|count| count.parse().ok());
        if let Some(count) = count.filter(|count| *count > more_than) {
            return count;
        }
        assert!(!waiting.is_over(&said), "it has not counted further than {more_than}: {said}");
        std::thread::park_timeout(std::time::Duration::from_secs(1));
    }
}

#[test]
fn a_machine_in_a_node_goes_on() {
    let lab = TestLab::new(
        "name = \"nested\"\nimage = \"debian-13\"\n[node.a]\nnested = true\nmemory = \"768MiB\"\ndisk = \"3GiB\"\n",
    );
    let up = output(lab.command(&["up"]), b"");
    let said = text(&up);
    if said.contains("offers its guests no virtual machines of their own") {
        eprintln!("SKIPPED: a machine in a node: nested virtualization is switched off in this host's KVM");
        return;
    }
    assert!(up.status.success(), "{said}");
    let (status, said) = lab.shell("a", "modprobe -a kvm_amd kvm_intel; test -c /dev/kvm", b"");
    assert_eq!(status, Some(0), "{said}");

    lab.run(&["cp", "a:/usr/bin/busybox", "busybox"]);
    let busybox = std::fs::read(lab.dir().join("busybox")).unwrap();
    let initrd = Builder::with_busybox(busybox, COUNTS).unwrap().finish().unwrap();
    std::fs::write(lab.dir().join("initrd"), initrd).unwrap();
    let (vmm, kernel) = (program().with_file_name("lab-vmm"), home().join("images/debian-13/kernel"));
    lab.run(&["cp", vmm.to_str().unwrap(), kernel.to_str().unwrap(), "initrd", "a:"]);
    let run = "setsid ./lab-vmm --kernel kernel --initrd initrd --cmdline 'quiet console=hvc0' --memory 128 --console-log log \
               >said 2>&1 </dev/null &";
    assert_eq!(lab.shell("a", run, b"").0, Some(0));
    let before = count(&lab, 0);
    lab.run(&["snapshot", "save", "one"]);
    let later = count(&lab, before + 5);
    lab.run(&["snapshot", "restore", "one"]);
    // Back where it was, and on from there.
    let (_, said) = lab.shell("a", "grep -c . log; wc -c <said", b"");
    let lines: Vec<u32> = said.lines().map(|line| line.parse().unwrap()).collect();
    assert!(lines[0] <= later && lines[1] == 0, "{said}, after {later}");
    count(&lab, before + 2);
}
