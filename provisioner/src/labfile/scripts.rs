//! The user's own steps and checks: where they run, and their scripts.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
    path::{Component, Path},
};

use super::{
    diagnostic::visible,
    file::{At, CheckTable, StepTable},
    read_text,
    report::Report,
    spell::{list, nearest},
    topology::{Check, Node, Step, Target},
};

/// What scripts find in their environment, except those of baked steps; longer names first.
const OF_ONE_NODE: [&str; 11] = [
    "LAB_PATIENCE",
    "LAB_MASTER_IP",
    "LAB_MASTER",
    "LAB_GATEWAY",
    "LAB_SUBNET",
    "LAB_STACKS",
    "LAB_NODES",
    "LAB_NODE",
    "LAB_NAME",
    "LAB_ROLE",
    "LAB_IP",
];

/// What `on` can name.
pub struct Places<'n> {
    /// Nodes of each role.
    roles: BTreeMap<&'n str, BTreeSet<&'n str>>,
    nodes: BTreeSet<&'n str>,
}

impl<'n> Places<'n> {
    /// The nodes and roles of a lab.
    pub fn of(nodes: &'n [Node]) -> Self {
        let mut roles: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for node in nodes {
            roles.entry(&node.role).or_default().insert(&node.name);
        }
        Self { roles, nodes: nodes.iter().map(|node| node.name.as_str()).collect() }
    }

    fn target(&self, on: Option<&At<String>>, key: &str, report: &mut Report<'_>) -> Target {
        let Some(on) = on else { return Target::All };
        let name = on.get().as_str();
        if name == "all" {
            return Target::All;
        }
        match (self.nodes.contains(name), self.roles.get(name)) {
            (true, Some(of_role)) if !of_role.iter().eq([&name]) => {
                let message = format!("`{name}` is a node and also the role of others");
                report.error(Some(on.span()), key, message, "rename the node, or give the role another name");
            }
            (true, _) => return Target::Node(name.to_owned()),
            (false, Some(_)) => return Target::Role(name.to_owned()),
            (false, None) => {
                let words: BTreeSet<&str> =
                    self.nodes.iter().chain(self.roles.keys()).copied().chain(["all"]).collect();
                let help = match nearest(name, words.iter().copied()) {
                    Some(word) => format!("did you mean `{word}`?"),
                    None if words.len() <= 12 => {
                        format!("possible are: {}", list(&words.into_iter().collect::<Vec<_>>()))
                    }
                    None => {
                        let roles: Vec<&str> = self.roles.keys().copied().collect();
                        format!("possible are `all`, the name of a node, or a role: {}", list(&roles))
                    }
                };
                let message = format!("`{}` is neither a node nor a role of this lab", visible(name));
                report.error(Some(on.span()), key, message, help);
            }
        }
        Target::All
    }
}

/// The steps, in the order of the file.
pub fn steps(
    tables: &[At<StepTable>],
    places: &Places<'_>,
    folder: &Path,
    report: &mut Report<'_>,
) -> Vec<Step> {
    let mut names = HashSet::new();
    let mut steps = Vec::new();
    for (index, at) in tables.iter().enumerate() {
        let (table, path) = (at.get(), format!("step[{index}]"));
        let name = unique(table.name.as_ref(), &mut names, "step", &path, report);
        let on = places.target(table.on.as_ref(), &format!("{path}.on"), report);
        let run = script(table.run.as_ref(), table.script.as_ref(), at.span(), folder, &path, report);
        let files = taken_along(table.files.as_ref(), folder, &path, report);
        if let (Some(name), Some(run)) = (name, run) {
            let bake = table.bake.as_ref().is_some_and(|bake| *bake.get());
            if let Some(at) = table.bake.as_ref().filter(|_| bake)
                && let Some(variable) = OF_ONE_NODE.iter().find(|name| run.contains(*name))
            {
                let message =
                    format!("a baked step finds no `{variable}`: its result is for many nodes and labs");
                let help = "leave that part to a step that is not baked";
                report.error(Some(at.span()), &format!("{path}.bake"), message, help);
            }
            steps.push(Step { name, on, run, files, bake });
        }
    }
    steps
}

/// The checks, in the order of the file.
pub fn checks(
    tables: &[At<CheckTable>],
    places: &Places<'_>,
    folder: &Path,
    report: &mut Report<'_>,
) -> Vec<Check> {
    let mut names = HashSet::new();
    let mut checks = Vec::new();
    for (index, at) in tables.iter().enumerate() {
        let (table, path) = (at.get(), format!("check[{index}]"));
        let name = unique(table.name.as_ref(), &mut names, "check", &path, report);
        let on = places.target(table.on.as_ref(), &format!("{path}.on"), report);
        let run = script(table.run.as_ref(), table.script.as_ref(), at.span(), folder, &path, report);
        let hint = table.hint.as_ref().map(|hint| hint.get().clone());
        if let (Some(name), Some(run)) = (name, run) {
            checks.push(Check { name, on, run, hint });
        }
    }
    checks
}

/// Files and folders beside the labfile: they lie in its folder, and are there.
fn taken_along(
    files: Option<&At<Vec<At<String>>>>,
    folder: &Path,
    path: &str,
    report: &mut Report<'_>,
) -> Vec<String> {
    let mut found = Vec::new();
    for (index, file) in files.iter().flat_map(|files| files.get()).enumerate() {
        let key = format!("{path}.files[{index}]");
        let name = Path::new(file.get());
        let below = name.components().all(|part| matches!(part, Component::Normal(_)));
        if !below || file.get().is_empty() || file.get().chars().any(char::is_control) {
            let message = format!("`{}` is not a path in the labfile's folder", visible(file.get()));
            report.error(
                Some(file.span()),
                &key,
                message,
                "name a file or a folder that lies beside the labfile",
            );
        } else if !folder.join(name).exists() {
            let message = format!("there is no `{}` in the labfile's folder", visible(file.get()));
            report.error(Some(file.span()), &key, message, "paths are relative to the labfile's folder");
        }
        found.push(file.get().clone());
    }
    found
}

fn unique(
    name: Option<&At<String>>,
    seen: &mut HashSet<String>,
    what: &str,
    path: &str,
    report: &mut Report<'_>,
) -> Option<String> {
    let name = name?;
    let key = format!("{path}.name");
    let text = name.get().trim();
    if text.is_empty() || text.chars().count() > 120 || text.chars().any(char::is_control) {
        let help = "1 to 120 characters on one line, which are shown while it runs";
        report.error(Some(name.span()), &key, format!("this can't be the name of a {what}"), help);
    } else if !seen.insert(text.to_owned()) {
        let message = format!("there are two {what}s `{}`", visible(text));
        report.error(Some(name.span()), &key, message, "rename one of them");
    }
    Some(text.to_owned())
}

/// The text to run, of `run` or of the file that `script` names.
fn script(
    run: Option<&At<String>>,
    script: Option<&At<String>>,
    table: Range<usize>,
    folder: &Path,
    path: &str,
    report: &mut Report<'_>,
) -> Option<String> {
    match (run, script) {
        (None, None) => {
            let help = "add `run = \"…\"` with shell commands, or `script = \"FILE\"`";
            report.error(Some(table), path, "there is nothing to run".to_owned(), help);
            None
        }
        (Some(_), Some(script)) => {
            let message = "`run` and `script` can't both be given".to_owned();
            report.error(Some(script.span()), &format!("{path}.script"), message, "remove one of them");
            None
        }
        (Some(run), None) => {
            if run.get().trim().is_empty() {
                let key = format!("{path}.run");
                report.error(
                    Some(run.span()),
                    &key,
                    "`run` is empty".to_owned(),
                    "write shell commands, or remove the table",
                );
                return None;
            }
            Some(run.get().clone())
        }
        (None, Some(script)) => {
            let file = folder.join(script.get());
            match read_text(&file, "script", "paths are relative to the labfile's folder") {
                Ok(text) if text.trim().is_empty() => {
                    let message = format!("the script {} is empty", visible(script.get()));
                    report.error(
                        Some(script.span()),
                        &format!("{path}.script"),
                        message,
                        "write shell commands into it",
                    );
                    None
                }
                Ok(text) => Some(as_shell(&text)),
                Err(wrong) => {
                    for error in wrong.errors {
                        let message = format!("script `{}`: {}", visible(script.get()), error.message);
                        let help = error.help.unwrap_or_default();
                        report.error(Some(script.span()), &format!("{path}.script"), message, help);
                    }
                    None
                }
            }
        }
    }
}

/// A script for `/bin/sh`: as it is, or, where it begins `#!`, one that runs it by its own interpreter.
fn as_shell(text: &str) -> String {
    if !text.starts_with("#!") {
        return text.to_owned();
    }
    let mut mark = "END_OF_SCRIPT".to_owned();
    while text.lines().any(|line| line == mark) {
        mark.push('_');
    }
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    format!(
        "script=$(mktemp)\ncat > \"$script\" <<'{mark}'\n{text}{newline}{mark}\nchmod 700 \"$script\"\nstatus=0\n\
         \"$script\" || status=$?\nrm -f \"$script\"\nexit \"$status\"\n"
    )
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_script_is_run_by_its_interpreter() {
        let text = "#!/bin/cat\nEND_OF_SCRIPT\n$HOME `x`";
        let mut shell = Command::new("sh")
            .args(["-e", "-s"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        shell.stdin.take().unwrap().write_all(as_shell(text).as_bytes()).unwrap();
        let output = shell.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{text}\n"));
        let failing = Command::new("sh").args(["-ec", &as_shell("#!/bin/sh\nexit 7\n")]).status().unwrap();
        assert_eq!(failing.code(), Some(7));
        assert_eq!(as_shell("echo"), "echo");
    }
}
