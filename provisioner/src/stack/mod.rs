//! Stacks: software that lab installs inside nodes, as data and scripts in a folder `NAME/` with a `stack.toml`.
//!
//! - `file`: `stack.toml` as written
//! - `load`: its checks, from a folder or from the binary
//!
//! Nothing here runs a script: that is for the plan's actions.

mod file;
mod load;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

pub use file::{Addresses, Kind};
use serde::Serialize;

/// What is wrong with a stack: told like a labfile's errors.
pub use crate::labfile::Diagnostics as Error;
use crate::{
    enclosed::Enclosed,
    lab::applies,
    labfile::topology::{Node, Stack, Target},
};

/// A stack, checked, with the texts of its scripts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StackDef {
    /// Its name: that of its folder.
    pub name: String,
    /// The folder beside the labfile that it is from; `None` for lab's own.
    pub folder: Option<PathBuf>,
    /// What it is.
    pub description: String,
    /// Where the software can come from, the default first; not without a plain one.
    pub sources: Vec<Source>,
    /// Roles whose nodes get it; empty: all.
    pub roles: Vec<String>,
    /// What can be set in the labfile.
    pub options: Vec<OptionDef>,
    /// What is done, in this order on each node: first what is baked, then what is run.
    pub steps: Vec<StepDef>,
    /// Networks of its own, apart from those that options give.
    pub subnets: Vec<SubnetDef>,
    /// Ports that it serves.
    pub ports: Vec<PortDef>,
    /// What its steps give and people want to know.
    pub secrets: Vec<SecretDef>,
}

/// Where the software comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Source {
    /// Its name: the value of `source` in the labfile.
    pub name: String,
    /// What it is.
    pub description: String,
    /// The plain sources, at least two, of which it stands for one; empty: it is a plain one itself.
    pub first_of: Vec<String>,
    /// What to tell someone who has not what it needs.
    pub hint: Option<String>,
}

/// A setting of a stack.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptionDef {
    /// The key in the labfile.
    pub name: String,
    /// What it does.
    pub description: String,
    /// Its value where the labfile gives none; `None`: the labfile must give one.
    pub default: Option<String>,
    /// The only source that it can be set with; `None`: any.
    pub source: Option<String>,
    /// Allowed values; empty: any.
    pub values: Vec<String>,
    /// What a value looks like, `N` standing for any number; `None`: like anything.
    pub like: Option<String>,
    /// Whether the labfile gives the path of a text file, whose text is the value.
    pub file: bool,
    /// What addresses the value is, if it is some.
    pub addresses: Option<Addresses>,
}

impl OptionDef {
    /// Whether it can be set with a source.
    pub fn is_for(&self, source: &str) -> bool {
        self.source.as_ref().is_none_or(|only| only == source)
    }

    /// Whether it can have a value.
    pub fn allows(&self, value: &str) -> bool {
        (self.values.is_empty() || self.values.iter().any(|known| known == value))
            && self.like.as_ref().is_none_or(|like| is_like(value, like))
    }
}

/// Whether a text is as a pattern says, whose `N`s stand for a number each.
fn is_like(text: &str, pattern: &str) -> bool {
    match pattern.split_once('N') {
        None => text == pattern,
        Some((before, after)) => text.strip_prefix(before).is_some_and(|rest| {
            let number = rest.bytes().take_while(u8::is_ascii_digit).count();
            number > 0 && rest.get(number..).is_some_and(|rest| is_like(rest, after))
        }),
    }
}

/// A step of a stack.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepDef {
    /// Its name.
    pub name: String,
    /// All nodes that get the stack, or those of a role.
    pub on: Target,
    /// Only for this source; `None`: for all.
    pub source: Option<String>,
    /// When it is run, and how its result is kept.
    pub kind: Kind,
    /// Whether it may be baked on the image's files, without a node.
    pub chroot: bool,
    /// The script's file name, for messages.
    pub file: String,
    /// Shell script for `/bin/sh -e`, as root.
    pub script: String,
    /// Shell condition that the node must come to meet after the script, asked again and again.
    pub ready: Option<String>,
    /// How long the script may take, in seconds.
    pub limit_s: u32,
    /// How long it may take until the node is ready, in seconds.
    pub ready_limit_s: u32,
    /// Earlier steps that must be done and ready on all their nodes before this one begins on any.
    pub after: Vec<String>,
    /// Files of a bundle that it finds in its folder; `{version}` stands for any version.
    pub bundle: Vec<String>,
    /// Files of the stack that it finds in its folder.
    pub files: Vec<Enclosed>,
    /// Files that it leaves in its folder for other steps.
    pub gives: Vec<String>,
    /// Files that earlier steps gave, which it finds in its folder.
    pub takes: Vec<String>,
}

/// A network of a stack's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SubnetDef {
    /// The network, as `ADDRESS/LENGTH`.
    pub subnet: String,
    /// What has addresses there.
    pub description: String,
}

/// A port that a stack serves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PortDef {
    /// TCP port.
    pub port: u16,
    /// All nodes that get the stack, or those of a role.
    pub on: Target,
    /// What listens there.
    pub description: String,
}

/// A file that a step gives and that is shown when it is new.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SecretDef {
    /// The file.
    pub file: String,
    /// What it is good for.
    pub description: String,
}

impl StackDef {
    /// Whether a node of this role gets the stack.
    pub fn applies_to(&self, role: &str) -> bool {
        self.roles.is_empty() || self.roles.iter().any(|known| known == role)
    }

    /// Whether a node gets a step of the stack.
    pub fn gets(&self, step: &StepDef, node: &Node) -> bool {
        self.applies_to(&node.role) && applies(&step.on, node)
    }

    /// A source by name.
    pub fn source(&self, name: &str) -> Option<&Source> {
        self.sources.iter().find(|source| source.name == name)
    }

    /// The plain sources that `source` can stand for; itself if it is one.
    pub fn plain<'s>(&'s self, source: &'s str) -> Vec<&'s str> {
        match self.source(source) {
            Some(known) if !known.first_of.is_empty() => known.first_of.iter().map(String::as_str).collect(),
            _ => vec![source],
        }
    }

    /// Whether an option can have a value with a plain source. One that the stack does not have can't.
    pub fn allows(&self, source: &str, option: &str, value: &str) -> bool {
        self.options.iter().any(|known| known.name == option && known.is_for(source) && known.allows(value))
    }

    /// What to do instead where a plain source can't be had: a line for each that stands beside it in another source.
    pub fn ways_beside(&self, source: &str) -> String {
        let with_it = |known: &&Source| known.first_of.iter().any(|name| name == source);
        let beside: Vec<&String> =
            self.sources.iter().filter(with_it).flat_map(|known| &known.first_of).collect();
        let others =
            self.sources.iter().filter(|known| known.name != source && beside.contains(&&known.name));
        let line = |other: &Source| {
            let how = other.hint.as_ref().unwrap_or(&other.description);
            format!("\n  or source = \"{}\" in the labfile: {how}", other.name)
        };
        others.map(line).collect()
    }

    /// Gives options that are not set the defaults that they have with a plain source, or, if they are for others alone,
    /// with those: scripts find all of them.
    pub fn fill_in(&self, source: &str, options: &mut BTreeMap<String, String>) {
        let (of_it, of_others): (Vec<_>, Vec<_>) =
            self.options.iter().partition(|option| option.is_for(source));
        for option in of_it.into_iter().chain(of_others) {
            if let Some(default) = &option.default {
                options.entry(option.name.clone()).or_insert_with(|| default.clone());
            }
        }
    }
}

/// The stack that a labfile uses, with the steps for all sources.
///
/// # Errors
/// What has become wrong with it, or that it is no longer there.
pub fn definition(used: &Stack) -> Result<StackDef, Error> {
    match &used.folder {
        Some(folder) => load::from_folder(folder),
        None => load::from_binary(&used.name),
    }
}

/// The stack that a labfile uses, with the steps for its source only, which is a plain one.
///
/// # Errors
/// What has become wrong with it, or that it is no longer there.
pub fn load(used: &Stack) -> Result<StackDef, Error> {
    let mut stack = definition(used)?;
    if stack.source(&used.source).is_some_and(|source| !source.first_of.is_empty()) {
        let message =
            format!("the source `{}` of the stack stands for another one, which is not chosen", used.source);
        return Err(Error::of_file(
            Path::new("stacks").join(&used.name),
            message,
            "name a source in the labfile",
        ));
    }
    stack.steps.retain(|step| step.source.as_ref().is_none_or(|source| *source == used.source));
    Ok(stack)
}

/// The stack in a folder.
///
/// # Errors
/// What is wrong with its `stack.toml`, or with the scripts that it names.
pub fn load_folder(folder: &Path) -> Result<StackDef, Error> {
    load::from_folder(folder)
}

/// The stack of this name: the one in `stacks/NAME` beside the labfile, otherwise lab's own; `None` if there is none.
pub fn find(name: &str, beside: &Path) -> Option<Result<StackDef, Error>> {
    if !load::is_name(name) {
        return None;
    }
    let folder = beside.join("stacks").join(name);
    if folder.is_dir() { Some(load_folder(&folder)) } else { own(name) }
}

/// Lab's own stack of this name, from the binary.
pub fn own(name: &str) -> Option<Result<StackDef, Error>> {
    load::own_names().contains(&name).then(|| load::from_binary(name))
}

/// Names of lab's own stacks.
pub fn own_names() -> Vec<&'static str> {
    load::own_names()
}

/// Names of all stacks that a labfile in this folder can use.
pub fn names(beside: &Path) -> Vec<String> {
    let mut names: Vec<String> = own_names().into_iter().map(str::to_owned).collect();
    for entry in std::fs::read_dir(beside.join("stacks")).into_iter().flatten().flatten() {
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().is_dir()
            && load::is_name(&name)
        {
            names.push(name);
        }
    }
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(name: &str, folder: Option<PathBuf>, source: &str) -> Stack {
        Stack { name: name.to_owned(), folder, source: source.to_owned(), options: BTreeMap::new() }
    }

    #[test]
    fn own_stacks_are_right() {
        for name in own_names() {
            let stack = own(name).unwrap().unwrap_or_else(|wrong| panic!("{wrong}"));
            for source in stack.sources.iter().filter(|source| source.first_of.is_empty()) {
                let loaded = load(&used(name, None, &source.name)).unwrap();
                assert!(!loaded.steps.is_empty(), "{name} has no step for {}", source.name);
            }
        }
    }

    #[test]
    fn docker_is_installed_then_started() {
        let steps = |source| -> Vec<(String, Kind)> {
            let stack = load(&used("docker", None, source)).unwrap();
            stack.steps.into_iter().map(|step| (step.file, step.kind)).collect()
        };
        let start = ("start.sh".to_owned(), Kind::Run);
        assert_eq!(steps("debian"), [("install-debian.sh".to_owned(), Kind::Bake), start.clone()]);
        assert_eq!(steps("upstream"), [("install-upstream.sh".to_owned(), Kind::Bake), start]);
    }

    #[test]
    fn a_folder_beside_the_labfile_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("stacks/docker");
        std::fs::create_dir_all(&folder).unwrap();
        let text = "description = \"mine\"\nroles = [\"worker\"]\n[[source]]\nname = \"here\"\ndescription = \"x\"\n\
                    [[step]]\nname = \"one\"\nkind = \"run\"\nscript = \"one.sh\"\n";
        std::fs::write(folder.join("stack.toml"), text).unwrap();
        std::fs::write(folder.join("one.sh"), "echo one\n").unwrap();
        let stack = find("docker", dir.path()).unwrap().unwrap();
        assert_eq!(stack.description, "mine");
        assert_eq!((stack.steps[0].limit_s, stack.steps[0].ready_limit_s), (600, 120));
        assert!(stack.applies_to("worker") && !stack.applies_to("master"));
        let again = load(&used("docker", stack.folder.clone(), "here")).unwrap();
        assert_eq!(again, stack);
        assert!(names(dir.path()).contains(&"docker".to_owned()));
        assert!(find("../docker", dir.path()).is_none() && find("nothing", dir.path()).is_none());
    }

    #[test]
    fn kubernetes_gives_what_its_workers_take() {
        let stack = load(&used("kubernetes", None, "bundle")).unwrap();
        let step = |name: &str| stack.steps.iter().find(|step| step.name == name).unwrap();
        assert!(step("packages").bundle.iter().any(|file| file.contains("{version}")));
        assert!(step("init").gives.iter().any(|file| step("join").takes.contains(file)));
        assert_eq!(step("drain").kind, Kind::Leave);
    }

    /// One constant says which version of Kubernetes comes from upstream, and its form is checked before a node is.
    #[test]
    fn kubernetes_has_a_version_of_its_own_from_upstream() {
        let stack = own("kubernetes").unwrap().unwrap();
        let version = |source: &str| {
            let mut options = BTreeMap::new();
            stack.fill_in(source, &mut options);
            options.remove("version").unwrap()
        };
        assert_eq!(version("bundle"), "");
        assert!(stack.allows("upstream", "version", &version("upstream")));
        for wrong in ["", "1.36.2", "1.", "1.x", "2.36", "1.36 ", "1"] {
            assert!(!stack.allows("upstream", "version", wrong), "{wrong}");
        }
        assert!(stack.allows("bundle", "version", "1.36.2"));
        assert_eq!(stack.plain(&stack.sources[0].name), ["bundle", "upstream"]);
        // Scripts find every option, whatever source it is for.
        let mut options = BTreeMap::from([("network".to_owned(), "calico".to_owned())]);
        stack.fill_in("bundle", &mut options);
        assert_eq!((options["metrics_server"].as_str(), options["network"].as_str()), ("false", "calico"));
        assert!(load(&used("kubernetes", None, "auto")).unwrap_err().to_string().contains("not chosen"));
    }

    /// The files that own stacks take along: stack, name, text.
    fn own_files() -> Vec<(String, String, String)> {
        let mut files = Vec::new();
        for stack in own_names().into_iter().map(|name| own(name).unwrap().unwrap()) {
            for file in stack.steps.into_iter().flat_map(|step| step.files) {
                files.push((stack.name.clone(), file.path, String::from_utf8(file.bytes).unwrap()));
            }
        }
        files
    }

    #[test]
    fn files_are_well_formed() {
        let mut seen = 0;
        for (stack, name, text) in own_files() {
            let wrong = match name.rsplit_once('.').map(|(_, kind)| kind) {
                Some("json" | "conflist") => {
                    serde_json::from_str::<serde_json::Value>(&text).err().map(|e| e.to_string())
                }
                Some("toml") => toml::from_str::<toml::Table>(&text).err().map(|e| e.to_string()),
                Some("yaml" | "yml") => text
                    .split("\n---\n")
                    .find_map(|part| yaml_serde::from_str::<serde_json::Value>(part).err())
                    .map(|error| error.to_string()),
                _ => continue,
            };
            assert_eq!(wrong, None, "{stack}/{name}");
            seen += 1;
        }
        assert!(seen >= 10, "only {seen} files");
    }

    /// What Grafana's dashboards and Prometheus' own pages show is what Prometheus records.
    #[test]
    fn dashboards_show_what_is_recorded() {
        let files = own_files();
        let (_, _, rules) =
            files.iter().find(|(stack, name, _)| stack == "prometheus" && name == "rules.yml").unwrap();
        let recorded: Vec<&str> = rules
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- record: ")?.split_whitespace().next())
            .collect();
        let mut shown = 0;
        for (stack, name, text) in &files {
            let dashboard = stack == "grafana" && name.ends_with(".json");
            let page = stack == "prometheus" && name.ends_with(".html");
            if !dashboard && !page {
                continue;
            }
            let mut own = 0;
            for word in text.split(|c: char| !c.is_ascii_alphanumeric() && !"_:".contains(c)) {
                let like_one = ["node:", "kubelet:", "apiserver:", "cluster:", "container:", "pod:"];
                if like_one.iter().any(|start| word.len() > start.len() && word.starts_with(start)) {
                    assert!(recorded.contains(&word), "{stack}/{name}: nothing records {word}");
                    own += 1;
                }
            }
            assert!(own > 0, "{stack}/{name} shows nothing that is recorded");
            shown += 1;
        }
        assert_eq!(shown, 6, "nodes, cluster and containers, twice");
    }

    #[test]
    fn scripts_are_shell() {
        for stack in own_names().into_iter().map(|name| own(name).unwrap().unwrap()) {
            for step in &stack.steps {
                let status =
                    std::process::Command::new("sh").args(["-n", "-c", &step.script]).status().unwrap();
                assert!(status.success(), "{}/{}", stack.name, step.file);
            }
        }
    }
}
