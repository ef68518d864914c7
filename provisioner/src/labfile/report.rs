//! Collects what is wrong with one file while it is read.

use std::{ops::Range, path::PathBuf};

use super::diagnostic::{Diagnostic, Position};

/// How many errors are kept: a file of a million wrong keys is as wrong as one of a hundred.
const MAX: usize = 100;

/// The text of a file and the errors found in it so far.
pub struct Report<'a> {
    file: PathBuf,
    text: &'a str,
    errors: Vec<(usize, Diagnostic)>,
}

impl<'a> Report<'a> {
    /// No errors yet in this file, named as its user named it.
    pub fn new(file: PathBuf, text: &'a str) -> Self {
        Self { file, text, errors: Vec::new() }
    }

    /// Notes an error at a span of bytes, or about the file as a whole. `key` may be empty.
    pub fn error(&mut self, span: Option<Range<usize>>, key: &str, message: String, help: impl Into<String>) {
        if self.is_full() {
            return;
        }
        let help = help.into();
        let diagnostic = Diagnostic {
            file: self.file.clone(),
            position: span.clone().map(|span| position(self.text, span)),
            key: (!key.is_empty()).then(|| key.to_owned()),
            message,
            help: (!help.is_empty()).then_some(help),
        };
        let start = span.map_or(0, |span| span.start);
        if !self.errors.iter().any(|(_, known)| *known == diagnostic) {
            self.errors.push((start, diagnostic));
        }
    }

    /// Takes over the errors of a file that is used from this one at `start`.
    pub fn adopt(&mut self, start: usize, errors: Vec<Diagnostic>) {
        self.errors.extend(errors.into_iter().map(|error| (start, error)));
    }

    /// Whether no further errors are kept.
    pub fn is_full(&self) -> bool {
        self.errors.len() >= MAX
    }

    /// Whether nothing is wrong so far.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }

    /// The errors, by their place in the file.
    pub fn into_errors(mut self) -> Vec<Diagnostic> {
        self.errors.sort_by_key(|(start, _)| *start);
        self.errors.into_iter().map(|(_, error)| error).collect()
    }
}

/// Line and column of a span of bytes; of a span over several lines, the first line's part.
fn position(text: &str, span: Range<usize>) -> Position {
    let mut start = span.start.min(text.len());
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let (before, after) = text.split_at(start);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let rest = after.split('\n').next().unwrap_or_default().trim_end_matches('\r');
    let head = before.get(line_start..).unwrap_or_default();
    let wanted = span.end.saturating_sub(start);
    let length = rest.char_indices().take_while(|(offset, _)| *offset < wanted).count().max(1);
    Position {
        line: before.matches('\n').count() + 1,
        column: head.chars().count() + 1,
        length,
        text: format!("{head}{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_characters() {
        let place = position("a = 1\nä = \"ö\" # x\r\nb", 12..16);
        assert_eq!((place.line, place.column, place.length), (2, 6, 3));
        assert_eq!(place.text, "ä = \"ö\" # x");
        let end = position("a =", 900..901);
        assert_eq!((end.line, end.column, end.length, end.text.as_str()), (1, 4, 1, "a ="));
    }
}
