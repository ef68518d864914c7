//! `lab image push`: a container image of this machine's into the lab's registry.

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
};

use serde::{Deserialize, Serialize};

use super::{Context, Error, end, ssh};
use crate::{channel::quote, lab::Lab, progress::Task};

/// The stack that has a registry.
const STACK: &str = "registry";
/// Its option that says where it listens on the master.
const PORT: &str = "port";
/// How long an image may take into the node and from there into the registry, in seconds, with KVM.
const LIMIT_S: u32 = 900;
/// Longest list of an archive's images, in bytes.
const MAX_LIST: u64 = 1 << 20;

/// What was pushed.
#[derive(Debug, Serialize)]
struct Pushed {
    /// Its name in the lab.
    image: String,
}

/// Puts an image into the registry.
pub fn run(context: &Context, image: &str, name: Option<&str>) -> Result<ExitCode, Error> {
    let lab = context.existing()?;
    let (node, port) = registry(&lab)?;
    ssh::running(&lab, &node)?;
    let path = Path::new(image);
    let (kind, own) = match path.is_file() {
        true => of_archive(path)?,
        false => (Kind::Docker, Some(image.to_owned())),
    };
    let name = name.map(str::to_owned).or(own.map(|own| without_registry(&own).to_owned()));
    let name = name.filter(|name| is_name(name)).ok_or_else(|| {
        Error::Other(format!(
            "{image} has no name that a registry can know it by: give it one, `--name app:1`"
        ))
    })?;
    let target = format!("{node}:{port}/{name}");
    let task = context.progress.begin(&node, &format!("push {name}"));
    let pushed = match path.is_file() {
        true => {
            let file = File::open(path);
            let file = file.map_err(|source| Error::Io { action: format!("read {image}"), source })?;
            into_registry(&lab, &node, kind, &target, file, &task)
        }
        false => from_docker(&lab, &node, image, &target, &task),
    };
    end(task, pushed)?;
    context.print(&Pushed { image: target }, |pushed| format!("{} is in the registry", pushed.image))?;
    Ok(ExitCode::SUCCESS)
}

/// The node with the lab's registry, and its port there.
fn registry(lab: &Lab) -> Result<(String, String), Error> {
    let master = lab.topology.nodes.iter().find(|node| node.role == "master");
    let stack = lab.topology.stacks.iter().find(|stack| stack.name == STACK);
    match (master, stack.and_then(|stack| stack.options.get(PORT))) {
        (Some(node), Some(port)) => Ok((node.name.clone(), port.clone())),
        _ => Err(Error::Other(format!(
            "the lab `{}` has no registry: add `[stack.{STACK}]` to its labfile, then `lab up`",
            lab.topology.name
        ))),
    }
}

/// How an archive is built, as skopeo calls it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// By `docker save`.
    Docker,
    /// An OCI image layout.
    Oci,
}

/// An archive's kind, and the name that its first image has.
fn of_archive(path: &Path) -> Result<(Kind, Option<String>), Error> {
    let failed = |source| Error::Io { action: format!("read the image archive {}", path.display()), source };
    let mut archive = tar::Archive::new(File::open(path).map_err(failed)?);
    let mut oci = None;
    for entry in archive.entries().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.path().map_err(failed)?.to_string_lossy().trim_start_matches("./").to_owned();
        if name != "manifest.json" && name != "index.json" {
            continue;
        }
        let mut text = Vec::new();
        entry.take(MAX_LIST).read_to_end(&mut text).map_err(failed)?;
        // Docker's newer ones are both.
        if name == "manifest.json" {
            return Ok((Kind::Docker, docker_name(&text)));
        }
        oci = Some((Kind::Oci, oci_name(&text)));
    }
    oci.ok_or_else(|| {
        Error::Other(format!(
            "{} is no archive of container images: `docker save` writes one, so does `buildah push … oci-archive:FILE`",
            path.display()
        ))
    })
}

/// The first name in `manifest.json` of `docker save`.
fn docker_name(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "RepoTags")]
        names: Option<Vec<String>>,
    }
    let entries: Vec<Entry> = serde_json::from_slice(text).ok()?;
    entries.into_iter().find_map(|entry| entry.names?.into_iter().next())
}

/// The first name in `index.json` of an OCI image layout; what names a tag alone is none.
fn oci_name(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Manifest>,
    }
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        annotations: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(text).ok()?;
    index.manifests.iter().find_map(|manifest| {
        let name = |key: &str| manifest.annotations.get(key).cloned();
        let reference = || name("org.opencontainers.image.ref.name").filter(|name| name.contains([':', '/']));
        name("io.containerd.image.name").or_else(reference)
    })
}

/// An image's name without the registry that it is from: what is before the first `/`, if it is like a host's name.
fn without_registry(name: &str) -> &str {
    let rest = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => rest,
        _ => name,
    };
    rest.strip_prefix("library/").unwrap_or(rest)
}

/// Whether a registry can know an image by this name (distribution-spec 1.1, pulling manifests).
fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
    (1..=255).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(fits)
        && name.matches(':').count() <= 1
        && !name.ends_with([':', '/'])
}

/// Has this machine's Docker write the image.
fn from_docker(lab: &Lab, node: &str, image: &str, target: &str, task: &Task) -> Result<(), Error> {
    let none = |why: String| {
        Error::Other(format!(
            "there is no file {image}, and no image of that name in this machine's Docker ({why}): name an archive of `docker save`"
        ))
    };
    let inspect =
        Command::new("docker").args(["image", "inspect", "--", image]).stdin(Stdio::null()).output();
    match inspect {
        Err(error) => return Err(none(format!("docker: {error}"))),
        Ok(output) if !output.status.success() => {
            return Err(none(String::from_utf8_lossy(&output.stderr).trim().into()));
        }
        Ok(_) => {}
    }
    let mut save = Command::new("docker");
    save.args(["save", "--", image]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut save = save.spawn().map_err(|error| none(error.to_string()))?;
    let pushed = match save.stdout.take() {
        Some(archive) => into_registry(lab, node, Kind::Docker, target, archive, task),
        None => Err(none("it writes nothing".into())),
    };
    let ended = ended(&mut save);
    // Where the node took no more, that is why docker could not write.
    pushed.and(ended)
}

fn ended(save: &mut Child) -> Result<(), Error> {
    let status = save.wait().map_err(|source| Error::Io { action: "wait for docker save".into(), source })?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::Other(format!("docker save: {status}"))),
    }
}

/// Brings an archive into the node, and its first image from there into the registry.
fn into_registry(
    lab: &Lab,
    node: &str,
    kind: Kind,
    target: &str,
    archive: impl Read + Send,
    task: &Task,
) -> Result<(), Error> {
    let kind = match kind {
        Kind::Docker => "docker-archive",
        Kind::Oci => "oci-archive",
    };
    task.detail("copying");
    let script = format!(
        "set -e; f=$(mktemp -p /var/tmp); trap 'rm -f \"$f\"' EXIT; cat > \"$f\"\n\
         skopeo --insecure-policy copy --quiet {kind}:\"$f\" docker://{} 2>&1",
        quote(target)
    );
    let limit = lab.limit(LIMIT_S);
    let outcome = lab.channel(node).feed(&script, archive, limit)?;
    match outcome.success() {
        true => Ok(()),
        false => {
            let said = outcome.tail.join("\n  ");
            let reason = outcome.describe(limit);
            Err(Error::Other(format!("the image did not get into the registry: {reason}\n  {said}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(files: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut archive = tar::Builder::new(file.reopen().unwrap());
        for (name, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        archive.finish().unwrap();
        file
    }

    #[test]
    fn archives_tell_names() {
        let docker = r#"[{"Config": "c", "RepoTags": ["docker.io/library/app:2"], "Layers": []}]"#;
        let oci = r#"{"manifests": [{"annotations": {"io.containerd.image.name": "example.org/x/app:1"}}]}"#;
        let nameless = r#"{"manifests": [{"annotations": {"org.opencontainers.image.ref.name": "latest"}}]}"#;
        let of = |files: &[(&str, &str)]| of_archive(archive(files).path()).unwrap();
        assert_eq!(of(&[("index.json", oci)]), (Kind::Oci, Some("example.org/x/app:1".into())));
        assert_eq!(of(&[("index.json", nameless)]), (Kind::Oci, None));
        let both = of(&[("index.json", oci), ("manifest.json", docker)]);
        assert_eq!(both, (Kind::Docker, Some("docker.io/library/app:2".into())));
        assert_eq!(of(&[("manifest.json", "broken")]), (Kind::Docker, None));
        let said = of_archive(archive(&[("other", "x")]).path()).unwrap_err().to_string();
        assert!(said.contains("docker save"), "{said}");
    }

    #[test]
    fn names_lose_their_registry() {
        for (name, rest) in [
            ("docker.io/library/app:2", "app:2"),
            ("localhost/app", "app"),
            ("127.0.0.1:5000/a/b:1", "a/b:1"),
            ("team/app:1", "team/app:1"),
            ("app", "app"),
        ] {
            assert_eq!(without_registry(name), rest);
            assert!(is_name(rest));
        }
        for bad in ["", "-x", "App", "a b", "a;b", "a:1:2", "a/", "a:", &"x".repeat(256)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
