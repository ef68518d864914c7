//! labfiles/classroom.toml: a task that is not done in the lab, is done in one fork, and stays undone in the other.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use lab_tests::{TestLab, http_get, output};

const SOLUTION: &str = "cat > /etc/systemd/system/page.service <<END
[Unit]
Description=The page
[Service]
ExecStart=/usr/bin/busybox httpd -f -p 80 -h /srv/www
[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload && systemctl enable --now page.service";

#[test]
fn a_student_solves_the_task() {
    let port = lab_tests::free_port();
    let lab = TestLab::example("classroom.toml", |text| {
        let text = text.replacen("name = \"classroom\"", "name = \"class-test\"", 1);
        assert!(text.contains("\"8088:"));
        text.replace("\"8088:", &format!("\"{port}:"))
    });
    lab.run(&["up"]);
    lab.run(&["snapshot", "save", "start"]);
    lab.run(&["fork", "start", "--count", "2"]);
    lab.run(&["--fork", "1", "exec", "desk", "sh", "-c", SOLUTION]);
    lab.run(&["--fork", "1", "check"]);
    assert!(http_get(20100, "/").contains("a page of class-test"));
    for of in [&["--fork", "2"][..], &[]] {
        let failed = output(lab.command(&[of, &["check"]].concat()), b"");
        let said = String::from_utf8_lossy(&failed.stdout);
        assert_eq!(failed.status.code(), Some(1), "{said}");
        assert!(said.matches("FAILED").count() == 4 && said.contains("`systemctl enable page`"), "{said}");
    }
    lab.run(&["destroy", "--yes", "--all-forks"]);
}
