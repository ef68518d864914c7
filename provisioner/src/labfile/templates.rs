//! The example labfiles inside the binary, for `lab init`.

include!(concat!(env!("OUT_DIR"), "/labfiles.rs"));

/// A labfile to start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Template {
    /// Its name: `lab init --from NAME`.
    pub name: &'static str,
    /// What it is: the first line of its comment.
    pub summary: &'static str,
    /// The labfile.
    pub text: &'static str,
}

/// What `lab init` writes unless told otherwise.
pub const DEFAULT: &str = "docker";

/// All templates, by name.
pub fn templates() -> Vec<Template> {
    let summary = |text: &'static str| text.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']);
    LABFILES.iter().map(|(name, text)| Template { name, summary: summary(text), text }).collect()
}

/// The template of this name.
pub fn template(name: &str) -> Option<Template> {
    templates().into_iter().find(|template| template.name == name)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::labfile::parse;

    #[test]
    fn all_are_right() {
        assert!(template(DEFAULT).is_some());
        for template in templates() {
            let path = PathBuf::from(format!("/labfiles/{}.toml", template.name));
            let topology =
                parse(template.text, Path::new("lab.toml"), path).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(topology.name, template.name);
            assert!(template.text.starts_with("# ") && template.summary.len() > 10, "{}", template.name);
        }
    }
}
