//! labfiles/cicd: the pipeline from a push to what is deployed, and back from what is broken. Without Jenkins, which runs
//! the same script.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs)]

use lab_tests::{TestLab, cluster, free_port, http_get, long};

/// Runs a shell command on the master with this status at its end; all that it wrote.
fn master(lab: &TestLab, status: i32, script: &str) -> String {
    let (ended, said) = lab.shell("master", &format!("exec 2>&1\n{script}"), b"");
    assert_eq!(ended, Some(status), "{script}: {said}");
    said
}

/// Changes the source and pushes that, as somebody at the shop does.
fn push(lab: &TestLab, change: &str) {
    master(
        lab,
        0,
        &format!(
            "set -e; cd /root/shop; {change}; git diff --stat; git commit -q -a -m 'a change'; git push -q"
        ),
    );
}

#[test]
fn from_a_push_to_what_is_deployed() {
    if !long("the pipeline") || !cluster::can_be_had("the pipeline") {
        return;
    }
    let (port, jenkins, api) = (free_port(), free_port(), free_port());
    let lab = TestLab::example_folder("cicd", |text| {
        let text = text.replacen("name = \"cicd\"", "name = \"cicd-test\"", 1);
        assert!(["\"8080:", "\"8081:", "\"6443:", "[stack.jenkins]"].iter().all(|word| text.contains(word)));
        text.replace("\"8080:", &format!("\"{jenkins}:"))
            .replace("\"8081:", &format!("\"{port}:"))
            .replace("\"6443:", &format!("\"{api}:"))
            .replace("[stack.jenkins]", "")
    });
    lab.run(&["up"]);
    // Nothing is deployed, and there is nothing to go back to.
    master(&lab, 1, "/srv/pipeline/pipeline rollback");
    master(&lab, 2, "/srv/pipeline/pipeline build '1; x'");

    let said = master(&lab, 0, "/srv/pipeline/pipeline all 1");
    assert!(said.contains("1 is deployed"), "{said}");
    lab.run(&["check"]);
    let served_by = |version: &str, honey: u32| {
        let page = http_get(port, "/");
        assert!(page.contains("A small shop") && page.contains(&format!("gateway/{version} ")), "{page}");
        let products = http_get(port, "/api/products");
        assert!(products.contains(&format!("catalog/{version} ")), "{products}");
        assert!(products.contains(&format!("\"cents\": {honey}")), "{products}");
    };
    served_by("1", 720);

    master(&lab, 0, "git clone -q /srv/git/shop.git /root/shop");
    push(&lab, "sed -i \"s/'honey', 720/'honey', 750/\" catalog.py");
    let said = master(&lab, 0, "/srv/pipeline/pipeline all 2");
    assert!(said.contains("2 is deployed"), "{said}");
    served_by("2", 750);

    // What the tests find is not even in the registry.
    push(&lab, "sed -i 's/stock - ?/stock + ?/' catalog.py");
    let (status, said) = lab.shell("master", "/srv/pipeline/pipeline all wrong 2>&1", b"");
    assert!(status != Some(0) && said.contains("FAILED") && !said.contains("deploying"), "{said}");
    let tags = "curl -sS https://master:5000/v2/shop/catalog/tags/list";
    assert!(!master(&lab, 0, tags).contains("wrong"));
    push(&lab, "git revert -n HEAD");

    // What only shows when it runs is taken back.
    push(&lab, "sed -i 's/ gateway.py index.html/ gateway.py/' Dockerfile");
    let said = master(&lab, 1, "/srv/pipeline/pipeline all 3");
    assert!(said.contains("3 does not answer as it should"), "{said}");
    assert!(said.contains("rolled back to 2"), "{said}");
    assert!(master(&lab, 0, tags).contains("\"3\""));
    served_by("2", 750);
    lab.run(&["check"]);
}
