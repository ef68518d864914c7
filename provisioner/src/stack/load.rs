//! Reads and checks `stack.toml` and the scripts that it names, from a folder or from the binary.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use super::{
    Kind, OptionDef, PortDef, SecretDef, Source, StackDef, StepDef, SubnetDef,
    file::{File, StepTable},
};
use crate::enclosed::Enclosed;
use crate::labfile::{
    At, Diagnostics, diagnostic::visible, read_text, report::Report, schema, shape, spell::advice,
    topology::Target,
};

include!(concat!(env!("OUT_DIR"), "/stacks.rs"));

const FILE: &str = "stack.toml";
/// What every script begins with.
const PRELUDE: &str = include_str!("../../../scripts/stacks/prelude.sh");

pub fn own_names() -> Vec<&'static str> {
    let of_definition = |(path, _): &(&'static str, _)| path.strip_suffix(FILE)?.strip_suffix('/');
    FILES.iter().filter_map(of_definition).collect()
}

pub fn from_binary(name: &str) -> Result<StackDef, Diagnostics> {
    let text = |file: &str| {
        let path = format!("{name}/{file}");
        let found = FILES.iter().find(|(known, _)| *known == path);
        found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| {
            Diagnostics::of_file(
                PathBuf::from(&path),
                "there is no such file".to_owned(),
                "add it to the stack's folder",
            )
        })
    };
    let file = Path::new("stacks").join(name).join(FILE);
    definition(name, None, &file, &text(FILE)?, &text)
}

pub fn from_folder(folder: &Path) -> Result<StackDef, Diagnostics> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = folder.join(FILE);
    if !is_name(&name) {
        let message = format!("`{}` can't be a stack's name", visible(&name));
        return Err(Diagnostics::of_file(folder.to_owned(), message, "rename the folder: a-z, 0-9 and `-`"));
    }
    let text =
        read_text(&file, "stack definition", "a stack's folder holds a stack.toml; see `docs/stacks.md`")?;
    let script = |file: &str| read_text(&folder.join(file), "file", "add it to the stack's folder");
    let folder = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    definition(&name, Some(folder), &file, &text, &script)
}

/// Whether this is a name of a stack, a source, a role or an option.
pub fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    (1..=63).contains(&name.len()) && !name.starts_with('-') && name.bytes().all(fits)
}

fn definition(
    name: &str,
    folder: Option<PathBuf>,
    file: &Path,
    text: &str,
    script: &dyn Fn(&str) -> Result<String, Diagnostics>,
) -> Result<StackDef, Diagnostics> {
    let mut report = Report::new(file.to_owned(), text);
    let definition = shape::parse(text, &mut report)
        .and_then(|document| shape::read::<File>(document, &schema::of::<File>(), &mut report))
        .map(|read| checked(name, folder, &read, script, &mut report));
    match definition {
        Some(definition) if report.is_clean() => Ok(definition),
        _ => Err(Diagnostics { errors: report.into_errors() }),
    }
}

fn checked(
    name: &str,
    folder: Option<PathBuf>,
    file: &File,
    script: &dyn Fn(&str) -> Result<String, Diagnostics>,
    report: &mut Report<'_>,
) -> StackDef {
    let roles: Vec<String> =
        file.roles.iter().flat_map(|roles| roles.get()).map(|role| role.get().clone()).collect();
    let mut seen = HashSet::new();
    let mut sources = Vec::new();
    for (index, source) in file.source.iter().enumerate() {
        let source = source.get();
        let key = format!("source[{index}].name");
        if let Some(name) = fresh_name(source.name.as_ref(), &mut seen, "source", &key, report) {
            sources.push(Source {
                name,
                description: text(source.description.as_ref()),
                first_of: list(&source.first_of),
                hint: source.hint.as_ref().map(|hint| hint.get().clone()),
            });
        }
    }
    first_of(file, &sources, report);
    if file.source.is_empty() && report.is_clean() {
        let help = "add a [[source]] with a name and a description: where the software comes from";
        report.error(None, "source", "the stack has no source".to_owned(), help);
    }
    let options = options(file, &sources, report);
    let steps = steps(file, folder.is_none(), &sources, &roles, script, report);
    let ports = file.port.iter().enumerate().filter_map(|(index, table)| {
        let port = table.get();
        let on = target(port.on.as_ref(), &roles, &format!("port[{index}].on"), report);
        Some(PortDef { port: *port.port.as_ref()?.get(), on, description: text(port.description.as_ref()) })
    });
    let ports = ports.collect();
    let subnets = file.subnet.iter().map(At::get).map(|table| SubnetDef {
        subnet: text(table.subnet.as_ref()),
        description: text(table.description.as_ref()),
    });
    let subnets = subnets.collect();
    let secrets = secrets(file, &steps, report);
    let description = text(file.description.as_ref());
    StackDef {
        name: name.to_owned(),
        folder,
        description,
        sources,
        roles,
        options,
        steps,
        subnets,
        ports,
        secrets,
    }
}

/// What a source stands for: plain ones, at least two.
fn first_of(file: &File, sources: &[Source], report: &mut Report<'_>) {
    let known = plain(sources);
    for (index, table) in file.source.iter().enumerate() {
        let Some(list) = &table.get().first_of else { continue };
        let key = format!("source[{index}].first_of");
        if list.get().len() < 2 {
            let message = "there is nothing to choose from".to_owned();
            report.error(Some(list.span()), &key, message, "name two sources or more");
        }
        for name in list.get().iter().filter(|name| !known.contains(&name.get().as_str())) {
            let message = format!("there is no source `{}` of its own", visible(name.get()));
            report.error(Some(name.span()), &key, message, advice(name.get(), &known, "sources are"));
        }
    }
}

/// Names of the sources that stand for themselves.
fn plain(sources: &[Source]) -> Vec<&str> {
    sources.iter().filter(|source| source.first_of.is_empty()).map(|source| source.name.as_str()).collect()
}

fn options(file: &File, sources: &[Source], report: &mut Report<'_>) -> Vec<OptionDef> {
    let mut options: Vec<OptionDef> = Vec::new();
    for (index, table) in file.option.iter().enumerate() {
        let option = table.get();
        let key = format!("option[{index}].name");
        let source = option.source.as_ref().map(|source| source.get().clone());
        // One for each source may have the name.
        let others = options
            .iter()
            .filter(|other| other.source.is_none() || source.is_none() || other.source == source);
        let mut seen: HashSet<String> = others.map(|other| other.name.clone()).collect();
        seen.insert("source".to_owned());
        let Some(name) = fresh_name(option.name.as_ref(), &mut seen, "option", &key, report) else {
            continue;
        };
        let definition = OptionDef {
            name,
            description: text(option.description.as_ref()),
            default: option.default.as_ref().map(|default| default.get().clone()),
            source,
            values: list(&option.values),
            like: option.like.as_ref().map(|like| like.get().clone()),
            file: option.file.as_ref().is_some_and(|file| *file.get()),
            addresses: option.addresses.as_ref().map(|addresses| *addresses.get()),
        };
        if let Some(default) = option.default.as_ref().filter(|default| !definition.allows(default.get())) {
            let (message, help) = match definition.values.as_slice() {
                [] => ("does not look like a value", "change it, or `like`"),
                _ => ("is not among the values", "add it to `values`"),
            };
            let message = format!("the default `{}` {message}", visible(default.get()));
            report.error(Some(default.span()), &format!("option[{index}].default"), message, help);
        }
        check_source(option.source.as_ref(), sources, &format!("option[{index}]"), report);
        options.push(definition);
    }
    options
}

fn steps(
    file: &File,
    own: bool,
    sources: &[Source],
    roles: &[String],
    script: &dyn Fn(&str) -> Result<String, Diagnostics>,
    report: &mut Report<'_>,
) -> Vec<StepDef> {
    let mut seen = HashSet::new();
    let mut steps: Vec<StepDef> = Vec::new();
    for (index, at) in file.step.iter().enumerate() {
        let (table, path) = (at.get(), format!("step[{index}]"));
        let name = fresh_name(table.name.as_ref(), &mut seen, "step", &format!("{path}.name"), report);
        let on = target(table.on.as_ref(), roles, &format!("{path}.on"), report);
        check_source(table.source.as_ref(), sources, &path, report);
        let before = file.step.iter().take(index).filter_map(|step| step.get().name.as_ref());
        let earlier: Vec<&str> = before.map(|name| name.get().as_str()).collect();
        let after: Vec<&At<String>> = table.after.iter().flat_map(|list| list.get()).collect();
        for (position, wanted) in
            after.iter().enumerate().filter(|(_, step)| !earlier.contains(&step.get().as_str()))
        {
            let message = format!("no earlier step is `{}`", visible(wanted.get()));
            let help = match earlier.as_slice() {
                [] => "this is the first step".to_owned(),
                earlier => advice(wanted.get(), earlier, "earlier steps are"),
            };
            report.error(Some(wanted.span()), &format!("{path}.after[{position}]"), message, help);
        }
        kinds(table, &path, own, &steps, report);
        files(table, &path, &steps, report);
        let enclosed = enclosed(table, &path, script, report);
        let text = script_text(table, &path, script, report);
        if let (Some(name), Some(kind), Some((file, script))) = (name, &table.kind, text) {
            steps.push(StepDef {
                name,
                on,
                source: table.source.as_ref().map(|source| source.get().clone()),
                kind: *kind.get(),
                chroot: table.chroot.as_ref().is_some_and(|chroot| *chroot.get()),
                file,
                script: format!("{PRELUDE}{script}"),
                ready: table.ready.as_ref().map(|ready| ready.get().clone()),
                limit_s: table.limit_s.as_ref().map_or(600, |limit| *limit.get()),
                ready_limit_s: table.ready_limit_s.as_ref().map_or(120, |limit| *limit.get()),
                after: after.into_iter().map(|step| step.get().clone()).collect(),
                bundle: list(&table.bundle),
                files: enclosed,
                gives: list(&table.gives),
                takes: list(&table.takes),
            });
        }
    }
    steps
}

/// A source that something is for alone.
fn check_source(source: Option<&At<String>>, sources: &[Source], path: &str, report: &mut Report<'_>) {
    let known = plain(sources);
    if let Some(source) = source.filter(|source| !known.contains(&source.get().as_str())) {
        let message = format!("there is no source `{}`", visible(source.get()));
        let help = advice(source.get(), &known, "sources are");
        report.error(Some(source.span()), &format!("{path}.source"), message, help);
    }
}

/// The files that a step finds and leaves: plain names, and what is taken has been given.
fn files(table: &StepTable, path: &str, earlier: &[StepDef], report: &mut Report<'_>) {
    let lists = [
        ("bundle", &table.bundle),
        ("files", &table.files),
        ("gives", &table.gives),
        ("takes", &table.takes),
    ];
    for (key, list) in lists {
        for (index, name) in list.iter().flat_map(|list| list.get()).enumerate() {
            let key = format!("{path}.{key}[{index}]");
            let text = name.get().replacen("{version}", "", usize::from(key.contains(".bundle[")));
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if !(1..=100).contains(&text.len()) || text.starts_with('.') || !text.bytes().all(fits) {
                let message = format!("`{}` can't be the name of a file here", visible(name.get()));
                let help = "1 to 100 of A-Z, a-z, 0-9, `.`, `_` and `-`, the first not `.`";
                report.error(Some(name.span()), &key, message, help);
            } else if key.contains(".takes[") && !earlier.iter().any(|step| step.gives.contains(name.get())) {
                let message = format!("no earlier step gives `{}`", visible(name.get()));
                report.error(Some(name.span()), &key, message, "add it to that step's `gives`");
            }
        }
    }
    let kind = table.kind.as_ref().map(|kind| *kind.get());
    for (key, list) in [("gives", &table.gives), ("takes", &table.takes)] {
        if let Some(list) = list.as_ref().filter(|_| kind == Some(Kind::Bake)) {
            let message = "what is baked gives and takes nothing".to_owned();
            let help = "its result is for many nodes and labs: make the step `kind = \"run\"`";
            report.error(Some(list.span()), &format!("{path}.{key}"), message, help);
        }
    }
}

/// The texts of the files that a step takes along.
fn enclosed(
    table: &StepTable,
    path: &str,
    text: &dyn Fn(&str) -> Result<String, Diagnostics>,
    report: &mut Report<'_>,
) -> Vec<Enclosed> {
    let mut found = Vec::new();
    let names = table.files.iter().flat_map(|list| list.get()).enumerate();
    // What is no name of a file in the folder has been told.
    for (index, name) in names.filter(|(_, name)| !name.get().contains('/')) {
        match text(name.get()) {
            Ok(text) => found.push(Enclosed::text(name.get(), &text)),
            Err(wrong) => {
                let first = wrong.errors.into_iter().next();
                let (message, help) = first.map(|error| (error.message, error.help)).unwrap_or_default();
                let message = format!("file `{}`: {message}", visible(name.get()));
                let key = format!("{path}.files[{index}]");
                report.error(Some(name.span()), &key, message, help.unwrap_or_default());
            }
        }
    }
    found
}

/// What people want to know of what steps give.
fn secrets(file: &File, steps: &[StepDef], report: &mut Report<'_>) -> Vec<SecretDef> {
    let mut secrets = Vec::new();
    for (index, table) in file.secret.iter().enumerate() {
        let secret = table.get();
        let Some(name) = &secret.file else { continue };
        if !steps.iter().any(|step| step.gives.contains(name.get())) {
            let message = format!("no step gives `{}`", visible(name.get()));
            let key = format!("secret[{index}].file");
            report.error(Some(name.span()), &key, message, "add it to a step's `gives`");
        }
        secrets.push(SecretDef { file: name.get().clone(), description: text(secret.description.as_ref()) });
    }
    secrets
}

/// What is baked comes first and waits for nothing: its result has to be the same wherever it is made. Of that, lab's own
/// stacks (`own`) say what needs no node.
fn kinds(table: &StepTable, path: &str, own: bool, earlier: &[StepDef], report: &mut Report<'_>) {
    let baked = table.kind.as_ref().is_some_and(|kind| *kind.get() == Kind::Bake);
    if let Some(chroot) = table.chroot.as_ref().filter(|_| !own || !baked) {
        let message = "only steps of lab's own stacks that are baked can be run without a node".to_owned();
        report.error(Some(chroot.span()), &format!("{path}.chroot"), message, "remove `chroot`");
    }
    let Some(kind) = table.kind.as_ref().filter(|kind| *kind.get() == Kind::Bake) else { return };
    if let Some(run) = earlier.iter().find(|step| step.kind != Kind::Bake) {
        let message = format!("what is baked can't follow what is run: `{}`", run.name);
        report.error(
            Some(kind.span()),
            &format!("{path}.kind"),
            message,
            "move the step up, or make it `kind = \"run\"`",
        );
    }
    let waits = [
        ("ready", table.ready.as_ref().map(At::span)),
        ("ready_limit_s", table.ready_limit_s.as_ref().map(At::span)),
        ("after", table.after.as_ref().map(At::span)),
    ];
    for (key, span) in waits {
        if let Some(span) = span {
            let help = format!("remove `{key}`, or make the step `kind = \"run\"`");
            report.error(
                Some(span),
                &format!("{path}.{key}"),
                "what is baked waits for nothing".to_owned(),
                help,
            );
        }
    }
}

fn script_text(
    table: &StepTable,
    path: &str,
    script: &dyn Fn(&str) -> Result<String, Diagnostics>,
    report: &mut Report<'_>,
) -> Option<(String, String)> {
    let file = table.script.as_ref()?;
    let (message, help) = if file.get().contains('/') || file.get().starts_with('.') {
        (
            format!("`{}` is not in the stack's folder", visible(file.get())),
            "name a file beside stack.toml".to_owned(),
        )
    } else {
        match script(file.get()) {
            Ok(text) if !text.trim().is_empty() => return Some((file.get().clone(), text)),
            Ok(_) => (
                format!("the script `{}` is empty", visible(file.get())),
                "write shell commands into it".to_owned(),
            ),
            Err(wrong) => {
                let first = wrong.errors.into_iter().next()?;
                (
                    format!("script `{}`: {}", visible(file.get()), first.message),
                    first.help.unwrap_or_default(),
                )
            }
        }
    };
    report.error(Some(file.span()), &format!("{path}.script"), message, help);
    None
}

fn target(on: Option<&At<String>>, roles: &[String], key: &str, report: &mut Report<'_>) -> Target {
    let Some(on) = on.filter(|on| on.get() != "all") else { return Target::All };
    if !roles.is_empty() && !roles.contains(on.get()) {
        let known: Vec<&str> = roles.iter().map(String::as_str).chain(["all"]).collect();
        let message = format!("the stack is not for the role `{}`", visible(on.get()));
        report.error(Some(on.span()), key, message, advice(on.get(), &known, "possible are"));
    }
    Target::Role(on.get().clone())
}

fn fresh_name(
    name: Option<&At<String>>,
    seen: &mut HashSet<String>,
    what: &str,
    key: &str,
    report: &mut Report<'_>,
) -> Option<String> {
    let name = name?;
    if !is_name(name.get()) {
        let message = format!("`{}` can't be the name of a {what}", visible(name.get()));
        report.error(Some(name.span()), key, message, "1 to 63 of a-z, 0-9, `_` and `-`, the first not `-`");
    } else if !seen.insert(name.get().clone()) {
        let message = format!("the name `{}` is taken", name.get());
        report.error(Some(name.span()), key, message, "take another");
    }
    Some(name.get().clone())
}

fn list(values: &Option<At<Vec<At<String>>>>) -> Vec<String> {
    values.iter().flat_map(|list| list.get()).map(|value| value.get().clone()).collect()
}

fn text(value: Option<&At<String>>) -> String {
    value.map(|value| value.get().clone()).unwrap_or_default()
}
