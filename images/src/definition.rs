//! Image definitions: TOML files that say what an image is built from. lab brings some (`debian-13`, `tiny`); anybody
//! can write more, also as what differs from one of lab's.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{archive, manifest::SshTransport};

/// The definitions that lab brings: name and text.
const BUILTIN: &[(&str, &str)] = &[
    ("debian-12", include_str!("../debian-12.toml")),
    ("debian-13", include_str!("../debian-13.toml")),
    ("debian-sid", include_str!("../debian-sid.toml")),
    ("tiny", include_str!("../tiny.toml")),
];

/// Keys of a definition whose lists follow those of its base.
const LISTS: [&str; 6] = ["packages", "exclude", "keep", "commands", "file", "link"];

/// Goes into every digest: raised when the builder makes something else out of the same definition.
const BUILDER_VERSION: u32 = 1;

/// Why a definition cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// lab brings no definition of that name.
    #[error("lab has no image definition {name:?}; it has {}, or give the path of a .toml file", known.join(", "))]
    Unknown {
        /// The name.
        name: String,
        /// Names that exist.
        known: Vec<&'static str>,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The text is not TOML, or not a definition.
    #[error("{origin}: {source}")]
    Syntax {
        /// The file, or the name of lab's own definition.
        origin: String,
        /// Line, column and what is wrong.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{origin}: {reason}")]
    Invalid {
        /// The file, or the name of lab's own definition.
        origin: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// What an image is built from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Name of the image: `[a-z0-9][a-z0-9.-]*`.
    pub name: String,
    /// One line on what it is.
    #[serde(default)]
    pub description: String,
    /// Debian suite (`trixie`).
    pub suite: String,
    /// Whether packages are installed, or only unpacked.
    #[serde(default)]
    pub variant: Variant,
    /// Packages, with what they depend on (recommended ones are left out).
    pub packages: Vec<String>,
    /// The kernel's package.
    #[serde(default = "cloud_kernel")]
    pub kernel: String,
    /// Whether the kernel's modules are put into the root file system. What the initramfs loads needs none there.
    #[serde(default)]
    pub modules: bool,
    /// Size of the root file system in MiB; nodes with `x-systemd.growfs` in their fstab grow it to their disk's.
    pub size_mib: u64,
    /// How nodes are reached by SSH.
    pub ssh: SshTransport,
    /// AF_VSOCK port on which nodes take the time ([`Manifest::clock_port`](crate::manifest::Manifest::clock_port)).
    #[serde(default)]
    pub clock_port: Option<u32>,
    /// Kernel command line.
    pub cmdline: String,
    /// Paths in packages that are left out (dpkg's `path-exclude`).
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Paths that are kept although `exclude` says otherwise (dpkg's `path-include`).
    #[serde(default)]
    pub keep: Vec<String>,
    /// Files that are written over what the packages bring.
    #[serde(default, rename = "file")]
    pub files: Vec<File>,
    /// Symbolic links, likewise.
    #[serde(default, rename = "link")]
    pub links: Vec<Link>,
    /// Shell commands (`sh -e`) that run inside, at last.
    #[serde(default)]
    pub commands: Vec<String>,
    /// Digest of all this, with the content of the files.
    #[serde(skip)]
    pub digest: String,
}

/// How packages get into the root file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Installed, with apt and dpkg's database.
    #[default]
    Install,
    /// Unpacked; no maintainer script runs.
    Extract,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute path in the image.
    pub path: String,
    /// Permission bits, octal.
    #[serde(default = "plain_mode", deserialize_with = "octal")]
    pub mode: u32,
    /// Its content.
    #[serde(default)]
    pub content: Option<String>,
    /// A file to copy instead, beside the definition.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// The bytes of either.
    #[serde(skip)]
    pub bytes: Vec<u8>,
}

/// A symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Absolute path in the image.
    pub path: String,
    /// Where it leads.
    pub target: String,
}

fn cloud_kernel() -> String {
    crate::kernel_package::CLOUD_KERNEL.into()
}

fn plain_mode() -> u32 {
    0o644
}

fn octal<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    u32::from_str_radix(&text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no octal mode, such as \"0644\"")))
}

impl Definition {
    /// Names of the definitions that lab brings.
    pub fn builtin_names() -> Vec<&'static str> {
        BUILTIN.iter().map(|(name, _)| *name).collect()
    }

    /// A definition that lab brings, by name, or one of the user's, by the path of its `.toml` file.
    pub fn find(name_or_path: &str) -> Result<Definition, Error> {
        if name_or_path.ends_with(".toml") || name_or_path.contains('/') {
            return Definition::load(Path::new(name_or_path));
        }
        match BUILTIN.iter().find(|(name, _)| *name == name_or_path) {
            Some((name, text)) => Definition::parse(text, name, None),
            None => Err(Error::Unknown { name: name_or_path.into(), known: Definition::builtin_names() }),
        }
    }

    /// The definition in a file.
    pub fn load(path: &Path) -> Result<Definition, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        Definition::parse(&text, &path.display().to_string(), path.parent())
    }

    fn parse(text: &str, origin: &str, folder: Option<&Path>) -> Result<Definition, Error> {
        let syntax = |source| Error::Syntax { origin: origin.into(), source: Box::new(source) };
        let mut table: toml::Table = toml::from_str(text).map_err(syntax)?;
        let base = match table.remove("base") {
            None => None,
            Some(name) => Some(base(&name).ok_or_else(|| Error::Invalid {
                origin: origin.into(),
                reason: format!("base = {name} is none of {}", Definition::builtin_names().join(", ")),
            })?),
        };
        let mut definition: Definition = match base {
            // Straight from the text: then mistakes are told with their lines.
            None => toml::from_str(text).map_err(syntax)?,
            Some(base) => {
                let base = toml::from_str(base).map_err(syntax)?;
                toml::Value::Table(merged(base, table)).try_into().map_err(syntax)?
            }
        };
        definition.check().map_err(|reason| Error::Invalid { origin: origin.into(), reason })?;
        let mut digest = Sha256::new();
        digest.update(format!("{BUILDER_VERSION}\n{}\n{text}", text.len()));
        digest.update(base.unwrap_or_default());
        digest.update(crate::initramfs::NODE_INIT);
        for file in &mut definition.files {
            file.bytes = match (file.content.take(), &file.source) {
                (Some(content), None) => content.into_bytes(),
                (None, Some(source)) => {
                    let path = folder.unwrap_or(Path::new(".")).join(source);
                    fs::read(&path).map_err(|source| Error::Read { path, source })?
                }
                _ => {
                    let reason = format!("the file {} needs either content or source", file.path);
                    return Err(Error::Invalid { origin: origin.into(), reason });
                }
            };
            digest.update((file.bytes.len() as u64).to_le_bytes());
            digest.update(&file.bytes);
        }
        definition.digest = crate::manifest::hex(&digest.finalize());
        Ok(definition)
    }

    fn check(&self) -> Result<(), String> {
        crate::manifest::check_name(&self.name)?;
        let names = self.packages.iter().chain([&self.suite, &self.kernel]);
        archive::check_names(names.map(String::as_str)).map_err(|error| error.to_string())?;
        if !(16..=1 << 20).contains(&self.size_mib) {
            return Err(format!("size_mib is {}; it can be 16 to 1048576", self.size_mib));
        }
        let paths = self.files.iter().map(|file| &file.path).chain(self.links.iter().map(|link| &link.path));
        for path in paths {
            let parts = path.strip_prefix('/').map(|rest| rest.split('/'));
            if parts.is_none_or(|mut parts| parts.any(|part| matches!(part, "" | "." | ".."))) {
                return Err(format!("{path:?} is no absolute path of a file"));
            }
        }
        let patterns = self.exclude.iter().chain(&self.keep);
        match patterns.into_iter().find(|pattern| !pattern.starts_with('/')) {
            Some(pattern) => Err(format!("{pattern:?} in exclude or keep does not begin with a slash")),
            None => Ok(()),
        }
    }
}

/// The text of the definition that another one is based on: one of lab's that has no base itself.
fn base(name: &toml::Value) -> Option<&'static str> {
    let (_, text) = BUILTIN.iter().find(|(known, _)| name.as_str() == Some(*known))?;
    let table: toml::Table = toml::from_str(text).ok()?;
    (!table.contains_key("base")).then_some(text)
}

/// A definition on its base: lists follow the base's, a file or link takes the place of the one with its path, all else
/// replaces what the base has.
fn merged(mut base: toml::Table, own: toml::Table) -> toml::Table {
    for (key, value) in own {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Array(all)), toml::Value::Array(more)) if LISTS.contains(&key.as_str()) => {
                let path = |entry: &toml::Value| entry.get("path").cloned();
                all.retain(|old| path(old).is_none() || more.iter().all(|new| path(new) != path(old)));
                all.extend(more);
            }
            (_, value) => drop(base.insert(key, value)),
        }
    }
    base
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"x\"\nsuite = \"trixie\"\npackages = [\"busybox\"]\nsize_mib = 64\nssh = \"tcp\"\n\
                        cmdline = \"root=/dev/vda\"\n";

    fn parse(text: &str) -> Result<Definition, Error> {
        Definition::parse(text, "x.toml", None)
    }

    #[test]
    fn all_that_lab_brings_can_be_used() {
        for name in Definition::builtin_names() {
            assert_eq!(Definition::find(name).unwrap().name, name);
        }
        let error = Definition::find("debian-11").unwrap_err().to_string();
        assert!(error.contains("debian-13, debian-sid, tiny"), "{error}");
    }

    #[test]
    fn a_definition_on_a_base_says_what_differs() {
        let text = "name = \"mine\"\nbase = \"debian-13\"\npackages = [\"git\"]\nsize_mib = 4096\n\
                    [[file]]\npath = \"/etc/fstab\"\ncontent = \"mine\"\n[[file]]\npath = \"/etc/new\"\ncontent = \"\"\n";
        let (mine, base) = (parse(text).unwrap(), Definition::find("debian-13").unwrap());
        assert_eq!((mine.name.as_str(), mine.size_mib, mine.suite), ("mine", 4096, base.suite));
        assert_eq!(mine.packages, [base.packages.as_slice(), &["git".to_owned()]].concat());
        assert_eq!(mine.files.len(), base.files.len() + 1);
        let fstab: Vec<_> = mine.files.iter().filter(|file| file.path == "/etc/fstab").collect();
        assert!(fstab.len() == 1 && fstab[0].bytes == b"mine");
        assert_eq!((mine.commands, mine.links), (base.commands, base.links));
        assert_ne!(mine.digest, parse(&text.replace("4096", "4097")).unwrap().digest);
        for (wrong, expected) in [
            (text.replace("debian-13", "debian-12"), "base = \"debian-12\" is none of"),
            (text.replace("debian-13", "../x"), "is none of"),
            (text.replace("size_mib", "siez"), "unknown field `siez`"),
        ] {
            let error = parse(&wrong).unwrap_err().to_string();
            assert!(error.starts_with("x.toml: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_digest_follows_text_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        let digest = |text: &str, file: &str| {
            fs::write(&path, text).unwrap();
            fs::write(folder.path().join("motd"), file).unwrap();
            let definition = Definition::find(path.to_str().unwrap()).unwrap();
            assert_eq!(definition.files[0].bytes, file.as_bytes());
            definition.digest
        };
        let text = format!("{GOOD}[[file]]\npath = \"/etc/motd\"\nsource = \"motd\"\n");
        let first = digest(&text, "a");
        assert_eq!(first, digest(&text, "a"));
        assert_ne!(first, digest(&text, "b"));
        assert_ne!(first, digest(&format!("# more\n{text}"), "a"));
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        let cases = [
            (GOOD.replace("size_mib = 64", "size_mib = 1"), "x.toml: size_mib is 1; it can be 16 to 1048576"),
            (GOOD.replace("name = \"x\"", "name = \"../x\""), "is no name of an image"),
            (
                GOOD.replace("trixie", "tri xie"),
                "x.toml: \"tri xie\" is not a name of a Debian package or suite",
            ),
            (format!("{GOOD}siez = 1"), "line 7"),
            (format!("{GOOD}[[file]]\npath = \"/a\""), "x.toml: the file /a needs either content or source"),
            (format!("{GOOD}[[file]]\npath = \"/a\"\nmode = \"99\""), "\"99\" is no octal mode"),
            (format!("{GOOD}[[file]]\npath = \"/../a\"\ncontent=\"\""), "is no absolute path of a file"),
            (format!("{GOOD}[[link]]\npath = \"a\"\ntarget=\"b\""), "is no absolute path of a file"),
            (format!("{GOOD}exclude = [\"usr/*\"]"), "does not begin with a slash"),
            (GOOD.replace("ssh = \"tcp\"", "ssh = \"udp\""), "unknown variant `udp`"),
        ];
        for (text, expected) in cases {
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = Definition::find("/nowhere/x.toml").unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/x.toml: "), "{error}");
    }
}
