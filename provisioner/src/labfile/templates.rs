//! The example labfiles inside the binary, for `lab init`.

include!(concat!(env!("OUT_DIR"), "/labfiles.rs"));

/// A file of an example: its path beside the labfile, its content, whether it may be run.
pub type File = (&'static str, &'static [u8], bool);

/// A labfile to start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Template {
    /// Its name: `lab init --from NAME`.
    pub name: &'static str,
    /// What it is: the first line of its comment.
    pub summary: &'static str,
    /// The labfile, `lab.toml`, and what it takes along.
    pub files: &'static [File],
}

/// What `lab init` writes unless told otherwise.
pub const DEFAULT: &str = "docker";
/// The labfile among an example's files.
const LABFILE: &str = "lab.toml";

/// All templates, by name.
pub fn templates() -> Vec<Template> {
    let template = |(name, files): &(&'static str, &'static [File])| {
        let text = text(files);
        let summary = text.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']);
        Template { name, summary, files }
    };
    LABFILES.iter().map(template).collect()
}

/// The template of this name.
pub fn template(name: &str) -> Option<Template> {
    templates().into_iter().find(|template| template.name == name)
}

/// The labfile's text.
fn text(files: &'static [File]) -> &'static str {
    let labfile = files.iter().find(|(name, ..)| *name == LABFILE);
    labfile.and_then(|(_, bytes, _)| std::str::from_utf8(bytes).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labfile::load;

    #[test]
    fn all_are_right() {
        assert!(template(DEFAULT).is_some());
        for template in templates() {
            let dir = tempfile::tempdir().unwrap();
            for (name, bytes, _) in template.files {
                let path = dir.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, bytes).unwrap();
            }
            let topology = load(&dir.path().join(LABFILE)).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(topology.name, template.name);
            assert!(
                text(template.files).starts_with("# ") && template.summary.len() > 10,
                "{}",
                template.name
            );
        }
    }
}
