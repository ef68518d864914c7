//! The user's kubeconfig: a lab's cluster as the context `lab-NAME` in it, and out of it again.
//! <https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/>

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use yaml_serde::{Mapping, Value};

use crate::json_file;

/// Longest file that is read, in bytes.
const MAX_BYTES: u64 = 8 << 20;
/// Lists of named things in a kubeconfig, with the key of what is named.
const LISTS: [(&str, &str); 3] = [("clusters", "cluster"), ("users", "user"), ("contexts", "context")];

/// Why a kubeconfig can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file is known.
    #[error("no place for a kubeconfig: set KUBECONFIG or HOME")]
    NoPlace,
    /// It is not what kubectl would read.
    #[error("{path} is no kubeconfig that can be changed: {reason}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It can't be written.
    #[error(transparent)]
    File(#[from] json_file::Error),
    /// The host refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// Name of a lab's context, cluster and user.
pub fn context(lab: &str) -> String {
    format!("lab-{lab}")
}

/// The user's file: the first of `KUBECONFIG`, else `~/.kube/config`.
fn path() -> Result<PathBuf, Error> {
    let named = env::var_os("KUBECONFIG");
    let first = named.iter().flat_map(env::split_paths).find(|path| !path.as_os_str().is_empty());
    let home = || env::var_os("HOME").filter(|home| !home.is_empty());
    first.or_else(|| Some(PathBuf::from(home()?).join(".kube/config"))).ok_or(Error::NoPlace)
}

/// A lab's kubeconfig from the one that its cluster has made: with names of its own, and the server where it is found on
/// this machine.
pub fn of_lab(text: &str, lab: &str, server: &str) -> Result<Mapping, Error> {
    let wrong = |reason: &str| Error::Wrong { path: "what the cluster gave".into(), reason: reason.into() };
    let given: Mapping = yaml_serde::from_str(text).map_err(|error| wrong(&error.to_string()))?;
    let name = context(lab);
    let first = |list: &str, key: &str| -> Option<Mapping> {
        given.get(list)?.as_sequence()?.first()?.get(key)?.as_mapping().cloned()
    };
    let mut cluster = first("clusters", "cluster").ok_or_else(|| wrong("it has no cluster"))?;
    let user = first("users", "user").ok_or_else(|| wrong("it has no user"))?;
    cluster.insert("server".into(), server.into());
    let context = mapping(&[("cluster", name.as_str().into()), ("user", name.as_str().into())]);
    let mut config = empty();
    for ((list, key), value) in LISTS.iter().zip([cluster, user, context]) {
        let entry = mapping(&[("name", name.as_str().into()), (key, Value::Mapping(value))]);
        config.insert((*list).into(), Value::Sequence(vec![Value::Mapping(entry)]));
    }
    config.insert("current-context".into(), name.into());
    Ok(config)
}

/// A kubeconfig as it is written.
pub fn text(config: &Mapping) -> Result<String, Error> {
    yaml_serde::to_string(config)
        .map_err(|error| Error::Wrong { path: "the kubeconfig".into(), reason: error.to_string() })
}

/// Puts a lab's kubeconfig into the user's, in the place of what is there of the lab, and makes it the current one.
/// Returns the file.
pub fn merge(config: Mapping, lab: &str) -> Result<PathBuf, Error> {
    let path = path()?;
    let mut all = read(&path)?.unwrap_or_else(empty);
    take_out(&mut all, lab);
    for (list, _) in LISTS {
        let new = config.get(list).and_then(Value::as_sequence).cloned().unwrap_or_default();
        match all.get_mut(list) {
            Some(Value::Sequence(there)) => there.extend(new),
            _ => drop(all.insert(list.into(), Value::Sequence(new))),
        }
    }
    all.insert("current-context".into(), context(lab).into());
    write(&path, &all)?;
    Ok(path)
}

/// Takes a lab out of the user's kubeconfig, if it is there.
pub fn remove(lab: &str) -> Result<(), Error> {
    let Ok(path) = path() else { return Ok(()) };
    let Some(mut all) = read(&path)? else { return Ok(()) };
    if take_out(&mut all, lab) { write(&path, &all) } else { Ok(()) }
}

/// Whether there was something to take out.
fn take_out(all: &mut Mapping, lab: &str) -> bool {
    let name = context(lab);
    let mut found = false;
    for (list, _) in LISTS {
        if let Some(Value::Sequence(there)) = all.get_mut(list) {
            let before = there.len();
            there.retain(|entry| entry.get("name").and_then(Value::as_str) != Some(&name));
            found |= there.len() < before;
        }
    }
    if found && all.get("current-context").and_then(Value::as_str) == Some(&name) {
        all.insert("current-context".into(), "".into());
    }
    found
}

fn empty() -> Mapping {
    mapping(&[("apiVersion", "v1".into()), ("kind", "Config".into())])
}

fn mapping(entries: &[(&str, Value)]) -> Mapping {
    entries.iter().map(|(key, value)| (Value::from(*key), value.clone())).collect()
}

fn read(path: &Path) -> Result<Option<Mapping>, Error> {
    let wrong = |reason: String| Error::Wrong { path: path.into(), reason };
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_BYTES => {
            Err(wrong(format!("it is larger than {MAX_BYTES} bytes")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        _ => match fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => Ok(None),
            Ok(text) => yaml_serde::from_str(&text).map(Some).map_err(|error| wrong(error.to_string())),
            Err(source) => Err(Error::Io { action: "read", path: path.into(), source }),
        },
    }
}

/// Beside it first, then renamed over it; for this user alone, since it holds keys. Where it is a link, what that leads to
/// is written.
fn write(path: &Path, config: &Mapping) -> Result<(), Error> {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    let failed = |source| Error::Io { action: "write", path: path.clone(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(failed)?;
    Ok(json_file::write_bytes(&path, text(config)?.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "apiVersion: v1\nkind: Config\ncurrent-context: kubernetes-admin@kubernetes\n\
        clusters:\n- name: kubernetes\n  cluster:\n    certificate-authority-data: QUJD\n    server: https://10.0.0.1:6443\n\
        contexts:\n- name: kubernetes-admin@kubernetes\n  context: {cluster: kubernetes, user: kubernetes-admin}\n\
        users:\n- name: kubernetes-admin\n  user: {client-key-data: S0VZ}\n";
    const USERS: &str = "apiVersion: v1\nkind: Config\ncurrent-context: work\npreferences: {colors: true}\n\
        clusters:\n- {name: work, cluster: {server: https://work}}\n- {name: lab-demo, cluster: {server: old}}\n\
        contexts:\n- {name: work, context: {cluster: work, user: me}}\nusers: []\n";

    #[test]
    fn a_lab_goes_in_and_out() {
        let config = of_lab(GIVEN, "demo", "https://127.0.0.1:7000").unwrap();
        let printed = text(&config).unwrap();
        assert!(printed.contains("current-context: lab-demo") && printed.contains("https://127.0.0.1:7000"));
        assert!(
            printed.contains("QUJD") && printed.contains("S0VZ") && !printed.contains("10.0.0.1"),
            "{printed}"
        );
        let mut all: Mapping = yaml_serde::from_str(USERS).unwrap();
        assert!(take_out(&mut all, "demo") && !take_out(&mut all, "demo"));
        let left = text(&all).unwrap();
        assert!(left.contains("current-context: work") && left.contains("colors: true"), "{left}");
        assert!(left.contains("https://work") && !left.contains("lab-demo"), "{left}");
    }

    #[test]
    fn files_are_private_and_what_is_not_understood_stays() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/config");
        assert!(read(&path).unwrap().is_none());
        write(&path, &empty()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap(), Some(empty()));
        for bad in ["- a list", "a: [", "\u{0}"] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(read(&path), Err(Error::Wrong { .. })), "{bad:?}");
        }
        assert!(of_lab("clusters: []", "x", "y").is_err() && of_lab("7", "x", "y").is_err());
    }
}
