//! A stack beside the labfile: its files, the functions that every script finds, a password that is told once, and a
//! worker that goes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::os::unix::fs::PermissionsExt;

use lab_tests::{TestLab, output, text};

const LABFILE: &str = r#"
name = "own-stack"
image = "tiny"
[node.master]
memory = "128MiB"
[stack.service]
[[step]]
name = "after it"
on = "master"
run = "test -e /root/allowed"
"#;

const WORKER: &str = "[node.worker1]\nmemory = \"128MiB\"\n";

const STACK: &str = r#"
description = "a service with a password"
[[source]]
name = "here"
description = "nothing is fetched"
[[step]]
name = "start"
on = "master"
kind = "run"
script = "start.sh"
files = ["service.conf"]
gives = ["admin-password"]
[[step]]
name = "know"
on = "worker"
kind = "run"
script = "know.sh"
after = ["start"]
takes = ["admin-password"]
[[step]]
name = "leave"
on = "all"
kind = "leave"
script = "leave.sh"
[[secret]]
file = "admin-password"
description = "the service, user admin"
"#;

const START: &str = r#"
try() {
    echo one >>/root/tries
    [ "$(wc -l </root/tries)" -ge 3 ]
}
again 5 try
cp "$LAB_STEP/service.conf" /etc/service.conf
password /root/admin-password root
"#;

const KNOW: &str = r#"
cp "$LAB_STEP/admin-password" /root/known
"#;

const LEAVE: &str = r#"
ping -c 1 -w 5 "$LAB_LEAVING" >/dev/null && echo "$LAB_LEAVING was there" >>/root/left
"#;

/// Runs `lab up`; what it said.
fn up(lab: &TestLab) -> String {
    let output = output(lab.command(&["up"]), b"");
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_password_is_told_once_and_a_worker_goes() {
    let labfile = format!("{LABFILE}{WORKER}");
    let lab = TestLab::new(&labfile);
    let folder = lab.dir().join("stacks/service");
    std::fs::create_dir_all(&folder).unwrap();
    let files = [
        ("stack.toml", STACK),
        ("start.sh", START),
        ("know.sh", KNOW),
        ("leave.sh", LEAVE),
        ("service.conf", "colour = blue\n"),
    ];
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
    // Told although something failed after it.
    let said = lab.fails(1, &["up"]);
    assert!(said.contains("after it"), "{said}");
    let kept = lab_tests::home().join("labs/own-stack/secrets/service.admin-password");
    let password = std::fs::read_to_string(&kept).unwrap();
    let password = password.trim();
    assert!(password.len() == 20 && password.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{password}");
    // Not to what is no terminal: there it is the file that is told.
    assert!(said.contains("the service, user admin is in ") && !said.contains(password), "{said}");
    assert!(said.contains(kept.to_str().unwrap()), "{said}");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let (_, found) =
        lab.shell("master", "cat /etc/service.conf; wc -l </root/tries; ls /run/lab-step 2>&1", b"");
    assert!(found.starts_with("colour = blue\n3\n") && found.contains("No such file"), "{found}");
    // No log of the step has it, nor does the plan.
    let log = lab_tests::home().join("labs/own-stack/nodes/master/steps/service-start.log");
    assert!(!std::fs::read_to_string(log).unwrap().contains(password));
    assert!(!lab.run(&["plan"]).contains(password));

    assert_eq!(lab.shell("master", "touch /root/allowed", b"").0, Some(0));
    assert!(!up(&lab).contains("user admin"));
    let said = up(&lab);
    assert!(said.contains("everything is up already") && !said.contains("user admin"), "{said}");
    // A file of the stack that has changed is a step that has changed.
    std::fs::write(folder.join("service.conf"), "colour = red\n").unwrap();
    assert!(up(&lab).contains("service/start"));
    assert_eq!(lab.shell("master", "cat /etc/service.conf", b"").1, "colour = red\n");
    assert_eq!(std::fs::read_to_string(&kept).unwrap().trim(), password, "made once");

    // A worker that is taken out of the labfile: the master takes its leave while it still runs, then it is off, and back
    // with what it had when it is in the labfile again.
    assert_eq!(lab.shell("worker1", "echo kept >/root/kept", b"").0, Some(0));
    lab.rewrite(LABFILE);
    let said = up(&lab);
    assert!(
        said.contains("worker1 is no longer in the labfile") && said.contains("lab destroy worker1"),
        "{said}"
    );
    assert_eq!(lab.shell("master", "cat /root/left", b"").1, "worker1 was there\n");
    assert_eq!(lab_tests::on_host("lab_pid own-stack/nodes/worker1/vmm.lock"), "", "it is off");
    lab.rewrite(&labfile);
    up(&lab);
    assert_eq!(lab.shell("worker1", "cat /root/kept", b"").1, "kept\n");

    // Nobody takes leave of anybody where one of the names is wrong.
    assert!(lab.fails(1, &["destroy", "--yes", "worker1", "wroker1"]).contains("wroker1"));
    assert_eq!(lab.shell("master", "cat /root/left", b"").1, "worker1 was there\n");
    // A master that is made anew has another password, which the worker learns.
    let known = || lab.shell("worker1", "cat /root/known", b"").1;
    assert_eq!(known().trim(), password);
    lab.run(&["destroy", "--yes", "master"]);
    assert_eq!(lab.shell("worker1", "cat /root/left", b"").1, "master was there\n");
    assert!(lab.fails(1, &["up"]).contains("after it"));
    let new = std::fs::read_to_string(&kept).unwrap();
    assert!(new.trim() != password && known() == new);
}
