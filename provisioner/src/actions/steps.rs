//! Which scripts run where, and after which others: the steps of stacks and the user's own.

use std::path::{Path, PathBuf};

use super::{
    Error,
    hand_over::{self, Hands},
    script::Script,
};
use crate::{
    bundle::{self, BundleFile},
    enclosed,
    lab::{Lab, applies},
    labfile::topology::{Node, Stack, Step},
    plan::Plan,
    stack::{self, Kind, StackDef, StepDef},
    state::{self, NodeState},
};

/// How long a step of the user's may take, with KVM.
const USER_STEP_LIMIT_S: u32 = 1800;
/// The option that says which version a bundle's files must have.
pub const VERSION_OPTION: &str = "version";

/// Adds the steps of stacks and of the user to a plan. What is baked comes first. Stacks run in the order of the file;
/// those of one node don't wait for another's unless the stack says so. The user's steps run after all stacks, in the
/// order of the file, each on all of its nodes before the next.
pub fn plan_scripts(lab: &Lab, plan: &mut Plan, ready: &[usize]) -> Result<(), Error> {
    let nodes = &lab.topology.nodes;
    let mut last: Vec<usize> = ready.to_vec();
    let mut ends: Vec<(String, Vec<usize>)> = Vec::new();
    let stacks = stacks(lab)?;
    for kind in [Kind::Bake, Kind::Run] {
        for (used, stack, step) in steps_of(&stacks, kind) {
            let waits = |name: &str| step.after.iter().any(|after| name == format!("{}/{after}", used.name));
            let waits: Vec<usize> = ends
                .iter()
                .filter(|(name, _)| waits(name))
                .flat_map(|(_, indices)| indices.clone())
                .collect();
            let mut added = Vec::new();
            for (node, last) in nodes.iter().zip(last.iter_mut()) {
                if stack.gets(step, node) {
                    let mut after = vec![*last];
                    after.extend(&waits);
                    let script = of_stack(lab, used, step, node)?;
                    *last = plan.add(Some(&node.name), Box::new(script), after);
                    added.push(*last);
                }
            }
            ends.push((format!("{}/{}", used.name, step.name), added));
        }
        if kind == Kind::Bake {
            for step in lab.topology.steps.iter().filter(|step| step.bake) {
                for (node, last) in
                    nodes.iter().zip(last.iter_mut()).filter(|(node, _)| applies(&step.on, node))
                {
                    *last = plan.add(Some(&node.name), Box::new(of_user(lab, step, node)?), vec![*last]);
                }
            }
        }
    }
    let mut before = last;
    for step in lab.topology.steps.iter().filter(|step| !step.bake) {
        let mut added = Vec::new();
        for node in nodes.iter().filter(|node| applies(&step.on, node)) {
            added.push(plan.add(Some(&node.name), Box::new(of_user(lab, step, node)?), before.clone()));
        }
        if !added.is_empty() {
            before = added;
        }
    }
    Ok(())
}

/// The baked steps of a node, in their order.
pub fn baked(lab: &Lab, node: &Node) -> Result<Vec<Script>, Error> {
    let stacks = stacks(lab)?;
    let of_stacks = steps_of(&stacks, Kind::Bake)
        .filter(|(_, stack, step)| stack.gets(step, node))
        .map(|(used, _, step)| of_stack(lab, used, step, node));
    let users = lab.topology.steps.iter().filter(|step| step.bake && applies(&step.on, node));
    of_stacks.chain(users.map(|step| of_user(lab, step, node))).collect()
}

/// Lets the nodes that stay do what is to be done before others are removed. What fails there is told, and hinders
/// nothing: a lab that is broken can be taken apart, too.
pub fn take_leave(lab: &Lab, leaving: &[String]) -> Result<(), Error> {
    let stacks = stacks(lab)?;
    let runs = |name: &str| state::node_state(&lab.dirs, name) == NodeState::Running;
    for (used, stack, step) in steps_of(&stacks, Kind::Leave) {
        let stay = |node: &&Node| stack.gets(step, node) && !leaving.contains(&node.name) && runs(&node.name);
        for node in lab.topology.nodes.iter().filter(stay) {
            for name in leaving {
                let mut script = of_stack(lab, used, step, node)?;
                script.environment.push(("LAB_LEAVING".into(), name.clone()));
                let task = lab.progress.begin(&node.name, &format!("{} {name}", script.name));
                match script.run_once(lab, &task) {
                    Ok(()) => task.done(),
                    Err(error) => {
                        task.failed();
                        lab.progress.warn(&format!("{name} goes all the same: {error}"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The files of bundles that a stack's steps use in this lab.
pub fn bundle_files(lab: &Lab, used: &Stack) -> Result<Vec<BundleFile>, Error> {
    let stack = stack::load(used)?;
    let mut files: Vec<BundleFile> = Vec::new();
    for step in &stack.steps {
        if lab.topology.nodes.iter().any(|node| stack.gets(step, node)) {
            for file in bundle_of(lab, used, step)? {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
    }
    Ok(files)
}

/// The stacks of a lab, in the order of the file.
fn stacks(lab: &Lab) -> Result<Vec<(&Stack, StackDef)>, Error> {
    lab.topology.stacks.iter().map(|used| Ok((used, stack::load(used)?))).collect()
}

/// All steps of a kind, in their order.
fn steps_of<'s>(
    stacks: &'s [(&'s Stack, StackDef)],
    kind: Kind,
) -> impl Iterator<Item = (&'s Stack, &'s StackDef, &'s StepDef)> {
    let steps =
        |(used, stack): &'s (&'s Stack, StackDef)| stack.steps.iter().map(move |step| (*used, stack, step));
    stacks.iter().flat_map(steps).filter(move |(_, _, step)| step.kind == kind)
}

/// The files that a step of a stack wants of bundles, in these folders.
pub fn find_bundle(
    folders: &[PathBuf],
    used: &Stack,
    step: &StepDef,
) -> Result<Vec<BundleFile>, bundle::Error> {
    let wanted = used.options.get(VERSION_OPTION).map(String::as_str).unwrap_or_default();
    let user = format!("{}/{}", used.name, step.name);
    step.bundle.iter().map(|pattern| bundle::find(folders, pattern, wanted, &user)).collect()
}

fn bundle_of(lab: &Lab, used: &Stack, step: &StepDef) -> Result<Vec<BundleFile>, Error> {
    if step.bundle.is_empty() {
        return Ok(Vec::new());
    }
    let mut folders = lab.paths.bundles();
    if lab.offline {
        // What the lab's layers were made of, whatever else there is.
        folders.insert(0, lab.paths.offline_bundle(&lab.topology.name));
    }
    let missing = match find_bundle(&folders, used, step) {
        Err(error @ (bundle::Error::NotFound { .. } | bundle::Error::OtherVersion { .. })) => error,
        found => return Ok(found?),
    };
    if lab.offline {
        return Err(missing.into());
    }
    let definition = stack::definition(used)?;
    let hint = definition.source(&used.source).and_then(|source| source.hint.as_ref());
    let hint = hint.map(|hint| format!("\n  {hint}")).unwrap_or_default();
    Err(Error::NoBundle { missing, ways: hint + &definition.ways_beside(&used.source) })
}

fn of_stack(lab: &Lab, used: &Stack, step: &StepDef, node: &Node) -> Result<Script, Error> {
    let (baked, name) = (step.kind == Kind::Bake, format!("{}/{}", used.name, step.name));
    let mut environment = if baked { Vec::new() } else { environment(lab, node) };
    environment.push(("LAB_SOURCE".into(), used.source.clone()));
    for (name, value) in &used.options {
        environment.push((format!("LAB_OPT_{}", name.to_uppercase().replace('-', "_")), value.clone()));
    }
    environment.push(("LAB_STEP".into(), hand_over::FOLDER.into()));
    let bundle = bundle_of(lab, used, step)?;
    if let Some(file) = bundle.iter().find(|file| !file.version.is_empty()) {
        environment.push(("LAB_BUNDLE_VERSION".into(), file.version.clone()));
    }
    let hands = Hands {
        files: step.files.clone(),
        bundle,
        stack: used.name.clone(),
        gives: step.gives.clone(),
        takes: step.takes.clone(),
    };
    Ok(Script {
        node: node.clone(),
        name,
        text: step.script.clone(),
        environment,
        baked,
        chroot: step.chroot,
        limit_s: step.limit_s,
        ready: step.ready.clone().map(|condition| (condition, step.ready_limit_s)),
        hands,
    })
}

fn of_user(lab: &Lab, step: &Step, node: &Node) -> Result<Script, Error> {
    let folder = lab.topology.labfile.parent().unwrap_or(Path::new("/"));
    let files = enclosed::beside(folder, &step.files)?;
    let mut environment = if step.bake { Vec::new() } else { environment(lab, node) };
    if !files.is_empty() {
        environment.push(("LAB_STEP".into(), hand_over::FOLDER.into()));
    }
    Ok(Script {
        node: node.clone(),
        name: format!("step/{}", step.name),
        text: step.run.clone(),
        environment,
        baked: step.bake,
        chroot: false,
        limit_s: USER_STEP_LIMIT_S,
        ready: None,
        hands: Hands { files, ..Hands::default() },
    })
}

/// What scripts find in their environment, except those that are baked: nothing there is of one lab or node.
pub fn environment(lab: &Lab, node: &Node) -> Vec<(String, String)> {
    let topology = &lab.topology;
    let master = topology.nodes.iter().find(|node| node.role == "master").or(topology.nodes.first());
    let names: Vec<String> = topology.nodes.iter().map(|node| format!("{}={}", node.name, node.ip)).collect();
    let stacks: Vec<&str> = topology.stacks.iter().map(|stack| stack.name.as_str()).collect();
    vec![
        ("LAB_NAME", topology.name.clone()),
        ("LAB_NODE", node.name.clone()),
        ("LAB_ROLE", node.role.clone()),
        ("LAB_IP", node.ip.to_string()),
        ("LAB_SUBNET", format!("{}/{}", topology.network.subnet, topology.network.prefix)),
        ("LAB_GATEWAY", topology.network.gateway.to_string()),
        ("LAB_NODES", names.join(" ")),
        ("LAB_STACKS", stacks.join(" ")),
        ("LAB_MASTER", master.map(|node| node.name.clone()).unwrap_or_default()),
        ("LAB_MASTER_IP", master.map(|node| node.ip.to_string()).unwrap_or_default()),
        ("LAB_PATIENCE", lab.patience.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_string(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::{files::hex, labfile, paths::Paths, progress::Progress, source};

    const LABFILE: &str = "name = \"demo\"\n[node.master]\n[node.w1]\n[node.w2]\n[stack.kubernetes]\n\
                           [[step]]\nname = \"last\"\non = \"master\"\nrun = \"true\"\n";

    fn lab(dir: &Path, text: &str, images: &str) -> Lab {
        let bundle = dir.join("home/bundles/k8s");
        fs::create_dir_all(&bundle).unwrap();
        let mut sums = String::new();
        for (name, text) in
            [("k8s-1.20.2-node-binaries.tar.zst", "b"), ("k8s-1.20.2-images.oci.tar.zst", images)]
        {
            sums += &format!("{}  {name}\n", hex(&Sha256::digest(text)));
        }
        fs::write(bundle.join("SHA256SUMS"), sums).unwrap();
        let file = dir.join("lab.toml");
        fs::write(&file, text).unwrap();
        let paths = Paths::at(&dir.join("home"), &dir.join("run"));
        let mut topology = labfile::load(&file).unwrap();
        source::choose(&mut topology, &paths, false, &BTreeMap::new()).unwrap();
        Lab::new(&paths, topology, Progress::new(true)).unwrap()
    }

    /// The actions of a plan: node, name, and what they wait for.
    fn planned(lab: &Lab) -> Vec<(String, Vec<String>)> {
        let plan = super::super::plan(lab).unwrap();
        let tell = |index: usize| {
            let item = &plan.items[index];
            format!("{} {}", item.node.as_deref().unwrap_or("-"), item.action.describe())
        };
        plan.items
            .iter()
            .enumerate()
            .map(|(index, item)| (tell(index), item.after.iter().map(|&before| tell(before)).collect()))
            .collect()
    }

    #[test]
    fn workers_wait_for_the_master_and_not_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let plan = planned(&lab(dir.path(), LABFILE, "i"));
        let after = |what: &str| -> Vec<String> {
            plan.iter()
                .find(|(name, _)| name == what)
                .unwrap_or_else(|| panic!("{what}: {plan:#?}"))
                .1
                .clone()
        };
        for node in ["w1", "w2"] {
            let join = [format!("{node} kubernetes/pod-network"), "master kubernetes/init".into()];
            assert_eq!(after(&format!("{node} kubernetes/join")), join);
        }
        // Nor does the cluster get what pods find in it only when all of them are there; what the user runs comes last.
        assert_eq!(after("master kubernetes/services"), ["master kubernetes/init"]);
        // What is baked is made once for all of them; nobody leaves when a lab comes up.
        assert_eq!(plan.iter().filter(|(name, _)| name.contains("layer kubernetes/images")).count(), 1);
        assert!(!plan.iter().any(|(name, _)| name.contains("drain") || name.contains("upstream")));
        assert!(after("master step/last").contains(&"w2 kubernetes/join".to_owned()));
    }

    #[test]
    fn a_bundle_s_file_is_part_of_its_step() {
        let dir = tempfile::tempdir().unwrap();
        let digests = |images: &str| -> Vec<String> {
            let lab = lab(dir.path(), LABFILE, images);
            baked(&lab, &lab.topology.nodes[0]).unwrap().iter().map(Script::digest).collect()
        };
        let (one, other) = (digests("1"), digests("2"));
        assert!(one[0] == other[0] && one[1] != other[1] && one == digests("1"));
        let wants = LABFILE.replace("[stack.kubernetes]", "[stack.kubernetes]\nversion = \"1.21.0\"");
        let wanting = lab(dir.path(), &wants, "1");
        let refused = super::super::plan(&wanting).map(drop).unwrap_err().to_string();
        assert!(refused.contains("kubernetes/packages") && refused.contains("1.21.0"), "{refused}");
        // Both ways out are told.
        for way in
            ["scripts/bundle-kubernetes FOLDER", "30 minutes", "out of support", "source = \"upstream\""]
        {
            assert!(refused.contains(way), "{refused}");
        }
        assert_eq!(bundle_files(&wanting, &wanting.topology.stacks[0]).unwrap_err().to_string(), refused);
    }

    #[test]
    fn what_a_step_takes_is_part_of_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let lab = lab(dir.path(), LABFILE, "i");
        lab.dirs.create().unwrap();
        let stacks = stacks(&lab).unwrap();
        let of = |name: &str, node: usize| {
            let (used, _, step) =
                steps_of(&stacks, Kind::Run).find(|(_, _, step)| step.name == name).unwrap();
            of_stack(&lab, used, step, &lab.topology.nodes[node]).unwrap()
        };
        let (init, join) = (of("init", 0), of("join", 1));
        let digest = join.digest();
        let records = |text: &str| {
            crate::json_file::write_bytes(&hand_over::kept(&lab, "kubernetes", "join"), text.as_bytes())
                .unwrap();
            (init.record(&lab), join.record(&lab))
        };
        let (one, other) = (records("one cluster"), records("another"));
        assert!(one.0 == other.0 && one.1 != other.1 && one == records("one cluster"));
        assert_eq!(join.digest(), digest, "the snapshot of the first up has what was given with it");
    }

    #[test]
    fn a_variable_that_a_file_names_is_part_of_its_step() {
        let dir = tempfile::tempdir().unwrap();
        let digest = |file: &str, text: &str| {
            let labfile = "name = \"demo\"\n[node.a]\n[node.b]\n[[step]]\nname = \"s\"\nfiles = [\"f\"]\nrun = \"true\"\n";
            fs::write(dir.path().join("f"), file).unwrap();
            let lab = lab(dir.path(), &labfile.replace("[node.b]", text), "i");
            let step = of_user(&lab, &lab.topology.steps[0], &lab.topology.nodes[0]).unwrap();
            step.digest()
        };
        assert_eq!(digest("plain", "[node.b]"), digest("plain", "[node.c]"));
        assert_ne!(digest("$LAB_NODES", "[node.b]"), digest("$LAB_NODES", "[node.c]"));
    }

    #[test]
    fn a_cluster_that_is_added_is_looked_for_again() {
        let dir = tempfile::tempdir().unwrap();
        let inputs = |stacks: &str| -> BTreeMap<String, Option<String>> {
            let text = format!("name = \"demo\"\n[node.master]\n{stacks}[stack.prometheus]\n");
            let lab = lab(dir.path(), &text, "i");
            let plan = super::super::plan(&lab).unwrap();
            plan.items.iter().map(|item| (item.action.describe(), item.action.inputs(&lab))).collect()
        };
        let (without, with) = (inputs(""), inputs("[stack.kubernetes]\n"));
        for (step, again) in [("cluster", true), ("start-server", true), ("start-exporter", false)] {
            let step = format!("prometheus/{step}");
            assert!(without[&step].is_some() && (without[&step] != with[&step]) == again, "{step}");
        }
    }
}
