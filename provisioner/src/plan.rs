//! The plan: what an `up` has to do, as data, and what runs it. Actions that don't depend on each other run at the same
//! time.

use std::sync::mpsc;

use serde::Serialize;

use crate::{
    actions::{self, Action},
    lab::Lab,
};

/// An action and its place in the plan.
pub struct Planned {
    /// The node that it is for; `None` if it is for the whole lab.
    pub node: Option<String>,
    /// What it does.
    pub action: Box<dyn Action>,
    /// Indices of the actions that must have succeeded before.
    pub after: Vec<usize>,
}

/// What an `up` has to do, in an order in which it could be done one by one.
#[derive(Default)]
pub struct Plan {
    /// The actions.
    pub items: Vec<Planned>,
}

/// A plan's action as it is printed.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its number, from 1.
    pub number: usize,
    /// The node that it is for.
    pub node: Option<String>,
    /// What it does.
    pub action: String,
    /// Whether there is nothing left to do.
    pub done: bool,
    /// How it is: `done`, `to do`; of a layer `cached`, `not needed`; of a step that a layer has or will have
    /// `in its layer`.
    pub state: &'static str,
    /// Numbers of the actions that it waits for.
    pub after: Vec<usize>,
}

/// What came of a plan.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Actions that did something.
    pub changed: usize,
    /// Actions that failed: for whom, and why.
    pub failures: Vec<(String, actions::Error)>,
    /// Actions that could not be tried since another one had failed.
    pub skipped: usize,
}

impl Plan {
    /// Adds an action; returns its index for others to wait for.
    pub fn add(&mut self, node: Option<&str>, action: Box<dyn Action>, after: Vec<usize>) -> usize {
        self.items.push(Planned { node: node.map(Into::into), action, after });
        self.items.len() - 1
    }

    /// The plan as it is printed, and what of it is done already.
    pub fn entries(&self, lab: &Lab) -> Result<Vec<Entry>, actions::Error> {
        let entry = |(index, item): (usize, &Planned)| {
            Ok(Entry {
                number: index + 1,
                node: item.node.clone(),
                action: item.action.describe(),
                done: item.action.is_done(lab)?,
                state: item.action.state(lab)?,
                after: item.after.iter().map(|index| index + 1).collect(),
            })
        };
        self.items.iter().enumerate().map(entry).collect()
    }

    /// Runs all actions that are not done, each as soon as those before it have succeeded. A failure stops only what
    /// waits for it.
    pub fn run(&self, lab: &Lab) -> Outcome {
        #[derive(Clone, Copy, PartialEq)]
        enum State {
            Waiting,
            Running,
            Succeeded,
            Failed,
        }
        let mut states = vec![State::Waiting; self.items.len()];
        let mut outcome = Outcome::default();
        let (ended, ends) = mpsc::channel::<(usize, Result<bool, actions::Error>)>();
        std::thread::scope(|scope| {
            loop {
                for (index, item) in self.items.iter().enumerate() {
                    if states[index] != State::Waiting {
                        continue;
                    }
                    if item.after.iter().any(|&before| states[before] == State::Failed) {
                        states[index] = State::Failed;
                        outcome.skipped += 1;
                    } else if item.after.iter().all(|&before| states[before] == State::Succeeded) {
                        states[index] = State::Running;
                        let ended = ended.clone();
                        scope.spawn(move || drop(ended.send((index, run_one(item, lab)))));
                    }
                }
                if !states.contains(&State::Running) {
                    break;
                }
                let Ok((index, result)) = ends.recv() else { break };
                match result {
                    Ok(changed) => {
                        states[index] = State::Succeeded;
                        outcome.changed += usize::from(changed);
                    }
                    Err(error) => {
                        states[index] = State::Failed;
                        let subject =
                            self.items[index].node.clone().unwrap_or_else(|| lab.topology.name.clone());
                        outcome.failures.push((subject, error));
                    }
                }
            }
        });
        outcome
    }
}

/// Runs an action unless it is done; tells whether it did something.
pub fn run_one(item: &Planned, lab: &Lab) -> Result<bool, actions::Error> {
    if item.action.is_done(lab)? {
        return Ok(false);
    }
    let subject = item.node.as_deref().unwrap_or(&lab.topology.name);
    let task = lab.progress.begin(subject, &item.action.describe());
    match item.action.run(lab, &task) {
        Ok(()) => {
            task.done();
            Ok(true)
        }
        Err(error) => {
            task.failed();
            Err(error)
        }
    }
}
