//! `lab.lock`: what the last `lab up` brought up, recorded beside the labfile, so that `lab up --locked` brings up the same
//! or nothing.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use lab_images::{manifest::Manifest, store};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{actions, files::hex, lab::Lab, stack};

const HEAD: &str = "# What the last `lab up` brought up, written by it. Keep it with the labfile: `lab up --locked` brings up\n\
                    # the same, or says what differs.\n\n";

/// Why a lab is not brought up with `--locked`, or what it was brought up from can't be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is recorded.
    #[error("there is no {0}: a `lab up` without --locked writes it")]
    Missing(PathBuf),
    /// It is not as lab writes it.
    #[error("{path} cannot be read as lab writes it: {reason}\n  a `lab up` without --locked writes it anew")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The lab would be another one.
    #[error(
        "the lab is not what {path} says:\n  {}\n  undo that, or accept it with a `lab up` without --locked",
        what.join("\n  ")
    )]
    Differs {
        /// The file.
        path: PathBuf,
        /// Each thing that differs.
        what: Vec<String>,
    },
    /// What there is can't be found out.
    #[error(transparent)]
    Action(#[from] actions::Error),
    /// The host refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// What a lab is brought up from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inputs {
    /// Version of lab.
    lab: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    image: BTreeMap<String, Image>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    stack: BTreeMap<String, Stack>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    step: BTreeMap<String, Step>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Image {
    /// Of all its files and settings.
    digest: String,
    /// Version of its kernel's package.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stack {
    /// Of its definition and scripts.
    digest: String,
    source: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    options: BTreeMap<String, String>,
    /// Digests of the bundle's files.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    bundle: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    /// Of its script and what that is given.
    digest: String,
}

/// The file's path: beside the labfile, and called as it is.
pub fn path(labfile: &Path) -> PathBuf {
    let path = labfile.with_extension("lock");
    if path == labfile { labfile.with_extension("lock.lock") } else { path }
}

/// Refuses a lab that would be another one than is recorded. An image that is still to be built is not looked at.
pub fn check(lab: &Lab) -> Result<(), Error> {
    let path = path(&lab.topology.labfile);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Error::Missing(path)),
        other => other.map_err(|source| Error::Io { action: "read", path: path.clone(), source })?,
    };
    let then: Inputs = toml::from_str(&text)
        .map_err(|error| Error::Wrong { path: path.clone(), reason: error.to_string().trim().into() })?;
    let (now, to_build) = inputs(lab)?;
    let what = differences(&then, &now, &to_build);
    if what.is_empty() { Ok(()) } else { Err(Error::Differs { path, what }) }
}

/// Where stacks came from as the file says, by their names; nothing if there is no such file: [`check`] tells what is wrong
/// with it.
pub fn sources(labfile: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path(labfile)).unwrap_or_default();
    let inputs = toml::from_str::<Inputs>(&text).ok();
    let stacks = inputs.into_iter().flat_map(|inputs| inputs.stack);
    stacks.map(|(name, stack)| (name, stack.source)).collect()
}

/// Records what the lab was brought up from, unless that is what the file says already.
pub fn write(lab: &Lab) -> Result<(), Error> {
    let labfile = &lab.topology.labfile;
    let path = path(labfile);
    let io = |source| Error::Io { action: "write", path: path.clone(), source };
    let (now, _) = inputs(lab)?;
    let text = toml::to_string(&now).map_err(|error| io(std::io::Error::other(error)))?;
    let text = format!("{HEAD}{text}");
    if fs::read_to_string(&path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    // For the same people as the labfile.
    let mode = fs::metadata(labfile).map_err(io)?.permissions().mode() & 0o666;
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/"))).map_err(io)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.as_file().set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| file.as_file().sync_all())
        .map_err(io)?;
    file.persist(&path).map_err(|error| io(error.error))?;
    Ok(())
}

/// What the lab is brought up from, as things are now, and the images that are not there yet.
fn inputs(lab: &Lab) -> Result<(Inputs, Vec<String>), actions::Error> {
    let mut inputs = Inputs {
        lab: env!("CARGO_PKG_VERSION").into(),
        image: BTreeMap::new(),
        stack: BTreeMap::new(),
        step: BTreeMap::new(),
    };
    let mut to_build = Vec::new();
    for node in &lab.topology.nodes {
        // What a node stands on is its own, whatever the store has now.
        let manifest = if lab.record_of(&node.name)?.is_some() {
            lab.image_of(&node.name)?.0
        } else {
            match lab.store.get(&node.image) {
                Ok(image) => image.manifest,
                Err(store::Error::NotFound(_)) => {
                    to_build.push(node.image.clone());
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let image = Image { digest: manifest.digest(), kernel: kernel(&manifest) };
        let known = inputs.image.entry(node.image.clone()).or_insert_with(|| image.clone());
        if *known != image {
            inputs.image.insert(format!("{} of {}", node.image, node.name), image);
        }
    }
    for used in &lab.topology.stacks {
        // The same wherever its folder is.
        let definition = stack::StackDef { folder: None, ..stack::load(used)? };
        let text = serde_json::to_string(&definition).unwrap_or_default();
        // Of a text, what tells it from another.
        let option = |(name, value): (&String, &String)| {
            let value = if value.contains('\n') { digest([value.as_str()]) } else { value.clone() };
            (name.clone(), value)
        };
        let (source, options) = (used.source.clone(), used.options.iter().map(option).collect());
        let bundle = actions::bundle_files(lab, used)?;
        let bundle = bundle.into_iter().map(|file| (file.file_name(), file.sha256)).collect();
        let stack = Stack { digest: digest([text.as_str()]), source, options, bundle };
        inputs.stack.insert(used.name.clone(), stack);
    }
    let mut steps: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for item in actions::plan(lab)?.items {
        if let Some(name) = item.action.describe().strip_prefix("step/")
            && let Some(inputs) = item.action.inputs(lab)
        {
            steps.entry(name.into()).or_default().push(inputs);
        }
    }
    for (name, mut inputs_of) in steps {
        // One more node that is given the same makes no difference.
        inputs_of.sort();
        inputs_of.dedup();
        inputs.step.insert(name, Step { digest: digest(inputs_of.iter().map(String::as_str)) });
    }
    Ok((inputs, to_build))
}

fn kernel(manifest: &Manifest) -> Option<String> {
    let package = manifest.packages.iter().find(|package| package.name.starts_with("linux-image-"))?;
    Some(package.version.clone())
}

fn digest<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(&hash.finalize())
}

/// Each thing that differs, with what it was and what it is.
fn differences(then: &Inputs, now: &Inputs, to_build: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, was: Option<String>, is: Option<String>| {
        if was != is {
            let tell = |value: Option<String>| value.unwrap_or_else(|| "nothing".into());
            found.push(format!("{what}: was {}, is {}", tell(was), tell(is)));
        }
    };
    compare("lab", Some(then.lab.clone()), Some(now.lab.clone()));
    for name in both(&then.image, &now.image).into_iter().filter(|name| !to_build.contains(name)) {
        let tell = |image: &Image| match &image.kernel {
            Some(kernel) => format!("{} with kernel {kernel}", short(&image.digest)),
            None => short(&image.digest),
        };
        compare(&format!("image {name}"), then.image.get(name).map(tell), now.image.get(name).map(tell));
    }
    for name in to_build.iter().filter(|name| !then.image.contains_key(*name)) {
        compare(&format!("image {name}"), None, Some("still to be built".into()));
    }
    for name in both(&then.stack, &now.stack) {
        let tell = |stack: &Stack| {
            let options = stack.options.iter().map(|(key, value)| format!(", {key} {value}"));
            let bundle = stack.bundle.iter().map(|(file, sha256)| format!(", {file} {}", short(sha256)));
            let (options, bundle) = (options.collect::<String>(), bundle.collect::<String>());
            format!("{} from {}{options}{bundle}", short(&stack.digest), stack.source)
        };
        compare(&format!("stack {name}"), then.stack.get(name).map(tell), now.stack.get(name).map(tell));
    }
    for name in both(&then.step, &now.step) {
        let tell = |step: &Step| short(&step.digest);
        compare(&format!("step {name}"), then.step.get(name).map(tell), now.step.get(name).map(tell));
    }
    found
}

/// As much of a digest as people compare.
fn short(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// The keys of two maps, each once, sorted.
fn both<'a, T>(one: &'a BTreeMap<String, T>, other: &'a BTreeMap<String, T>) -> Vec<&'a String> {
    let mut keys: Vec<_> = one.keys().chain(other.keys()).collect();
    keys.sort();
    keys.dedup();
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{labfile, paths::Paths, progress::Progress};

    const LABFILE: &str = "name = \"demo\"\n[node.a]\nimage = \"none\"\n[stack.docker]\n\
                           [[step]]\nname = \"same for all\"\nrun = \"true\"\n\
                           [[step]]\nname = \"own\"\nrun = \"echo $LAB_IP\"\n";

    fn lab(dir: &Path, text: &str) -> Lab {
        let file = dir.join("lab.toml");
        fs::write(&file, text).unwrap();
        let paths = Paths::at(&dir.join("home"), &dir.join("run"));
        Lab::new(&paths, labfile::load(&file).unwrap(), Progress::new(true)).unwrap()
    }

    #[test]
    fn what_was_recorded_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let demo = lab(dir.path(), LABFILE);
        assert!(matches!(check(&demo), Err(Error::Missing(_))));
        write(&demo).unwrap();
        let file = dir.path().join("lab.lock");
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("# What") && text.contains("[stack.docker]"), "{text}");
        assert!(text.contains("[step.\"same for all\"]"), "{text}");
        let debian = BTreeMap::from([("docker".into(), "debian".into())]);
        assert_eq!(sources(&dir.path().join("lab.toml")), debian);
        assert!(sources(&dir.path().join("other.toml")).is_empty());
        // It stays as it is.
        let before = fs::metadata(&file).unwrap().modified().unwrap();
        write(&demo).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), before);
        fs::write(&file, "lab = 1").unwrap();
        assert!(matches!(check(&demo), Err(Error::Wrong { .. })));
    }

    #[test]
    fn what_differs_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let told = |then: &str, now: &str| {
            let (then, _) = inputs(&lab(dir.path(), then)).unwrap();
            let (now, _) = inputs(&lab(dir.path(), now)).unwrap();
            differences(&then, &now, &[]).join("\n")
        };
        assert_eq!(told(LABFILE, LABFILE), "");
        let more = LABFILE.replace("[node.a]", "[node.b]\nimage = \"none\"\n[node.a]");
        let said = told(LABFILE, &more);
        assert!(said.contains("step own: was ") && !said.contains("same for all"), "{said}");
        let said = told(LABFILE, &LABFILE.replace("\"true\"", "\"false\""));
        assert!(said.starts_with("step same for all: was ") && said.lines().count() == 1, "{said}");
        let said = told(LABFILE, &LABFILE.replace("[stack.docker]", "[stack.docker]\nsource = \"upstream\""));
        assert!(said.contains("stack docker: was ") && said.contains(" from upstream"), "{said}");
        let key = "[stack.kubernetes]\nsource = \"upstream\"\npackages_key = \"lab.toml\"\n";
        let (with, _) = inputs(&lab(dir.path(), &format!("{LABFILE}{key}"))).unwrap();
        assert_eq!(with.stack["kubernetes"].options["packages_key"].len(), 64, "a digest of the text");
        let said = told(LABFILE, "name = \"demo\"\n[node.a]\nimage = \"none\"\n");
        assert!(said.contains("is nothing") && said.lines().count() == 3, "{said}");
    }

    #[test]
    fn images_are_compared_when_they_are_there() {
        let image = |digest: &str| Image { digest: digest.into(), kernel: Some("6.12".into()) };
        let with = |images: &[(&str, &str)]| Inputs {
            lab: "1".into(),
            image: images.iter().map(|(name, digest)| (name.to_string(), image(digest))).collect(),
            stack: BTreeMap::new(),
            step: BTreeMap::new(),
        };
        let then = with(&[("tiny", "aa")]);
        assert!(differences(&then, &with(&[]), &["tiny".into()]).is_empty());
        assert_eq!(differences(&then, &with(&[]), &[]), ["image tiny: was aa with kernel 6.12, is nothing"]);
        assert_eq!(
            differences(&then, &with(&[("tiny", "bb")]), &[]),
            ["image tiny: was aa with kernel 6.12, is bb with kernel 6.12"]
        );
        let other = differences(&then, &with(&[("tiny", "aa")]), &["other".into()]);
        assert_eq!(other, ["image other: was nothing, is still to be built"]);
    }

    #[test]
    fn another_bundle_is_told() {
        let with = |sha256: &str| Inputs {
            lab: "1".into(),
            image: BTreeMap::new(),
            stack: BTreeMap::from([(
                "k".into(),
                Stack {
                    digest: "aa".into(),
                    source: "bundle".into(),
                    options: BTreeMap::new(),
                    bundle: BTreeMap::from([("images.tar".into(), sha256.into())]),
                },
            )]),
            step: BTreeMap::new(),
        };
        assert_eq!(
            differences(&with("11"), &with("22"), &[]),
            ["stack k: was aa from bundle, images.tar 11, is aa from bundle, images.tar 22"]
        );
    }

    #[test]
    fn it_is_called_as_the_labfile_is() {
        assert_eq!(path(Path::new("/x/lab.toml")), Path::new("/x/lab.lock"));
        assert_eq!(path(Path::new("/x/course.toml")), Path::new("/x/course.lock"));
        assert_eq!(path(Path::new("/x/course.lock")), Path::new("/x/course.lock.lock"));
    }
}
