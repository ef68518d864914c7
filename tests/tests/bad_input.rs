//! What is wrong is told in a sentence, with a non-zero status, and nothing half-made is left.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::net::TcpListener;

use lab_tests::{TestLab, free_port};

fn one_node(name: &str, extra: &str) -> String {
    format!("name = \"{name}\"\nimage = \"tiny\"\n[node.a]\nmemory = \"128MiB\"\ndisk = \"256MiB\"\n{extra}")
}

#[test]
fn a_wrong_labfile_is_shown() {
    let lab = TestLab::new(&one_node("wrong", "memroy = \"1GiB\"\n"));
    let said = lab.fails(2, &["up"]);
    assert!(said.contains("lab.toml:6") && said.contains("memroy") && said.contains("`memory`"), "{said}");
    lab.rewrite(&one_node("wrong", ""));
}

#[test]
fn a_port_in_use_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let lab = TestLab::new(&one_node("taken", &format!("forward = [\"{port}:80\"]\n")));
    let said = lab.fails(1, &["up"]);
    assert!(said.contains(&port.to_string()) && said.contains("in use"), "{said}");
    assert_ne!(lab.state_of("a"), "running");
    // Once the port is free, up goes on.
    drop(listener);
    lab.run(&["up"]);
    assert_eq!(lab.state_of("a"), "running");
}

#[test]
fn too_much_memory_or_disk_is_refused_before_anything_starts() {
    let text = one_node("large", "");
    for (from, to, word) in [("128MiB", "64GiB", "memory"), ("256MiB", "60TiB", "disk")] {
        let lab = TestLab::new(&text.replace(from, to));
        let output = lab_tests::output(lab.command(&["up"]), b"");
        let said = lab_tests::text(&output);
        assert!(!output.status.success() && said.contains(word) && !said.contains("panicked"), "{said}");
        lab.rewrite(&text);
        assert_eq!(lab.state_of("a"), "absent");
    }
}

#[test]
fn a_name_belongs_to_one_labfile() {
    let first = TestLab::new(&one_node("same", ""));
    first.run(&["up"]);
    let second = TestLab::new(&one_node("same", &format!("forward = [\"{}:80\"]\n", free_port())));
    let said = second.fails(1, &["up"]);
    assert!(said.contains(&first.dir().display().to_string()), "{said}");
    assert_eq!(first.state_of("a"), "running");
    second.rewrite(&one_node("other", ""));
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let lab = TestLab::new(&one_node("noimage", "").replace("tiny", "nonesuch"));
    let said = lab.fails(1, &["up"]);
    assert!(said.contains("nonesuch") && said.contains("lab image"), "{said}");
}

#[test]
fn a_failed_step_shows_its_output_and_goes_on_after_a_change() {
    let step = |run: &str| one_node("step", &format!("[[step]]\nname = \"breaks\"\nrun = \"{run}\"\n"));
    let lab = TestLab::new(&step("echo the reason; exit 3"));
    let said = lab.fails(1, &["up"]);
    assert!(said.contains("breaks") && said.contains("status 3") && said.contains("the reason"), "{said}");
    lab.rewrite(&step("echo fine"));
    lab.run(&["up"]);
}
