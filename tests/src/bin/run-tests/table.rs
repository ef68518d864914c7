//! What is known of the tests before they run: `tests/expected.toml`.

use serde::Deserialize;

/// The table of the repository.
const TABLE: &str = include_str!("../../../expected.toml");

/// What is known of a test.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// `FILE::FUNCTION`.
    pub name: String,
    /// What it takes where a factor is 1, in seconds.
    pub seconds: f64,
    /// Whether it comes before all that is not.
    #[serde(default)]
    pub essential: bool,
    /// Variables without which it only says that it can't run.
    #[serde(default)]
    pub needs: Vec<String>,
}

impl Row {
    /// That of a test which nothing is known of.
    pub fn unknown(name: &str) -> Self {
        Self { name: name.into(), seconds: 120.0, essential: false, needs: Vec::new() }
    }

    /// Whether it has what it needs.
    pub fn can_run(&self) -> bool {
        self.needs.iter().all(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    test: Vec<Row>,
}

/// Reads the table, in its order.
pub fn rows() -> Result<Vec<Row>, toml::de::Error> {
    toml::from_str::<Table>(TABLE).map(|table| table.test)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// Names of the test functions in a source file.
    fn functions(source: &str) -> Vec<&str> {
        let mut lines = source.lines().map(str::trim);
        let mut found = Vec::new();
        while lines.any(|line| line == "#[test]") {
            let name = lines.find_map(|line| line.strip_prefix("fn ")).unwrap();
            found.push(name.split('(').next().unwrap());
        }
        found
    }

    #[test]
    fn each_test_has_one_row() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut there = BTreeSet::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_stem().unwrap().to_str().unwrap();
            let source = std::fs::read_to_string(&path).unwrap();
            there.extend(functions(&source).iter().map(|function| format!("{file}::{function}")));
        }
        let rows = rows().unwrap();
        let known: BTreeSet<_> = rows.iter().map(|row| row.name.clone()).collect();
        assert_eq!(known.len(), rows.len(), "a test has two rows in tests/expected.toml");
        let missing: Vec<_> = there.difference(&known).collect();
        assert!(missing.is_empty(), "give these a row in tests/expected.toml: {missing:?}");
        let gone: Vec<_> = known.difference(&there).collect();
        assert!(gone.is_empty(), "these rows of tests/expected.toml are of no test: {gone:?}");
        assert!(rows.iter().all(|row| row.seconds > 0.0));
    }

    #[test]
    fn test_functions_are_found() {
        let source = "#[test]\nfn one() {\n}\nfn none() {\n}\n    #[test]\n    #[ignore]\n    fn two() {";
        assert_eq!(functions(source), ["one", "two"]);
    }
}
