//! A script in a node, run once: a step of a stack's or of the user's.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{
    Action, Error, hand_over,
    hand_over::Hands,
    ready::{Ready, is_ready},
};
use crate::{
    channel, child::Outcome, enclosed, files::hex, json_file, lab::Lab, labfile::topology::Node,
    progress::Task, state::StepRecords,
};

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
    /// Whether it may be baked on the image's files, without a node.
    pub chroot: bool,
    /// How long it may take, with KVM.
    pub limit_s: u32,
    /// A shell condition that must come true after it, and how long that may take, with KVM.
    pub ready: Option<(String, u32)>,
    /// Files that it finds and leaves.
    pub hands: Hands,
}

impl Script {
    /// A digest of everything that its result depends on. A variable that neither its texts nor its files name is no part of
    /// that: a node more in the lab is no reason to install everything again on all others.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let ready = self.ready.as_ref().map(|(condition, _)| condition.as_str()).unwrap_or_default();
        let named = |key: &str| {
            self.text.contains(key)
                || ready.contains(key)
                || self.hands.files.iter().any(|file| file.names(key))
        };
        for (key, value) in self.environment.iter().filter(|(key, _)| named(key)) {
            hash.update(format!("{key}={value}\0"));
        }
        hash.update(&self.text);
        hash.update(ready);
        if !self.hands.files.is_empty() {
            hash.update(enclosed::digest(&self.hands.files));
        }
        for file in &self.hands.bundle {
            hash.update(format!("\0{}={}", file.name, file.sha256));
        }
        hex(&hash.finalize())
    }

    /// What it is recorded by: its digest, and what it takes of what other steps gave. A cluster or a certificate that was
    /// made anew has to be joined or trusted again.
    pub(super) fn record(&self, lab: &Lab) -> String {
        if self.hands.takes.is_empty() {
            return self.digest();
        }
        let mut hash = Sha256::new();
        hash.update(self.digest());
        for name in &self.hands.takes {
            hash.update(fs::read(hand_over::kept(lab, &self.hands.stack, name)).unwrap_or_default());
        }
        hex(&hash.finalize())
    }

    fn records(&self, lab: &Lab) -> PathBuf {
        lab.dirs.node(&self.node.name).join("steps.json")
    }

    /// Runs it with its files, and waits until it is ready.
    pub fn run_once(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let logs = lab.dirs.node(&self.node.name).join("steps");
        fs::create_dir_all(&logs).map_err(|source| Error::Io {
            action: "make the folder",
            path: logs.clone(),
            source,
        })?;
        let log = logs.join(format!("{}.log", self.name.replace('/', "-")));
        let channel = lab.channel(&self.node.name);
        hand_over::before(lab, self, task)?;
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
        hand_over::after(lab, self, task)?;
        if let Some((condition, limit_s)) = &self.ready {
            task.detail("waiting until it is ready");
            let limit = lab.limit(*limit_s);
            let seconds = limit.as_secs();
            let outcome = channel.script(
                &wait(condition, seconds),
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

/// A script that waits for a condition. It runs in the node, since a connection for each look would cost more than the look,
/// and prints what was seen whenever that is something new.
fn wait(condition: &str, seconds: u64) -> String {
    format!(
        r#"end=$(($(date +%s) + {seconds})) told=
until last=$( ( {condition} ) 2>&1 ); do
    if [ $(date +%s) -ge $end ]; then printf 'last seen: %s\n' "$last"; exit 1; fi
    [ "$last" = "$told" ] || printf '%s\n' "$last"
    told=$last
    sleep 1
done"#
    )
}

impl Action for Script {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn is_done(&self, lab: &Lab) -> Result<bool, Error> {
        let records: StepRecords = json_file::read(&self.records(lab))?.unwrap_or_default();
        Ok(records.get(&self.name) == Some(&self.record(lab)))
    }

    fn state(&self, lab: &Lab) -> Result<&'static str, Error> {
        Ok(match self.is_done(lab)? {
            true => "done",
            false if self.baked && lab.record_of(&self.node.name)?.is_none() => "in its layer",
            false => "to do",
        })
    }

    fn stack(&self) -> Option<&str> {
        (!self.hands.stack.is_empty()).then_some(self.hands.stack.as_str())
    }

    fn inputs(&self, _lab: &Lab) -> Option<String> {
        Some(self.digest())
    }

    fn run(&self, lab: &Lab, task: &Task) -> Result<(), Error> {
        let channel = lab.channel(&self.node.name);
        let mut runs = RUNS;
        // The step before this one, or somebody in the node, may have had it reboot.
        if !is_ready(lab, &self.node.name) {
            Ready { node: self.node.clone() }.run(lab, task)?;
        }
        loop {
            let (before, since) = (channel.uptime(), Instant::now());
            let Err(mut error) = self.run_once(lab, task) else { break };
            runs -= 1;
            let lost = matches!(error, Error::Step { lost: true, .. } | Error::HandOver { lost: true, .. });
            if !lost || !channel.restarts(before, since, lab.limit(DOWN_LIMIT_S)) {
                return Err(error);
            }
            if runs == 0 {
                if let Error::Step { reason, .. } = &mut error {
                    *reason = format!(
                        "{reason}: the node restarted under it {RUNS} times. A step that reboots its node is run again \
                         after that, until it ends by itself: let it leave a file before, and do no more once that is there"
                    );
                }
                return Err(error);
            }
            task.warn(&format!("the node restarted while {} ran: it is run again", self.name));
            Ready { node: self.node.clone() }.run(lab, task)?;
        }
        // Nodes run in parallel, but the steps of one node one after the other: nobody else writes its records.
        let mut records: StepRecords = json_file::read(&self.records(lab))?.unwrap_or_default();
        records.insert(self.name.clone(), self.record(lab));
        Ok(json_file::write(&self.records(lab), &records)?)
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, process::Command};

    use super::*;

    #[test]
    fn what_a_wait_sees_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("sleep", "#!/bin/sh\n");
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let run = |seconds| {
            write("looks", "0");
            let condition = "n=$(cat looks); echo $((n + 1)) > looks; echo at $((n / 2)); [ $n = 5 ]";
            let mut sh = Command::new("sh");
            sh.args(["-e", "-c", &wait(condition, seconds)]).current_dir(dir.path()).env("PATH", &path);
            let output = sh.output().unwrap();
            (output.status.success(), String::from_utf8(output.stdout).unwrap())
        };
        assert_eq!(run(1000), (true, "at 0\nat 1\nat 2\n".into()));
        assert_eq!(run(0), (false, "last seen: at 0\n".into()));
    }
}
