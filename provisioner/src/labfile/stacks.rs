//! Use of stacks: definitions found, source and options checked against them.

use std::{collections::BTreeMap, path::Path};

use super::{
    diagnostic::visible,
    file::{At, OptionValue, StackTable},
    report::Report,
    shape::join,
    spell::{advice, list, nearest},
    topology::Stack,
};
use crate::stack::{self, StackDef};

/// The stacks, in the order of the file.
pub fn resolve(
    tables: &BTreeMap<At<String>, StackTable>,
    folder: &Path,
    report: &mut Report<'_>,
) -> Vec<Stack> {
    let mut tables: Vec<_> = tables.iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    let mut stacks = Vec::new();
    for (name, table) in tables {
        let definition = match stack::find(name.get(), folder) {
            Some(Ok(definition)) => definition,
            Some(Err(wrong)) => {
                report.adopt(name.span().start, wrong.errors);
                continue;
            }
            None => {
                let known = stack::names(folder);
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                let message = format!("there is no stack `{}`", visible(name.get()));
                let mut help = advice(name.get(), &known, "stacks are");
                if !help.starts_with("did") {
                    help.push_str("; one of your own is a folder `stacks/NAME` beside the labfile");
                }
                report.error(Some(name.span()), &join("stack", name.get()), message, help);
                continue;
            }
        };
        let source = source(&definition, table, report);
        stacks.push(Stack {
            options: options(&definition, &source, name, table, report),
            source,
            name: definition.name,
            folder: definition.folder,
        });
    }
    stacks
}

fn source(definition: &StackDef, table: &StackTable, report: &mut Report<'_>) -> String {
    let names: Vec<&str> = definition.sources.iter().map(|source| source.name.as_str()).collect();
    let first = names.first().copied().unwrap_or_default().to_owned();
    let Some((_, value)) = table.iter().find(|(key, _)| key.get() == "source") else { return first };
    let text = value.get().to_string();
    if names.contains(&text.as_str()) {
        return text;
    }
    let message = format!("stack `{}` has no source `{}`", definition.name, visible(&text));
    let key = join(&join("stack", &definition.name), "source");
    report.error(Some(value.span()), &key, message, advice(&text, &names, "sources are"));
    first
}

fn options(
    definition: &StackDef,
    source: &str,
    name: &At<String>,
    table: &StackTable,
    report: &mut Report<'_>,
) -> BTreeMap<String, String> {
    let path = join("stack", &definition.name);
    let mut options = BTreeMap::new();
    for (key, value) in table.iter().filter(|(key, _)| key.get() != "source") {
        match definition.options.iter().find(|option| option.name == *key.get()) {
            Some(option) => {
                let text = value.get().to_string();
                if let Some(only) = option.source.as_ref().filter(|only| *only != source) {
                    let message = format!("`{}` is not possible with source = \"{source}\"", option.name);
                    let help = format!("remove it, or take source = \"{only}\"");
                    report.error(Some(key.span()), &join(&path, key.get()), message, help);
                }
                if let Some((message, help)) = refused(&option.values, key.get(), value.get(), &text) {
                    report.error(Some(value.span()), &join(&path, key.get()), message, help);
                }
                options.insert(option.name.clone(), text);
            }
            None => {
                let known: Vec<&str> =
                    definition.options.iter().map(|option| option.name.as_str()).chain(["source"]).collect();
                let message = format!("stack `{}` has no option `{}`", definition.name, visible(key.get()));
                let help = advice(key.get(), &known, "it has");
                report.error(Some(key.span()), &join(&path, key.get()), message, help);
            }
        }
    }
    for option in &definition.options {
        if options.contains_key(&option.name) {
            continue;
        }
        match &option.default {
            Some(default) => {
                options.insert(option.name.clone(), default.clone());
            }
            None => {
                let message = format!("stack `{}` needs the option `{}`", definition.name, option.name);
                report.error(
                    Some(name.span()),
                    &join(&path, &option.name),
                    message,
                    option.description.clone(),
                );
            }
        }
    }
    options
}

/// Why an option can't have this value, if so, and what would be right.
fn refused(values: &[String], key: &str, value: &OptionValue, text: &str) -> Option<(String, String)> {
    if matches!(value, OptionValue::Text(_)) && text.chars().any(char::is_control) {
        return Some((format!("`{key}` holds a control character"), "write it on one line".to_owned()));
    }
    if values.is_empty() || values.iter().any(|known| known == text) {
        return None;
    }
    let words: Vec<&str> = values.iter().map(String::as_str).collect();
    let help = match nearest(text, words.iter().copied()) {
        Some(word) => format!("did you mean `{word}`?"),
        None => format!("possible are: {}", list(&words)),
    };
    Some((format!("`{key}` cannot be `{}`", visible(text)), help))
}
