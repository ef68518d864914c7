//! Scripts in nodes: the steps of stacks and the user's own.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{Action, Error, ready::Ready};
use crate::{
    channel,
    child::Outcome,
    files::hex,
    json_file,
    lab::{Lab, applies},
    labfile::topology::{Node, Stack, Step},
    plan::Plan,
    progress::Task,
    stack::{self, Kind, StackDef, StepDef},
    state::StepRecords,
};

/// How long a step of the user's may take, with KVM.
const USER_STEP_LIMIT_S: u32 = 1800;
/// How often a step is run, if its node restarts under it: it asked for that, or its kernel crashed.
const RUNS: u32 = 3;
/// How long a node whose connections are closed may take until it is down, with KVM.
const DOWN_LIMIT_S: u32 = 15;

/// Runs a script in a node once: again only if it, or what it is given, has changed.
#[derive(Debug, Clone)]
pub struct Script {
    /// The node.
    pub node: Node,
    /// Its name, unique in the lab: `docker/install`, `step/motd`.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Its environment.
    pub environment: Vec<(String, String)>,
    /// Whether its result is kept in a layer, for nodes that are made later.
    pub baked: bool,
    /// How long it may take, with KVM.
    pub limit_s: u32,
    /// A shell condition that must come true after it, and how long that may take, with KVM.
    pub ready: Option<(String, u32)>,
}

impl Script {
    /// What it is recorded by: everything that its result depends on. A variable that its text does not name is no part
    /// of that: a node more in the lab is no reason to install everything again on all others.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (key, value) in self.environment.iter().filter(|(key, _)| self.text.contains(key)) {
            hash.update(format!("{key}={value}\0"));
        }
        hash.update(&self.text);
        hash.update(self.ready.as_ref().map(|(condition, _)| condition.as_str()).unwrap_or_default());
        hex(&hash.finalize())
    }

    fn records(&self, lab: &Lab) -> PathBuf {
        lab.dirs.node(&self.node.name).join("steps.json")
    }

    /// Runs it, and waits until it is ready.
    fn run_once(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let logs = lab.dirs.node(&self.node.name).join("steps");
        fs::create_dir_all(&logs).map_err(|source| Error::Io {
            action: "make the folder",
            path: logs.clone(),
            source,
        })?;
        let log = logs.join(format!("{}.log", self.name.replace('/', "-")));
        let channel = lab.channel(&self.node.name);
        let limit = lab.limit(self.limit_s);
        let outcome = channel
            .script(&self.text, &self.environment, Some(&log), limit, &mut |line| task.detail(line))?;
        let failed = |reason: String, outcome: &Outcome| {
            let tail = outcome.tail.iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n");
            Error::Step {
                step: self.name.clone(),
                reason,
                tail,
                log: log.clone(),
                lost: channel::lost(outcome),
            }
        };
        if !outcome.success() {
            return Err(failed(outcome.describe(limit), &outcome));
        }
        if let Some((condition, limit_s)) = &self.ready {
            task.detail("waiting until it is ready");
            let limit = lab.limit(*limit_s);
            let seconds = limit.as_secs();
            // The wait runs in the node: a connection for each look would cost more than the look.
            let wait = format!(
                "end=$(($(date +%s) + {seconds}))\nuntil last=$( ( {condition} ) 2>&1 ); do\n\
                 if [ $(date +%s) -ge $end ]; then printf 'last seen: %s\\n' \"$last\"; exit 1; fi\nsleep 1\ndone"
            );
            let outcome = channel.script(
                &wait,
                &self.environment,
                None,
                limit + Duration::from_secs(60),
                &mut |line| task.detail(line),
            )?;
            if !outcome.success() {
                let reason = format!("after it, `{condition}` did not come true within {seconds} s");
                return Err(failed(reason, &outcome));
            }
        }
        Ok(())
    }
}

impl Action for Script {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        let records: StepRecords = json_file::read(&self.records(lab))?.unwrap_or_default();
        Ok(records.get(&self.name) == Some(&self.digest()))
    }

    fn state(&self, lab: &Lab) -> Result<&'static str, Error> {
        Ok(match self.is_done(lab)? {
            true => "done",
            false if self.baked && lab.record_of(&self.node.name)?.is_none() => "in its layer",
            false => "to do",
        })
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        Some(self.digest())
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let channel = lab.channel(&self.node.name);
        let mut runs = RUNS;
        loop {
            let (before, since) = (channel.uptime(), Instant::now());
            let Err(error) = self.run_once(lab, task) else { break };
            runs -= 1;
            let lost = matches!(error, Error::Step { lost: true, .. });
            if runs == 0 || !lost || !channel.restarts(before, since, lab.limit(DOWN_LIMIT_S)) {
                return Err(error);
            }
            task.warn(&format!("the node restarted while {} ran: it is run again", self.name));
            Ready { node: self.node.clone() }.run(lab, task)?;
        }
        // Nodes run in parallel, but the steps of one node one after the other: nobody else writes its records.
        let mut records: StepRecords = json_file::read(&self.records(lab))?.unwrap_or_default();
        records.insert(self.name.clone(), self.digest());
        Ok(json_file::write(&self.records(lab), &records)?)
    }
}

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
                if gets(stack, step, node) {
                    let mut after = vec![*last];
                    after.extend(&waits);
                    let script = of_stack(lab, used, step, node);
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
                    *last = plan.add(Some(&node.name), Box::new(of_user(lab, step, node)), vec![*last]);
                }
            }
        }
    }
    let mut before = last;
    for step in lab.topology.steps.iter().filter(|step| !step.bake) {
        let on = nodes.iter().filter(|node| applies(&step.on, node));
        let add =
            |node: &Node| plan.add(Some(&node.name), Box::new(of_user(lab, step, node)), before.clone());
        let added: Vec<usize> = on.map(add).collect();
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
        .filter(|(_, stack, step)| gets(stack, step, node))
        .map(|(used, _, step)| of_stack(lab, used, step, node));
    let users = lab.topology.steps.iter().filter(|step| step.bake && applies(&step.on, node));
    Ok(of_stacks.chain(users.map(|step| of_user(lab, step, node))).collect())
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

fn gets(stack: &StackDef, step: &StepDef, node: &Node) -> bool {
    stack.applies_to(&node.role) && applies(&step.on, node)
}

fn of_stack(lab: &Lab, used: &Stack, step: &StepDef, node: &Node) -> Script {
    let baked = step.kind == Kind::Bake;
    let mut environment = if baked { Vec::new() } else { environment(lab, node) };
    environment.push(("LAB_SOURCE".into(), used.source.clone()));
    for (name, value) in &used.options {
        environment.push((format!("LAB_OPT_{}", name.to_uppercase().replace('-', "_")), value.clone()));
    }
    Script {
        node: node.clone(),
        name: format!("{}/{}", used.name, step.name),
        text: step.script.clone(),
        environment,
        baked,
        limit_s: step.limit_s,
        ready: step.ready.clone().map(|condition| (condition, step.ready_limit_s)),
    }
}

fn of_user(lab: &Lab, step: &Step, node: &Node) -> Script {
    Script {
        node: node.clone(),
        name: format!("step/{}", step.name),
        text: step.run.clone(),
        environment: if step.bake { Vec::new() } else { environment(lab, node) },
        baked: step.bake,
        limit_s: USER_STEP_LIMIT_S,
        ready: None,
    }
}

/// What scripts find in their environment, except those that are baked: nothing there is of one lab or node.
pub fn environment(lab: &Lab, node: &Node) -> Vec<(String, String)> {
    let topology = &lab.topology;
    let master = topology.nodes.iter().find(|node| node.role == "master").or(topology.nodes.first());
    let names: Vec<String> = topology.nodes.iter().map(|node| format!("{}={}", node.name, node.ip)).collect();
    vec![
        ("LAB_NAME", topology.name.clone()),
        ("LAB_NODE", node.name.clone()),
        ("LAB_ROLE", node.role.clone()),
        ("LAB_IP", node.ip.to_string()),
        ("LAB_SUBNET", format!("{}/{}", topology.network.subnet, topology.network.prefix)),
        ("LAB_GATEWAY", topology.network.gateway.to_string()),
        ("LAB_NODES", names.join(" ")),
        ("LAB_MASTER", master.map(|node| node.name.clone()).unwrap_or_default()),
        ("LAB_MASTER_IP", master.map(|node| node.ip.to_string()).unwrap_or_default()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_string(), value))
    .collect()
}
