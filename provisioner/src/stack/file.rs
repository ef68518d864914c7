//! `stack.toml` as it is written. Every key is optional to serde: what is missing is reported by the structure's check.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::labfile::At;

/// A stack.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// What the stack is, on one line.
    #[schemars(required, extend("examples" = ["Docker Engine"]))]
    pub description: Option<At<String>>,
    /// Roles whose nodes get it; all, unless given.
    #[schemars(extend("examples" = [["master", "worker"]]))]
    pub roles: Option<At<Vec<At<String>>>>,
    /// Where the software can come from, the default first.
    #[serde(default)]
    pub source: Vec<At<SourceTable>>,
    /// What can be set in the labfile.
    #[serde(default)]
    pub option: Vec<At<OptionTable>>,
    /// What is done, in this order.
    #[serde(default)]
    pub step: Vec<At<StepTable>>,
    /// Networks of its own, which the lab's and those of other stacks must not overlap.
    #[serde(default)]
    pub subnet: Vec<At<SubnetTable>>,
    /// Ports that it serves.
    #[serde(default)]
    pub port: Vec<At<PortTable>>,
    /// Files that its steps give and that people want to know, passwords for example.
    #[serde(default)]
    pub secret: Vec<At<SecretTable>>,
}

/// A source.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceTable {
    /// Its name.
    #[schemars(required, extend("examples" = ["debian"]))]
    pub name: Option<At<String>>,
    /// What it is.
    #[schemars(required, extend("examples" = ["Debian's archive"]))]
    pub description: Option<At<String>>,
    /// Stands for the first of these sources that the labfile's options are possible with and whose files of a bundle are
    /// all found; for the last one if none is.
    #[schemars(extend("examples" = [["bundle", "upstream"]]))]
    pub first_of: Option<At<Vec<At<String>>>>,
    /// What to tell someone who has not what it needs.
    #[schemars(extend("examples" = ["`make-bundle FOLDER` makes a bundle"]))]
    pub hint: Option<At<String>>,
}

/// An option. What it may be can differ from source to source: then there is one of the name for each.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptionTable {
    /// The key in the labfile: a-z, 0-9, `_` and `-`.
    #[schemars(required, extend("examples" = ["version"]))]
    pub name: Option<At<String>>,
    /// What it does.
    #[schemars(required, extend("examples" = ["Version to install"]))]
    pub description: Option<At<String>>,
    /// Its value, unless the labfile gives one; without a default it must.
    #[schemars(extend("examples" = ["1.36"]))]
    pub default: Option<At<String>>,
    /// Only with this source; with all, unless given.
    #[schemars(extend("examples" = ["upstream"]))]
    pub source: Option<At<String>>,
    /// Allowed values; any, unless given.
    #[schemars(extend("examples" = [["1.35", "1.36"]]))]
    pub values: Option<At<Vec<At<String>>>>,
    /// What a value looks like, `N` standing for any number.
    #[schemars(extend("examples" = ["1.N"]))]
    pub like: Option<At<String>>,
    /// Whether the labfile names a text file, relative to its folder, that scripts are given the text of.
    #[schemars(extend("examples" = [true]), extend("default" = false))]
    pub file: Option<At<bool>>,
    /// That the value is addresses: `own`, a network of the stack's; `lab`, networks and ranges (`FROM-TO`) of the lab's network,
    /// separated by commas, that no node has.
    #[schemars(extend("examples" = ["own"]))]
    pub addresses: Option<At<Addresses>>,
}

/// What addresses an option gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Addresses {
    /// A network of the stack's own.
    Own,
    /// Some of the lab's network.
    Lab,
}

/// A network of a stack's own.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SubnetTable {
    /// The network.
    #[schemars(required, extend("examples" = ["10.96.0.0/16"]))]
    pub subnet: Option<At<String>>,
    /// What has addresses there.
    #[schemars(required, extend("examples" = ["the services' addresses"]))]
    pub description: Option<At<String>>,
}

/// A step.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepTable {
    /// Its name.
    #[schemars(required, extend("examples" = ["install"]))]
    pub name: Option<At<String>>,
    /// `all`, or a role.
    #[schemars(extend("examples" = ["master"]), extend("default" = "all"))]
    pub on: Option<At<String>>,
    /// Only for this source; for all, unless given.
    #[schemars(extend("examples" = ["debian"]))]
    pub source: Option<At<String>>,
    /// `bake`: changes files only, the same way on every node, so its result can be kept. `leave`: when a node is removed
    /// by `lab destroy NODE`, on the nodes that stay. `run`: all else.
    #[schemars(required, extend("examples" = ["bake"]))]
    pub kind: Option<At<Kind>>,
    /// Of a step that is baked, by one of lab's own stacks: it installs packages and changes files, and needs no service that
    /// runs. Where nodes are slow it is run on the image's files, without a node.
    #[schemars(extend("default" = false))]
    pub chroot: Option<At<bool>>,
    /// The script's file, in the stack's folder.
    #[schemars(required, extend("examples" = ["install.sh"]))]
    pub script: Option<At<String>>,
    /// Shell condition that the node must come to meet after the script.
    #[schemars(extend("examples" = ["docker info"]))]
    pub ready: Option<At<String>>,
    /// How long the script may take, in seconds, on a machine with KVM.
    #[schemars(extend("examples" = [600]), range(min = 1, max = 7200), extend("default" = 600))]
    pub limit_s: Option<At<u32>>,
    /// How long it may take from there until `ready`, in seconds, on a machine with KVM.
    #[schemars(extend("examples" = [120]), range(min = 1, max = 7200), extend("default" = 120))]
    pub ready_limit_s: Option<At<u32>>,
    /// Earlier steps that must be done and ready on all their nodes first.
    #[schemars(extend("examples" = [["init"]]))]
    pub after: Option<At<Vec<At<String>>>>,
    /// Files of a bundle that the script finds in its folder `$LAB_STEP`; `{version}` stands for any version.
    #[schemars(extend("examples" = [["k8s-{version}-images.oci.tar.zst"]]))]
    pub bundle: Option<At<Vec<At<String>>>>,
    /// Text files of the stack's folder that the script finds in its folder `$LAB_STEP`.
    #[schemars(extend("examples" = [["server.conf"]]))]
    pub files: Option<At<Vec<At<String>>>>,
    /// Files that the script leaves in its folder `$LAB_STEP` for other steps; lab keeps them with the lab's secrets.
    #[schemars(extend("examples" = [["join.conf"]]))]
    pub gives: Option<At<Vec<At<String>>>>,
    /// Files that an earlier step gave, which the script finds in its folder `$LAB_STEP`.
    #[schemars(extend("examples" = [["join.conf"]]))]
    pub takes: Option<At<Vec<At<String>>>>,
}

/// When a step is run, and how its result is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum Kind {
    /// It changes files only, in the same way on every node: its result can be kept as a layer.
    Bake,
    /// It is run on each node.
    Run,
    /// It is run when another node is removed.
    Leave,
}

/// A port.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortTable {
    /// TCP port.
    #[schemars(required, extend("examples" = [6443]), range(min = 1, max = 65535))]
    pub port: Option<At<u16>>,
    /// `all`, or a role.
    #[schemars(extend("examples" = ["master"]), extend("default" = "all"))]
    pub on: Option<At<String>>,
    /// What listens there.
    #[schemars(required, extend("examples" = ["Kubernetes API"]))]
    pub description: Option<At<String>>,
}

/// A secret that is shown once.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretTable {
    /// The file, which a step `gives`: one line of text.
    #[schemars(required, extend("examples" = ["admin-password"]))]
    pub file: Option<At<String>>,
    /// What it is good for.
    #[schemars(required, extend("examples" = ["Grafana's password for admin"]))]
    pub description: Option<At<String>>,
}
