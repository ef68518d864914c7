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

impl Template {
    /// The labfile with the lab called `lab` instead.
    pub fn named(&self, lab: &str) -> String {
        let mut done = false;
        let mut text = String::new();
        for line in self.text.split_inclusive('\n') {
            if !done && line.starts_with("name ") {
                done = true;
                text.push_str(&format!("name = \"{lab}\"\n"));
            } else {
                text.push_str(line);
            }
        }
        text
    }
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
                parse(template.text, Path::new("lab.toml"), path.clone()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(topology.name, template.name);
            assert!(template.text.starts_with("# ") && template.summary.len() > 10, "{}", template.name);
            let renamed = parse(&template.named("other"), Path::new("lab.toml"), path).unwrap();
            assert_eq!(renamed.name, "other");
            assert_eq!(renamed.nodes.len(), topology.nodes.len());
        }
    }
}
