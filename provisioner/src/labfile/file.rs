//! A labfile as it is written. The doc comments of these types are what `lab schema` and its users' editors say, and
//! the schema made from them is what a labfile's structure is checked against, so that they cannot differ.
//!
//! Every key is optional to serde: what is missing or malformed is reported by [`super::shape`] and taken out, and
//! the rest is still checked.

use std::{collections::BTreeMap, ops::Range};

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

/// A value, and where in the file it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct At<T>(pub Spanned<T>);

impl<T> At<T> {
    /// The value.
    pub fn get(&self) -> &T {
        self.0.get_ref()
    }

    /// Its place: bytes of the file.
    pub fn span(&self) -> Range<usize> {
        self.0.span()
    }
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

/// A lab: virtual machines, the network between them, and what is installed inside.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "labfile")]
pub struct File {
    /// Name of the lab: 1 to 31 of a-z, 0-9 and `-`, the first not `-`. A user's labs have different names.
    #[schemars(required, extend("examples" = ["docker"]), regex(pattern = "^[a-z0-9][a-z0-9-]{0,30}$"))]
    pub name: Option<At<String>>,
    /// Image that nodes start from; `lab image ls` lists what there is.
    #[schemars(extend("examples" = ["debian-13"]), extend("default" = "debian-13"))]
    pub image: Option<At<String>>,
    /// The lab's network. It exists only inside the lab, so any subnet will do.
    #[serde(default)]
    pub network: NetworkTable,
    /// The nodes, by name. A name with `{n}` stands for `count` nodes, numbered from 1.
    #[serde(default)]
    pub node: BTreeMap<At<String>, NodeTable>,
    /// Software to install, by the name of its stack: lab's own, or a folder of `stacks/` beside the labfile.
    #[serde(default)]
    pub stack: BTreeMap<At<String>, StackTable>,
    /// Your own provisioning, run in this order after the stacks.
    #[serde(default)]
    #[schemars(length(max = 250))]
    pub step: Vec<At<StepTable>>,
    /// Tests of the finished lab, for `lab check`.
    #[serde(default)]
    #[schemars(length(max = 250))]
    pub check: Vec<At<CheckTable>>,
}

/// The lab's network.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkTable {
    /// Addresses of the lab: an IPv4 network and the length of its prefix, 8 to 29.
    #[schemars(extend("examples" = ["192.168.1.0/24"]), extend("default" = "192.168.100.0/24"))]
    pub subnet: Option<At<String>>,
    /// Address of the gateway (router, DHCP, DNS); the subnet's first address, unless given.
    #[schemars(extend("examples" = ["192.168.1.1"]))]
    pub gateway: Option<At<String>>,
}

/// A node, or several of the same kind.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeTable {
    /// `master`, `worker`, or a role of your own. Without one a node is a worker; where the file names no master, the
    /// first node without a role is it.
    #[schemars(extend("examples" = ["worker"]))]
    pub role: Option<At<String>>,
    /// How many nodes this is; the table's name then holds `{n}`.
    #[schemars(extend("examples" = [3]), range(min = 1, max = 250), extend("default" = 1))]
    pub count: Option<At<u8>>,
    /// Address in the lab's subnet, with a count the first one of consecutive addresses. Without one, the next free
    /// address from .10 on.
    #[schemars(extend("examples" = ["192.168.1.10"]))]
    pub ip: Option<At<String>>,
    /// MAC address; made from the lab's and the node's names, unless given.
    #[schemars(extend("examples" = ["52:54:00:12:34:56"]))]
    pub mac: Option<At<String>>,
    /// Image of this node; the lab's, unless given.
    #[schemars(extend("examples" = ["debian-13"]))]
    pub image: Option<At<String>>,
    /// Virtual CPUs.
    #[schemars(extend("examples" = [2]), range(min = 1, max = 32), extend("default" = 1))]
    pub cpus: Option<At<u8>>,
    /// Whether the node can run virtual machines of its own (`/dev/kvm`).
    #[schemars(extend("examples" = [true]), extend("default" = false))]
    pub nested: Option<At<bool>>,
    /// Memory: 64MiB to 64GiB.
    #[schemars(extend("examples" = ["2GiB"]), extend("default" = "1GiB"))]
    pub memory: Option<At<String>>,
    /// Size of the root disk, 64MiB to 16TiB. It takes space only as it fills.
    #[schemars(extend("examples" = ["20GiB"]), extend("default" = "10GiB"))]
    pub disk: Option<At<String>>,
    /// Sizes of further, empty disks (/dev/vdb, /dev/vdc, …), at most 16.
    #[schemars(extend("examples" = [["10GiB"]]), length(max = 16))]
    pub disks: Option<At<Vec<At<String>>>>,
    /// Ports of the host that lead into the lab: `[BIND_IP:]HOST_PORT:[GUEST_IP:]GUEST_PORT[/udp]`; ports may be
    /// ranges `a-b`. BIND_IP is 127.0.0.1 and GUEST_IP is the node's own address, unless given. With a count, each
    /// further node takes the next host ports.
    #[schemars(extend("examples" = [["8080:80"]]), length(max = 1024))]
    pub forward: Option<At<Vec<At<String>>>>,
}

/// Use of a stack: `source`, and the stack's own options.
pub type StackTable = BTreeMap<At<String>, At<OptionValue>>;

/// Value of a stack's option.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum OptionValue {
    /// A text.
    Text(String),
    /// A whole number.
    Number(i64),
    /// `true` or `false`.
    Switch(bool),
}

impl std::fmt::Display for OptionValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Switch(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// A step of your own provisioning.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepTable {
    /// Its name; no two steps have the same one.
    #[schemars(required, extend("examples" = ["motd"]))]
    pub name: Option<At<String>>,
    /// Where it runs: a node, a role, or `all`.
    #[schemars(extend("examples" = ["worker"]), extend("default" = "all"))]
    pub on: Option<At<String>>,
    /// Shell script (`/bin/sh -e`), run as root. Either this or `script`.
    #[schemars(extend("examples" = ["echo hello > /etc/motd"]))]
    pub run: Option<At<String>>,
    /// File with the script, its path relative to the labfile's folder; one that begins `#!` is run as it says.
    #[schemars(extend("examples" = ["motd.sh"]))]
    pub script: Option<At<String>>,
    /// Files and folders, their paths relative to the labfile's folder, that the script finds in `$LAB_STEP` while it
    /// runs.
    #[schemars(extend("examples" = [["app"]]))]
    pub files: Option<At<Vec<At<String>>>>,
    /// Whether it changes files only, in the same way on every node: it is then run once, before all that is not baked,
    /// and its result is kept in a layer.
    #[schemars(extend("examples" = [true]), extend("default" = false))]
    pub bake: Option<At<bool>>,
}

/// A test of the finished lab.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckTable {
    /// What is checked, as a sentence; no two checks have the same one.
    #[schemars(required, extend("examples" = ["docker runs on every node"]))]
    pub name: Option<At<String>>,
    /// Where it runs: a node, a role, or `all`; it must succeed on each of these nodes.
    #[schemars(extend("examples" = ["master"]), extend("default" = "all"))]
    pub on: Option<At<String>>,
    /// Shell script (`/bin/sh -e`), run as root: status 0 is success. Either this or `script`.
    #[schemars(extend("examples" = ["docker info"]))]
    pub run: Option<At<String>>,
    /// File with the script, its path relative to the labfile's folder; one that begins `#!` is run as it says.
    #[schemars(extend("examples" = ["check.sh"]))]
    pub script: Option<At<String>>,
    /// What to tell someone whose lab fails it.
    #[schemars(extend("examples" = ["systemctl status docker"]))]
    pub hint: Option<At<String>>,
}
