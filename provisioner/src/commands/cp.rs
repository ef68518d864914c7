//! `lab cp`: files and folders into and out of nodes, as tar streams through the channel: any image with tar will do.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use super::{Context, Error, ssh};
use crate::{channel::quote, lab::Lab};

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    Node { node: String, path: String },
}

/// Copies `from` to `to`, as cp -R does: into `to` if that is a folder, else to that name.
pub fn run(context: &Context, from: &str, to: &str) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    match (side(from), side(to)) {
        (Side::Here(from), Side::Node { node, path }) => upload(&lab, &from, &node, &path)?,
        (Side::Node { node, path }, Side::Here(to)) => download(&lab, &node, &path, &to)?,
        _ => {
            let sentence = "one of the two must be in a node, as in `lab cp FILE NODE:PATH`";
            return Err(Error::Other(sentence.into()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((node, path)) if !node.is_empty() && !node.contains('/') => {
            Side::Node { node: node.into(), path: if path.is_empty() { "." } else { path }.into() }
        }
        _ => Side::Here(text.into()),
    }
}

fn upload(lab: &Lab, from: &Path, node: &str, to: &str) -> Result<(), Error> {
    ssh::reachable(lab, node)?;
    let full = from
        .canonicalize()
        .map_err(|source| Error::Io { action: format!("read {}", from.display()), source })?;
    let (Some(parent), Some(name)) = (full.parent(), full.file_name()) else {
        return Err(Error::Other(format!("{} can't be copied", from.display())));
    };
    let name = name.to_string_lossy();
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(parent).args(["-cf", "-", "--", &name]);
    let mut unpack = lab.channel(node).ssh();
    unpack.args(["-T", node]).arg(unpack_script(&name, to));
    pipe(pack, unpack, &format!("copy {} to {node}:{to}", from.display()))
}

fn download(lab: &Lab, node: &str, from: &str, to: &Path) -> Result<(), Error> {
    ssh::reachable(lab, node)?;
    let name = Path::new(from).file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.ok_or_else(|| Error::Other(format!("{node}:{from} has no name to copy it by")))?;
    let parent = Path::new(from).parent().filter(|dir| !dir.as_os_str().is_empty());
    let parent = parent.map_or(".".into(), |dir| dir.to_string_lossy().into_owned());
    let mut pack = lab.channel(node).ssh();
    pack.args(["-T", node]).arg(format!("tar -C {} -cf - -- {}", quote(&parent), quote(&name)));
    let mut unpack = Command::new("sh");
    unpack.arg("-c").arg(unpack_script(&name, &to.to_string_lossy()));
    // What a node sends must not leave the folder it is unpacked in: GNU tar refuses `..` and absolute names.
    let what = format!("copy {node}:{from} to {}", to.display());
    if let Some(dir) = to.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::metadata(dir).map_err(|source| Error::Io { action: what.clone(), source })?;
    }
    pipe(pack, unpack, &what)
}

/// A shell script that unpacks a tar stream with the one entry `name` to `to`, by way of a folder beside it.
fn unpack_script(name: &str, to: &str) -> String {
    let (name, to) = (quote(name), quote(to));
    format!(
        "set -e; to={to}; name={name}\n\
         if [ -d \"$to\" ]; then dir=$to; else dir=$(dirname -- \"$to\"); name2=$(basename -- \"$to\"); fi\n\
         t=$(mktemp -d \"$dir/.cp.XXXXXX\"); trap 'rm -rf \"$t\"' EXIT\n\
         tar -C \"$t\" -xf -\n\
         if [ -d \"$t/$name\" ] && [ -d \"$dir/${{name2:-$name}}\" ]; then cp -R \"$t/$name/.\" \"$dir/${{name2:-$name}}/\"\n\
         else mv -f \"$t/$name\" \"$dir/${{name2:-$name}}\"; fi"
    )
}

fn pipe(mut from: Command, mut to: Command, what: &str) -> Result<(), Error> {
    let io = |source| Error::Io { action: what.to_string(), source };
    let mut source = from.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(io)?;
    let stream = source.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let sink = to.stdin(stream).stdout(Stdio::null()).status().map_err(io)?;
    let source = source.wait().map_err(io)?;
    if sink.success() && source.success() {
        return Ok(());
    }
    Err(Error::Other(format!("could not {what}: the reason is above")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert_eq!(side("a/b"), Side::Here("a/b".into()));
        assert_eq!(side("./a:b"), Side::Here("./a:b".into()));
        assert_eq!(side("w1:/etc/motd"), Side::Node { node: "w1".into(), path: "/etc/motd".into() });
        assert_eq!(side("w1:"), Side::Node { node: "w1".into(), path: ".".into() });
    }

    #[test]
    fn unpacks_to_a_name_into_a_folder_and_over_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("in")).unwrap();
        fs::write(path("in/it's"), "x").unwrap();
        fs::create_dir(path("folder")).unwrap();
        let copy = |name: &str, to: &Path| {
            let mut pack = Command::new("tar");
            pack.arg("-C").arg(dir.path()).args(["-cf", "-", "--", name]);
            let mut unpack = Command::new("sh");
            unpack.arg("-c").arg(unpack_script(name, &to.to_string_lossy()));
            pipe(pack, unpack, "copy").unwrap();
        };
        copy("in", &path("out"));
        assert_eq!(fs::read_to_string(path("out/it's")).unwrap(), "x");
        copy("in", &path("folder"));
        copy("in", &path("folder"));
        assert_eq!(fs::read_to_string(path("folder/in/it's")).unwrap(), "x");
        assert_eq!(fs::read_dir(path("folder")).unwrap().count(), 1);
    }
}
