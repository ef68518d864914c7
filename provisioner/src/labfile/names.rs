//! What labs, nodes, roles and images may be called.

use super::{diagnostic::visible, file::File, report::Report};

/// The lab's name, if it is one.
pub fn lab(file: &File, report: &mut Report<'_>) -> Option<String> {
    let name = file.name.as_ref()?;
    if is_lab(name.get()) {
        return Some(name.get().clone());
    }
    let rule = "1 to 31 of a-z, 0-9 and `-`, the first not `-`";
    let message = format!("`{}` can't be a lab's name", visible(name.get()));
    report.error(Some(name.span()), "name", message, suggest(name.get(), rule, 31));
    None
}

/// Whether this is a lab's name: `[a-z0-9][a-z0-9-]{0,30}`.
pub fn is_lab(name: &str) -> bool {
    name.len() <= 31 && !name.starts_with('-') && is_word(name, b"-")
}

/// Whether this is a DNS label in lower case: a name of a node or role.
pub fn is_label(name: &str) -> bool {
    name.len() <= 63 && !name.starts_with('-') && !name.ends_with('-') && is_word(name, b"-")
}

/// Whether this is an image's name.
pub fn is_image(name: &str) -> bool {
    name.len() <= 63 && name.starts_with(|first: char| first.is_ascii_alphanumeric()) && is_word(name, b"-._")
}

fn is_word(name: &str, more: &[u8]) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || more.contains(&byte);
    !name.is_empty() && name.bytes().all(fits)
}

/// The rule, and a name near to the wrong one that keeps it.
pub fn suggest(wrong: &str, rule: &str, limit: usize) -> String {
    let mut near = String::new();
    for character in wrong.to_lowercase().chars().take(200) {
        if character.is_ascii_alphanumeric() {
            near.push(character);
        } else if !near.is_empty() && !near.ends_with('-') {
            near.push('-');
        }
    }
    near.truncate(limit);
    match near.trim_matches('-') {
        "" => rule.to_owned(),
        near => format!("{rule}: such as `{near}`"),
    }
}

/// Rule of [`is_label`].
pub const LABEL: &str = "1 to 63 of a-z, 0-9 and `-`, neither first nor last `-`";
