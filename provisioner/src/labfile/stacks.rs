//! Use of stacks: definitions found, source and options checked against them.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use super::{
    diagnostic::visible,
    file::{At, OptionValue, StackTable},
    read_text,
    report::Report,
    shape::join,
    spell::{advice, list, nearest},
    topology::Stack,
};
use crate::stack::{self, OptionDef, StackDef};

/// Longest file that an option names, in bytes: scripts have it in a variable, and Linux no longer ones than 128 KiB.
const MAX_FILE: usize = 64 << 10;

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
        let mut options = given(&definition, &source, table, folder, report);
        missing(&definition, &source, name, &options, report);
        // Otherwise when the source is chosen.
        if definition.plain(&source) == [source.as_str()] {
            definition.fill_in(&source, &mut options);
        }
        stacks.push(Stack { options, source, name: definition.name, folder: definition.folder });
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

/// The options as the labfile gives them: all of them are possible with one of the plain sources that `source` stands for.
fn given(
    definition: &StackDef,
    source: &str,
    table: &StackTable,
    folder: &Path,
    report: &mut Report<'_>,
) -> BTreeMap<String, String> {
    let mut options = BTreeMap::new();
    let all = definition.plain(source);
    let mut left = all.clone();
    // What only some of the sources have, in the order of the file.
    let mut narrow: Vec<&str> = Vec::new();
    let mut table: Vec<_> = table.iter().filter(|(key, _)| key.get() != "source").collect();
    table.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in table {
        let name = key.get().as_str();
        let Some(fits) = possible_with(definition, source, key, value, report) else { continue };
        let both: Vec<&str> = left.iter().copied().filter(|source| fits.contains(source)).collect();
        if both.is_empty() {
            let message = format!("`{name}` is not possible together with {}", list(&narrow));
            let help = format!(
                "it is for the source `{}`, the other for `{}`: remove one of them",
                fits.join("` or `"),
                left.join("` or `")
            );
            let place = join(&join("stack", &definition.name), name);
            report.error(Some(key.span()), &place, message, help);
        } else if fits.len() < all.len() {
            narrow.push(name);
            left = both;
        }
        let mut text = value.get().to_string();
        if definition.options.iter().any(|option| option.name == name && option.file) && !text.is_empty() {
            let place = join(&join("stack", &definition.name), name);
            text = text_of(value, folder, &place, report).unwrap_or_default();
        }
        options.insert(name.to_owned(), text);
    }
    options
}

/// The text of the file that an option names: a certificate, a key.
fn text_of(value: &At<OptionValue>, folder: &Path, place: &str, report: &mut Report<'_>) -> Option<String> {
    let name = value.get().to_string();
    let wrong = match read_text(&folder.join(&name), "file", "paths are relative to the labfile's folder") {
        Ok(text) if text.len() <= MAX_FILE && !text.contains('\0') => {
            return Some(text.trim_end().to_owned());
        }
        Ok(_) => ("it is too long, or no text".to_owned(), "is it the right file?".to_owned()),
        Err(wrong) => {
            let first = wrong.errors.into_iter().next()?;
            (first.message, first.help.unwrap_or_default())
        }
    };
    report.error(Some(value.span()), place, format!("file `{}`: {}", visible(&name), wrong.0), wrong.1);
    None
}

/// The files that the options of a stack name.
pub fn files(definition: &StackDef, table: &StackTable) -> Vec<String> {
    let is_file = |name: &str| definition.options.iter().any(|option| option.name == name && option.file);
    let files = table.iter().filter(|(key, _)| is_file(key.get())).map(|(_, value)| value.get().to_string());
    files.filter(|file| !file.is_empty()).collect()
}

/// The plain sources, of those that `source` stands for, that an option can have its value with; `None` if there is none.
fn possible_with<'d>(
    definition: &'d StackDef,
    source: &'d str,
    key: &At<String>,
    value: &At<OptionValue>,
    report: &mut Report<'_>,
) -> Option<Vec<&'d str>> {
    let (name, text) = (key.get(), value.get().to_string());
    let place = join(&join("stack", &definition.name), name);
    let known: Vec<&OptionDef> = definition.options.iter().filter(|option| option.name == *name).collect();
    let Some(first) = known.first() else {
        let mut names: Vec<&str> = definition.options.iter().map(|option| option.name.as_str()).collect();
        names.push("source");
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(*name));
        let message = format!("stack `{}` has no option `{}`", definition.name, visible(name));
        report.error(Some(key.span()), &place, message, advice(name, &names, "it has"));
        return None;
    };
    if matches!(value.get(), OptionValue::Text(_)) && text.chars().any(char::is_control) {
        let message = format!("`{name}` holds a control character");
        report.error(Some(value.span()), &place, message, "write it on one line");
        return None;
    }
    let all = definition.plain(source);
    let Some(option) = known.iter().rev().find(|option| all.iter().any(|source| option.is_for(source)))
    else {
        let message = format!("`{name}` is not possible with source = \"{source}\"");
        let help = format!("remove it, or take source = \"{}\"", first.source.as_deref().unwrap_or_default());
        report.error(Some(key.span()), &place, message, help);
        return None;
    };
    let allows = |source: &&str| definition.allows(source, name, &text);
    let fits: Vec<&str> = all.into_iter().filter(allows).collect();
    if fits.is_empty() {
        let message = format!("`{name}` cannot be `{}`", visible(&text));
        let other = definition.sources.iter().map(|source| source.name.as_str()).find(allows);
        report.error(Some(value.span()), &place, message, instead(option, &text, other));
        return None;
    }
    Some(fits)
}

/// Tells which options have to be given and are not.
fn missing(
    definition: &StackDef,
    source: &str,
    name: &At<String>,
    options: &BTreeMap<String, String>,
    report: &mut Report<'_>,
) {
    let plain = definition.plain(source);
    let wanted = definition.options.iter().filter(|option| {
        let applies = plain.iter().any(|source| option.is_for(source));
        applies && option.default.is_none() && !options.contains_key(&option.name)
    });
    for option in wanted {
        let message = format!("stack `{}` needs the option `{}`", definition.name, option.name);
        let key = join(&join("stack", &definition.name), &option.name);
        report.error(Some(name.span()), &key, message, option.description.clone());
    }
}

/// What would be right instead of this value of an option; `other` is a source with which it would be.
fn instead(option: &OptionDef, text: &str, other: Option<&str>) -> String {
    let words: Vec<&str> = option.values.iter().map(String::as_str).collect();
    let right = match (&option.like, nearest(text, words.iter().copied())) {
        (Some(like), _) => format!("it looks like `{like}`, N being a number"),
        (None, Some(word)) => format!("did you mean `{word}`?"),
        (None, None) => format!("possible are: {}", list(&words)),
    };
    match other {
        Some(source) => format!("{right}; or take source = \"{source}\""),
        None => right,
    }
}
