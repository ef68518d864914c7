//! Checks a TOML document's structure (keys, types, ranges, allowed words) against the JSON Schema made from the types
//! that it is read into. What is wrong is reported and taken out, so that the rest can still be read and checked.

use std::ops::Range;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, ValueDeserializer},
};

use super::{
    diagnostic::visible,
    report::Report,
    spell::{advice, list, nearest},
};

/// How many of a text's syntax errors are looked at.
const MAX_ERRORS: usize = 100;

/// Parses TOML. `None` where it isn't TOML, which has been reported.
pub fn parse<'a>(text: &'a str, report: &mut Report<'_>) -> Option<Spanned<DeTable<'a>>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    // One slip can be followed by errors that are only its echo: the first of each line says enough.
    let mut last_line = None;
    for error in errors.iter().take(MAX_ERRORS) {
        let span = error.span().unwrap_or(text.len()..text.len());
        let line = text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count();
        if last_line != Some(line) {
            let help = match error.message().contains("duplicate key") {
                true => "a key or a [table] can be there only once",
                false => {
                    "a file is made of `key = value` lines, [table] and [[list]] headers; see https://toml.io"
                }
            };
            report.error(Some(span), "", format!("this is not TOML: {}", visible(error.message())), help);
        }
        last_line = Some(line);
    }
    errors.is_empty().then_some(table)
}

/// Reads what is well-formed of a document into a `T` whose keys are all optional; `schema` is `T`'s. The rest is
/// reported.
pub fn read<T: JsonSchema + DeserializeOwned>(
    mut document: Spanned<DeTable<'_>>,
    schema: &Value,
    report: &mut Report<'_>,
) -> Option<T> {
    let walk = Walk { root: schema };
    walk.table(schema, document.get_mut(), "", None, report);
    let span = document.span();
    let value = Spanned::new(span, DeValue::Table(document.into_inner()));
    T::deserialize(ValueDeserializer::from(value))
        .map_err(|error| report.error(error.span(), "", visible(error.message()), ""))
        .ok()
}

/// `prefix.key`, with quotes where TOML needs them.
pub fn join(prefix: &str, key: &str) -> String {
    let bare = !key.is_empty()
        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if prefix.is_empty() { key } else { format!("{prefix}.{key}") }
}

struct Walk<'s> {
    root: &'s Value,
}

impl<'s> Walk<'s> {
    fn resolve(&self, schema: &'s Value) -> &'s Value {
        let target = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#'));
        target.and_then(|path| self.root.pointer(path)).unwrap_or(schema)
    }

    fn table<'t>(
        &self,
        schema: &'s Value,
        table: &mut DeTable<'t>,
        path: &str,
        header: Option<Range<usize>>,
        report: &mut Report<'_>,
    ) {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let other = schema.get("additionalProperties").filter(|other| other.is_object());
        let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
        let words: Vec<&str> = properties.keys().map(String::as_str).collect();
        let place = match path.split_once('[') {
            None if path.is_empty() => String::new(),
            None => format!(" in [{path}]"),
            Some((list, _)) => format!(" in [[{list}]]"),
        };
        // A mistyped key is not also told as missing.
        let unknown =
            table.keys().map(|key| key.get_ref().as_ref()).filter(|key| !properties.contains_key(*key));
        let meant: Vec<&str> =
            unknown.take(MAX_ERRORS).filter_map(|key| nearest(key, words.iter().copied())).collect();
        for key in
            required.filter_map(Value::as_str).filter(|key| !table.contains_key(*key) && !meant.contains(key))
        {
            let help = example(key, properties.get(key)).map(|line| format!("add a line such as `{line}`"));
            report.error(
                header.clone(),
                &join(path, key),
                format!("`{key}` is missing{place}"),
                help.unwrap_or_default(),
            );
        }
        for (key, mut value) in std::mem::take(table) {
            let name: &str = key.get_ref();
            let path = join(path, name);
            if let Some(known) = properties.get(name).or(other) {
                if self.value(known, &mut value, key.span(), name, &path, report) {
                    table.insert(key, value);
                }
                continue;
            }
            if report.is_full() {
                continue;
            }
            let message = format!("unknown key `{}`{place}", visible(name));
            report.error(Some(key.span()), &path, message, advice(name, &words, "known keys are"));
        }
    }

    /// Whether the value may stay.
    fn value<'t>(
        &self,
        schema: &'s Value,
        value: &mut Spanned<DeValue<'t>>,
        key_span: Range<usize>,
        key: &str,
        path: &str,
        report: &mut Report<'_>,
    ) -> bool {
        let target = self.resolve(schema);
        let span = value.span();
        let wanted = types(target);
        let found = value.get_ref().type_str();
        if !wanted.iter().any(|kind| *kind == toml_type(found)) {
            let message = format!(
                "`{}` must be {}, not {}",
                visible(key),
                articles(&wanted),
                article(toml_type(found))
            );
            let help = match target.get("type").and_then(Value::as_str) {
                Some("object") => {
                    format!("write `[{}]`, and its keys in the lines below", header_example(target, path))
                }
                Some("array") if target.get("items").is_some_and(|items| items.get("$ref").is_some()) => {
                    format!("write `[[{path}]]`, and its keys in the lines below")
                }
                _ => {
                    example(key, Some(schema)).map(|line| format!("for example `{line}`")).unwrap_or_default()
                }
            };
            // The span of a table that has its own header may be the whole table: the key says where it is.
            let span = if matches!(value.get_ref(), DeValue::Table(_)) { key_span } else { span };
            report.error(Some(span), path, message, help);
            return false;
        }
        match value.get_mut() {
            DeValue::Table(table) => {
                self.table(target, table, path, Some(key_span), report);
                true
            }
            DeValue::Array(items) => {
                let schema = target.get("items").unwrap_or(&Value::Null);
                let most = target.get("maxItems").and_then(Value::as_u64);
                if let Some(most) = most.filter(|most| items.len() as u64 > *most) {
                    let message = format!("`{}` has {} items", visible(key), items.len());
                    report.error(Some(span), path, message, format!("at most {most} are possible"));
                    return false;
                }
                // A list stays whole or goes: were one item taken out, the others would be told by wrong numbers.
                let mut whole = true;
                for (index, mut item) in std::mem::replace(items, DeArray::new()).into_iter().enumerate() {
                    let (key, path) = (format!("{key}[{index}]"), format!("{path}[{index}]"));
                    let span = item.span();
                    whole &= self.value(schema, &mut item, span, &key, &path, report);
                    items.push(item);
                }
                whole
            }
            DeValue::Integer(number) => {
                let (text, radix) = (number.to_string(), number.radix());
                let number = i64::from_str_radix(number.as_str(), radix).ok();
                let bound = |name| target.get(name).and_then(Value::as_i64);
                let low = bound("minimum");
                let high = bound("maximum");
                if number.is_some_and(|number| {
                    low.is_none_or(|low| number >= low) && high.is_none_or(|high| number <= high)
                }) {
                    return true;
                }
                let help = match (low, high) {
                    (Some(low), Some(high)) => format!("{low} to {high} are possible"),
                    _ => "a number of at most 64 bits is possible".to_owned(),
                };
                report.error(
                    Some(span),
                    path,
                    format!("`{}` is {}, which is out of range", visible(key), visible(&text)),
                    help,
                );
                false
            }
            DeValue::String(text) => {
                let words = allowed(target);
                if words.is_empty() || words.contains(&text.as_ref()) {
                    return true;
                }
                let help = match nearest(text, words.iter().copied()) {
                    Some(word) => format!("did you mean `{word}`?"),
                    None => format!("possible are: {}", list(&words)),
                };
                report.error(
                    Some(span),
                    path,
                    format!("`{}` cannot be `{}`", visible(key), visible(text)),
                    help,
                );
                false
            }
            _ => true,
        }
    }
}

/// JSON Schema's name of a TOML type.
fn toml_type(name: &'static str) -> &'static str {
    match name {
        "table" => "object",
        other => other,
    }
}

fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => ["oneOf", "anyOf"]
            .iter()
            .filter_map(|name| schema.get(*name).and_then(Value::as_array))
            .flatten()
            .flat_map(types)
            .collect(),
    }
}

fn allowed(schema: &Value) -> Vec<&str> {
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return words.iter().filter_map(Value::as_str).collect();
    }
    let choices = schema.get("oneOf").and_then(Value::as_array);
    choices.into_iter().flatten().filter_map(|choice| choice.get("const")?.as_str()).collect()
}

fn article(kind: &str) -> &str {
    match kind {
        "object" => "a table",
        "array" => "an array",
        "string" => "a string",
        "integer" => "an integer",
        "boolean" => "true or false",
        "float" => "a fraction",
        "datetime" => "a date",
        other => other,
    }
}

fn articles(kinds: &[&str]) -> String {
    let mut words: Vec<&str> = kinds.iter().map(|kind| article(kind)).collect();
    words.dedup();
    words.join(" or ")
}

fn header_example(schema: &Value, path: &str) -> String {
    let of_names = schema.get("additionalProperties").is_some_and(Value::is_object);
    if of_names { format!("{path}.NAME") } else { path.to_owned() }
}

/// A line of TOML that shows how a key is written.
fn example(key: &str, schema: Option<&Value>) -> Option<String> {
    let value = schema?.get("examples")?.as_array()?.first()?;
    Some(format!("{key} = {value}"))
}
