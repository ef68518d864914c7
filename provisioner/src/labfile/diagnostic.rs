//! What is wrong with a file, and where: shown to people like a compiler's errors, to programs as JSON.

use std::{fmt, path::PathBuf};

use serde::Serialize;

/// How many errors are shown.
const SHOWN: usize = 30;
/// How many columns of an offending line are shown.
const WIDTH: usize = 110;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// The file.
    pub file: PathBuf,
    /// Where in the file; nothing where the file as a whole is meant.
    #[serde(flatten)]
    pub position: Option<Position>,
    /// The key that is meant, such as `node.master.memory`.
    pub key: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// How many characters of the line are meant, at least 1.
    pub length: usize,
    /// The line itself.
    pub text: String,
}

/// Everything that is wrong with a labfile and what it uses; never empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Diagnostics {
    /// The errors, in the order of the files' lines.
    pub errors: Vec<Diagnostic>,
}

impl Diagnostics {
    /// One error about a file as a whole.
    pub fn of_file(file: PathBuf, message: String, help: &str) -> Self {
        Self {
            errors: vec![Diagnostic {
                file,
                position: None,
                key: None,
                message,
                help: Some(help.to_owned()),
            }],
        }
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().take(SHOWN).enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            error.fmt(f)?;
        }
        if self.errors.len() > SHOWN { f.write_str("\n\nerror: and there is more") } else { Ok(()) }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        let digits = self.position.as_ref().map_or(1, |position| position.line.to_string().len());
        write!(f, "\n{:digits$}--> {}", "", self.file.display())?;
        if let Some(position) = &self.position {
            write!(f, ":{}:{}", position.line, position.column)?;
        }
        if let Some(key) = &self.key {
            write!(f, " ({})", visible(key))?;
        }
        if let Some(position) = &self.position {
            let (text, before, marked) = window(position);
            write!(f, "\n{:digits$} |", "")?;
            write!(f, "\n{} | {text}", position.line)?;
            write!(f, "\n{:digits$} | {:before$}{}", "", "", "^".repeat(marked))?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n{:digits$} = help: {help}", "")?;
        }
        Ok(())
    }
}

/// The part of a line that is shown, the columns before the mark, and the mark's length.
fn window(position: &Position) -> (String, usize, usize) {
    let before = position.column.saturating_sub(1);
    let skip = if before + position.length > WIDTH { before.saturating_sub(WIDTH / 4) } else { 0 };
    let mut text = String::new();
    if skip > 0 {
        text.push_str("… ");
    }
    let total = position.text.chars().count();
    text.extend(position.text.chars().skip(skip).take(WIDTH).map(plain));
    if total > skip.saturating_add(WIDTH) {
        text.push_str(" …");
    }
    let lead = before - skip + if skip > 0 { 2 } else { 0 };
    (text.trim_end().to_owned(), lead, position.length.min(WIDTH - (before - skip).min(WIDTH - 1)))
}

/// A character that takes one column: tabs as a space, what a terminal would obey as a replacement character.
fn plain(character: char) -> char {
    match character {
        '\t' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// Text from a file, fit for a message: one line, nothing that a terminal would obey, not too long.
pub fn visible(text: &str) -> String {
    let mut shown: String = text.chars().take(80).map(plain).collect();
    if text.chars().nth(80).is_some() {
        shown.push('…');
    }
    shown
}
