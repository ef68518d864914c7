//! `lab check`: the labfile's tests of a lab.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use super::{Context, Error, exit, ssh, table, write_out};
use crate::{actions, lab::Lab, labfile::topology::Check};

/// How long one check may take, with KVM.
const LIMIT_S: u32 = 120;

/// Result of one check on one node.
#[derive(Debug, Serialize)]
struct CheckResult {
    check: String,
    node: String,
    passed: bool,
    /// Last line of its output, or why it could not run.
    said: String,
    hint: Option<String>,
    took_ms: u64,
}

/// Runs the checks; the exit status is 0 if all of them pass. With `junit`, the results are printed as XML.
pub fn run(context: &Context, only: Option<&str>, junit: bool) -> Result<ExitCode, Error> {
    let lab = context.wanted()?;
    let checks: Vec<&Check> =
        lab.topology.checks.iter().filter(|check| only.is_none_or(|name| name == check.name)).collect();
    if checks.is_empty() {
        let what = only.map_or("no checks".into(), |name| format!("no check `{name}`"));
        return Err(Error::Other(format!("{} has {what}", lab.topology.labfile.display())));
    }
    let mut results = Vec::new();
    for check in checks {
        results.extend(run_one(&lab, check)?);
    }
    let good = results.iter().all(|result| result.passed);
    if junit {
        write_out(&as_junit(&lab.topology.name, &results)?)?;
    } else {
        context.print(&results, |results| text(results))?;
    }
    Ok(exit(good))
}

/// Runs a check on its nodes, all at the same time.
fn run_one(lab: &Lab, check: &Check) -> Result<Vec<CheckResult>, Error> {
    let nodes = lab.targets(&check.on);
    for node in &nodes {
        ssh::reachable(lab, &node.name)?;
    }
    let limit = lab.limit(LIMIT_S);
    let results: Vec<Result<CheckResult, Error>> = std::thread::scope(|scope| {
        let one = |node: &crate::labfile::topology::Node| {
            let task = lab.progress.begin(&node.name, &check.name);
            let environment = actions::environment(lab, node);
            let started = Instant::now();
            let outcome =
                lab.channel(&node.name)
                    .script(&check.run, &environment, None, limit, &mut |line| task.detail(line))?;
            let passed = outcome.success();
            if passed {
                task.done()
            } else {
                task.failed()
            }
            let said = match outcome.tail.last() {
                Some(line) => line.clone(),
                None if passed => String::new(),
                None => outcome.describe(limit),
            };
            Ok(CheckResult {
                check: check.name.clone(),
                node: node.name.clone(),
                passed,
                said,
                hint: check.hint.clone().filter(|_| !passed),
                took_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            })
        };
        let threads: Vec<_> = nodes.into_iter().map(|node| scope.spawn(move || one(node))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    results.into_iter().collect()
}

/// A test suite named after the lab, in which a node is a class, and a check is a test.
fn as_junit(lab: &str, results: &[CheckResult]) -> Result<String, Error> {
    let mut suite = TestSuite::new(lab);
    for result in results {
        let status = if result.passed {
            TestCaseStatus::success()
        } else {
            let mut failed = TestCaseStatus::non_success(NonSuccessKind::Failure);
            failed.set_message(result.said.as_str());
            if let Some(hint) = &result.hint {
                failed.set_description(hint.as_str());
            }
            failed
        };
        let mut case = TestCase::new(result.check.as_str(), status);
        case.set_classname(format!("{lab}.{}", result.node)).set_time(Duration::from_millis(result.took_ms));
        suite.add_test_case(case);
    }
    let mut report = Report::new("lab check");
    report.add_test_suite(suite);
    report.to_string().map_err(|error| Error::Other(format!("cannot write the results as XML: {error}")))
}

fn text(results: &[CheckResult]) -> String {
    let row = |result: &CheckResult| {
        let mark = if result.passed { "passed" } else { "FAILED" };
        vec![result.check.clone(), result.node.clone(), mark.into(), result.said.clone()]
    };
    let mut text = table(&["CHECK", "NODE", "RESULT", "SAID"], &results.iter().map(row).collect::<Vec<_>>());
    for result in results {
        if let Some(hint) = &result.hint {
            text += &format!("\n{} on {}: {hint}", result.check, result.node);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_become_junit() {
        let result = |passed: bool| CheckResult {
            check: "a < b & c".into(),
            node: "n1".into(),
            passed,
            said: "no \u{1b}[1m\"route\"".into(),
            hint: (!passed).then(|| "look at <it>".into()),
            took_ms: 1500,
        };
        let xml = as_junit("net", &[result(true), result(false)]).unwrap();
        for part in [
            r#"<testsuite name="net" tests="2" skipped="0" errors="0" failures="1">"#,
            r#"<testcase name="a &lt; b &amp; c" classname="net.n1" time="1.500"/>"#,
            r#"<failure message="no &quot;route&quot;">look at &lt;it&gt;</failure>"#,
        ] {
            assert!(xml.contains(part), "{part} is not in {xml}");
        }
    }
}
