//! Where a stack's software comes from, if the labfile leaves that to lab: one of the sources that a source such as `auto`
//! stands for.
//!
//! What the nodes of a lab stand on stays what it is. A lab that has none yet gets what `lab.lock` says, where that holds,
//! else the first source whose files of bundles are all found, else the last.

use std::{collections::BTreeMap, path::PathBuf};

use crate::{
    actions, bundle, json_file,
    labfile::topology::{Node, Stack, Topology},
    paths::{LabPaths, Paths},
    stack::{self, StackDef},
    state::{self, LabState, NodeState},
};

/// Why no source can be chosen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nodes stand on another one than the labfile's options are for.
    #[error(
        "stack `{stack}`: the lab was made with source = \"{was}\", and the labfile's options are not for that: take back what has changed, or `lab destroy` it and `lab up` makes it anew"
    )]
    Keeps {
        /// The stack.
        stack: String,
        /// The source that its nodes have.
        was: String,
    },
    /// A stack's definition.
    #[error(transparent)]
    Stack(#[from] stack::Error),
    /// A bundle can't be read.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// The lab's record can't be read.
    #[error(transparent)]
    File(#[from] json_file::Error),
}

/// Chooses a source for each stack of a labfile's topology that leaves it open. `offline`: what came with the lab's offline
/// bundle counts, and no other. `locked`: what `lab.lock` says, by stack, if that is to hold.
pub fn choose(
    topology: &mut Topology,
    paths: &Paths,
    offline: bool,
    locked: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let Topology { name, labfile, nodes, stacks, .. } = topology;
    let dirs = paths.lab(name);
    let mut state = None;
    for used in stacks {
        let definition = stack::definition(used)?;
        let mut possible = definition.plain(&used.source);
        if possible == [used.source.as_str()] {
            continue;
        }
        if state.is_none() {
            state = LabState::read(&dirs)?.filter(|state| state.topology.labfile == *labfile);
        }
        possible.retain(|source| {
            used.options.iter().all(|(option, value)| definition.allows(source, option, value))
        });
        let folders = if offline { vec![paths.offline_bundle(name)] } else { paths.bundles() };
        let before = state.as_ref().and_then(|state| stands_on(&dirs, state, &definition));
        // What is no longer a source of the stack is nothing to keep.
        let before = before.filter(|before| definition.plain(&used.source).contains(&before.source.as_str()));
        let source = if let Some(before) = before {
            if !possible.contains(&before.source.as_str()) {
                return Err(Error::Keeps { stack: used.name.clone(), was: before.source.clone() });
            }
            // A later version of lab may have another default; what runs has this one.
            let version = before.options.get(actions::VERSION_OPTION).cloned();
            if let Some(version) = version {
                used.options.entry(actions::VERSION_OPTION.into()).or_insert(version);
            }
            before.source.clone()
        } else if let Some(source) =
            locked.get(&used.name).filter(|source| possible.contains(&source.as_str()))
        {
            source.clone()
        } else {
            first_there(&definition, used, &possible, nodes, &folders)?
        };
        definition.fill_in(&source, &mut used.options);
        used.source = source;
    }
    Ok(())
}

/// How the lab's nodes were made to use a stack, if there are any yet that do.
fn stands_on<'s>(dirs: &LabPaths, state: &'s LabState, definition: &StackDef) -> Option<&'s Stack> {
    let uses = |node: &Node| {
        definition.applies_to(&node.role) && state::node_state(dirs, &node.name) != NodeState::Absent
    };
    let used = state.topology.stacks.iter().find(|stack| stack.name == definition.name)?;
    state.topology.nodes.iter().any(uses).then_some(used)
}

/// The first of these sources whose steps find all their files of bundles; the last without a look.
fn first_there(
    definition: &StackDef,
    used: &Stack,
    possible: &[&str],
    nodes: &[Node],
    folders: &[PathBuf],
) -> Result<String, Error> {
    let Some((last, others)) = possible.split_last() else { return Ok(used.source.clone()) };
    'sources: for source in others {
        let steps =
            definition.steps.iter().filter(|step| step.source.as_ref().is_none_or(|only| only == source));
        for step in steps.filter(|step| nodes.iter().any(|node| definition.gets(step, node))) {
            match actions::find_bundle(folders, used, step) {
                Ok(_) => {}
                Err(bundle::Error::NotFound { .. } | bundle::Error::OtherVersion { .. }) => continue 'sources,
                Err(error) => return Err(error.into()),
            }
        }
        return Ok((*source).to_owned());
    }
    Ok((*last).to_owned())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{json_file, labfile, state::NodeRecord};

    const LABFILE: &str = "name = \"demo\"\n[node.master]\n[stack.kubernetes]\n";

    /// Lists files as a bundle's.
    fn bundle(folder: &Path, version: &str) {
        let names = ["node-binaries.tar.zst", "images.oci.tar.zst"];
        let line = |name: &&str| format!("{}  k8s-{version}-{name}\n", "0".repeat(64));
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(bundle::SUMS), names.iter().map(line).collect::<String>()).unwrap();
    }

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn paths(&self) -> Paths {
            Paths::at(&self.0.path().join("home"), &self.0.path().join("run"))
        }

        fn bundle(&self, version: &str) {
            bundle(&self.0.path().join("home/bundles/k8s"), version);
        }

        /// What becomes of a labfile with these lines for Kubernetes.
        fn chosen(&self, lines: &str, offline: bool, locked: &str) -> Result<Topology, String> {
            let file = self.0.path().join("lab.toml");
            fs::write(&file, format!("{LABFILE}{lines}")).unwrap();
            let mut topology = labfile::load(&file).map_err(|wrong| wrong.to_string())?;
            let locked = BTreeMap::from([("kubernetes".to_owned(), locked.to_owned())]);
            choose(&mut topology, &self.paths(), offline, &locked).map_err(|error| error.to_string())?;
            Ok(topology)
        }

        /// Source and version.
        fn of(&self, lines: &str) -> (String, String) {
            self.told(self.chosen(lines, false, "").unwrap())
        }

        fn told(&self, topology: Topology) -> (String, String) {
            let used = &topology.stacks[0];
            // Whatever is chosen, its steps find all options.
            assert!(stack::load(used).is_ok() && used.options.contains_key("storage"));
            (used.source.clone(), used.options["version"].clone())
        }

        /// Records the lab as brought up, with a node's disk or without.
        fn up(&self, lines: &str, disk: bool) {
            let topology = self.chosen(lines, false, "").unwrap();
            let dirs = self.paths().lab("demo");
            dirs.create().unwrap();
            LabState { topology, forwards: Vec::new(), fork: None, came_up: false }.write(&dirs).unwrap();
            if disk {
                fs::create_dir_all(dirs.node("master")).unwrap();
                let record = NodeRecord { image: "x".into(), machine_id: "0".into() };
                json_file::write(&dirs.node("master").join("node.json"), &record).unwrap();
            }
        }
    }

    fn pair(source: &str, version: &str) -> (String, String) {
        (source.to_owned(), version.to_owned())
    }

    #[test]
    fn a_bundle_where_one_is_found_else_upstream() {
        let machine = Machine::new();
        assert_eq!(machine.of(""), pair("upstream", "1.36"));
        assert_eq!(machine.of("source = \"auto\"\nversion = \"1.35\"\n"), pair("upstream", "1.35"));
        // What upstream can't be is for a bundle alone, and that it is missing is told when it is looked for.
        assert_eq!(machine.of("version = \"1.20.2\"\n"), pair("bundle", "1.20.2"));
        assert_eq!(machine.of("source = \"bundle\"\n"), pair("bundle", ""));

        machine.bundle("1.20.2");
        assert_eq!(machine.of(""), pair("bundle", ""));
        assert_eq!(machine.of("version = \"1.20.2\"\n"), pair("bundle", "1.20.2"));
        assert_eq!(machine.of("version = \"1.20\"\n"), pair("bundle", "1.20"));
        assert_eq!(machine.of("version = \"1.35\"\n"), pair("upstream", "1.35"));
        for only in [
            "metrics_server = true",
            "load_balancer = \"192.168.100.50-192.168.100.59\"",
            "network = \"calico\"",
        ] {
            assert_eq!(machine.of(&format!("{only}\n")), pair("upstream", "1.36"), "{only}");
        }
        // With one of its files missing it is none.
        let sums = machine.0.path().join("home/bundles/k8s/SHA256SUMS");
        let text = fs::read_to_string(&sums).unwrap();
        fs::write(&sums, text.lines().next().unwrap()).unwrap();
        assert_eq!(machine.of(""), pair("upstream", "1.36"));
    }

    #[test]
    fn what_nodes_stand_on_stays() {
        let machine = Machine::new();
        machine.up("", false);
        machine.bundle("1.20.2");
        // Nothing is there yet: what could not be fetched does not bind.
        assert_eq!(machine.of(""), pair("bundle", ""));
        let machine = Machine::new();
        machine.up("version = \"1.35\"\n", true);
        machine.bundle("1.20.2");
        assert_eq!(machine.of(""), pair("upstream", "1.35"));
        assert_eq!(machine.of("metrics_server = true\n"), pair("upstream", "1.35"));
        assert_eq!(machine.of("version = \"1.36\"\n"), pair("upstream", "1.36"));
        assert_eq!(machine.of("source = \"bundle\"\n"), pair("bundle", ""), "the labfile says so");
        assert_eq!(machine.told(machine.chosen("", false, "bundle").unwrap()), pair("upstream", "1.35"));

        let machine = Machine::new();
        machine.bundle("1.20.2");
        machine.up("", true);
        fs::remove_dir_all(machine.0.path().join("home/bundles")).unwrap();
        assert_eq!(machine.of(""), pair("bundle", ""));
        let said = machine.chosen("metrics_server = true\n", false, "").unwrap_err();
        assert!(said.contains("made with source = \"bundle\"") && said.contains("lab destroy"), "{said}");
    }

    #[test]
    fn what_is_locked_holds() {
        let machine = Machine::new();
        machine.bundle("1.20.2");
        assert_eq!(machine.told(machine.chosen("", false, "upstream").unwrap()), pair("upstream", "1.36"));
        // What it says is not possible any more.
        assert_eq!(machine.told(machine.chosen("", false, "nowhere").unwrap()), pair("bundle", ""));
    }

    #[test]
    fn offline_it_is_what_the_offline_bundle_was_made_with() {
        let machine = Machine::new();
        machine.bundle("1.20.2");
        assert_eq!(machine.told(machine.chosen("", true, "").unwrap()), pair("upstream", "1.36"));
        bundle(&machine.paths().offline_bundle("demo"), "1.20.2");
        assert_eq!(machine.told(machine.chosen("", true, "").unwrap()), pair("bundle", ""));
    }
}
