//! `lab check`: the labfile's tests of a lab.

use std::process::ExitCode;

use serde::Serialize;

use super::{Context, Error, exit, ssh, table};
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
}

/// Runs the checks; the exit status is 0 if all of them pass.
pub fn run(context: &Context, only: Option<&str>) -> Result<ExitCode, Error> {
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
    context.print(&results, |results| text(results))?;
    Ok(exit(good))
}

/// Runs a check on its nodes, all at the same time.
fn run_one(lab: &Lab, check: &Check) -> Result<Vec<CheckResult>, Error> {
    let nodes = lab.targets(&check.on);
    for node in &nodes {
        ssh::running(lab, &node.name)?;
    }
    let limit = lab.limit(LIMIT_S);
    let results: Vec<Result<CheckResult, Error>> = std::thread::scope(|scope| {
        let one = |node: &crate::labfile::topology::Node| {
            let task = lab.progress.begin(&node.name, &check.name);
            let environment = actions::environment(lab, node);
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
            })
        };
        let threads: Vec<_> = nodes.into_iter().map(|node| scope.spawn(move || one(node))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    results.into_iter().collect()
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
