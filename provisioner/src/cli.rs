//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Brings up a lab of virtual machines from one file.
#[derive(Debug, Parser)]
#[command(name = "lab", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What all commands take.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The labfile [default: lab.toml here or in a parent folder]
    #[arg(short, long, global = true, env = "LAB_FILE", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Machine that labs run on: local or emulated [default: local where KVM works, else emulated]
    #[arg(long, global = true, env = "LAB_HOST", value_name = "HOST")]
    pub host: Option<String>,
    /// Work on this fork of the lab
    #[arg(long, global = true, env = "LAB_FORK", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=400))]
    pub fork: Option<u32>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text, value_name = "FORMAT")]
    pub output: Output,
    /// Tell nothing but results and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a labfile to start from
    Init {
        /// Example to copy
        #[arg(long, value_name = "NAME", default_value = crate::labfile::templates::DEFAULT)]
        from: String,
        /// List the examples
        #[arg(long)]
        list: bool,
    },
    /// Check the labfile
    Validate,
    /// Show what `up` would do
    Plan,
    /// Bring the lab up, or what is missing of it
    Up {
        /// Do all of it, even if a snapshot of an earlier up would do
        #[arg(long)]
        fresh: bool,
        /// Only if all that the lab is made from is as `lab.lock` says
        #[arg(long, conflicts_with = "fork")]
        locked: bool,
        /// From a bundle that `lab bundle build` has made: nothing is built or fetched
        #[arg(long, value_name = "BUNDLE")]
        offline: Option<PathBuf>,
    },
    /// Show the nodes of the lab
    Status,
    /// List all labs
    Ls {
        /// With the memory and space that each really takes
        #[arg(long)]
        size: bool,
    },
    /// Open a terminal in a node
    Ssh {
        /// The node [default: the first]
        node: Option<String>,
        /// Command to run there instead of a shell
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run a command in a node; its input, output and exit status pass
    Exec {
        /// In all forks of the lab, at the same time; without input
        #[arg(long, conflicts_with = "fork")]
        all_forks: bool,
        /// The node
        node: String,
        /// Command and arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy files and folders into, out of or between nodes (NODE:PATH)
    Cp {
        /// From where
        #[arg(required = true)]
        from: Vec<String>,
        /// To where
        to: String,
    },
    /// Show a node's console output, or another log
    Logs {
        /// The node, or `net` for the lab's network
        node: String,
        /// Log of the machine's process instead of the console's output
        #[arg(long)]
        vmm: bool,
        /// Wait for more
        #[arg(long)]
        follow: bool,
    },
    /// Type at a node's console; Ctrl-] leaves it
    Console {
        /// The node [default: the first]
        node: Option<String>,
    },
    /// Run the steps of stacks and of the labfile again
    Provision {
        /// Only these nodes
        nodes: Vec<String>,
        /// Only the step of this name
        #[arg(long)]
        step: Option<String>,
    },
    /// Run the labfile's checks
    Check {
        /// Only the check of this name
        name: Option<String>,
        /// Print the results as JUnit XML, which CI systems read
        #[arg(long)]
        junit: bool,
    },
    /// Power nodes off; without names, the whole lab
    #[command(alias = "down")]
    Halt {
        /// Only these nodes
        nodes: Vec<String>,
        /// Pull the plug instead
        #[arg(long)]
        force: bool,
    },
    /// Power nodes off and bring them up again
    Restart {
        /// Only these nodes
        nodes: Vec<String>,
        /// Pull the plug instead of pressing the power button
        #[arg(long)]
        force: bool,
    },
    /// Remove nodes with their disks; without names, the whole lab
    Destroy {
        /// Only these nodes
        nodes: Vec<String>,
        /// Don't ask
        #[arg(short, long, overrides_with = "yes")]
        yes: bool,
        /// All forks of the lab, not the lab itself
        #[arg(long, conflicts_with_all = ["fork", "nodes", "forget"])]
        all_forks: bool,
        /// Remove the snapshot that the next `up` would start from, too
        #[arg(long)]
        forget: bool,
    },
    /// List, add or remove forwarded ports
    Forward {
        /// What to do [default: list]
        #[command(subcommand)]
        action: Option<ForwardAction>,
    },
    /// What baked steps have made, kept for the next nodes
    Layer {
        /// What to do
        #[command(subcommand)]
        action: LayerAction,
    },
    /// Let the holder of an SSH key into a node, at a port of this machine
    Share {
        /// The node [default: the first]
        node: Option<String>,
        /// File with their public key
        #[arg(long, value_name = "FILE")]
        key: std::path::PathBuf,
    },
    /// Add the lab's Kubernetes cluster to your kubeconfig, as the context `lab-NAME`
    Kubeconfig {
        /// Print it instead
        #[arg(long)]
        print: bool,
    },
    /// Print a configuration for OpenSSH with all nodes
    SshConfig,
    /// Put the running lab away, to go on later where it was, even after a reboot of this machine
    Suspend,
    /// Go on with a suspended lab
    Resume,
    /// Make copies of a snapshot that run beside the lab and each other
    Fork {
        /// The snapshot
        snapshot: String,
        /// How many there are to be; those that are there count
        #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=400))]
        count: u32,
    },
    /// Save the whole running lab, and bring it back
    Snapshot {
        /// What to do
        #[command(subcommand)]
        action: SnapshotAction,
    },
    /// Put all that `up` would fetch or build into one file, for machines without a network
    Bundle {
        /// What to do
        #[command(subcommand)]
        action: BundleAction,
    },
    /// Work with images
    Image {
        /// What to do
        #[command(subcommand)]
        action: ImageAction,
    },
    /// Work with the machine that labs run on
    Host {
        /// What to do
        #[command(subcommand)]
        action: HostAction,
    },
    /// Find out what this machine can do, and what is missing
    Doctor,
    /// Print the labfile's JSON Schema
    Schema,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Connect standard input and output with a node's SSH server
    #[command(hide = true)]
    Proxy {
        /// The lab
        lab: String,
        /// The node
        node: String,
    },
}

/// What can be done with layers.
#[derive(Debug, Subcommand)]
pub enum LayerAction {
    /// List the layers
    Ls,
    /// Remove layers, with those that stand on them
    Rm {
        /// Keys, or their first letters
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Remove the layers that nothing stands on
    Prune,
}

/// What can be done with forwards.
#[derive(Debug, Subcommand)]
pub enum ForwardAction {
    /// List the forwards
    Ls,
    /// Add a forward: `[BIND_IP:]HOST_PORT:[GUEST_IP:]GUEST_PORT[/udp]`
    Add {
        /// The node
        node: String,
        /// The forward
        forward: String,
    },
    /// Remove a forward that was added
    Rm {
        /// Its port on the host
        host_port: u16,
    },
}

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotAction {
    /// Save all nodes, running, at one instant
    Save {
        /// Name of the snapshot
        name: String,
    },
    /// Bring the lab back to a snapshot; what it is now is lost
    Restore {
        /// The snapshot
        name: String,
    },
    /// List the snapshots
    Ls,
    /// Write a snapshot to a file, with all that another machine needs to go on with it
    Export {
        /// The snapshot
        name: String,
        /// The file
        #[arg(value_name = "FILE")]
        path: PathBuf,
    },
    /// Make a lab with a snapshot from such a file
    Import {
        /// The file
        #[arg(value_name = "FILE")]
        path: PathBuf,
        /// Folder for the labfile [default: a new one called as the lab]
        folder: Option<PathBuf>,
    },
    /// Remove snapshots
    Rm {
        /// The snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// What can be done with bundles.
#[derive(Debug, Subcommand)]
pub enum BundleAction {
    /// Make the bundle of a labfile
    Build {
        /// The labfile [default: that of -f, or lab.toml here or in a parent folder]
        labfile: Option<PathBuf>,
        /// The file [default: NAME.labbundle here]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
}

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub enum ImageAction {
    /// List the images
    Ls,
    /// Build an image
    Build {
        /// Name of a definition of lab's, or path of one of yours
        #[arg(required = true)]
        names: Vec<String>,
        /// Even if there is one already
        #[arg(long)]
        force: bool,
    },
    /// Import a distribution's cloud image (raw or qcow2)
    Import {
        /// Name for it
        name: String,
        /// The image
        path: PathBuf,
    },
    /// Check the digests of an image's files
    Verify {
        /// The image
        name: String,
    },
    /// Remove images
    Rm {
        /// The images
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Put a container image into the registry of the running lab
    Push {
        /// An archive of `docker save` or an OCI archive; or the name of an image that this machine's Docker has
        image: String,
        /// Its name in the registry [default: the one that it has]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
}

/// What can be done with the emulated host.
#[derive(Debug, Subcommand)]
pub enum HostAction {
    /// Show which host is used, and how it is
    Status,
    /// Start the emulated host
    Start {
        /// For nodes that don't boot without it: x86-64-v3. Encryption and digests are several times slower then
        #[arg(long)]
        avx2: bool,
    },
    /// Stop the emulated host
    Stop {
        /// Even if labs run in it: they are ended as by pulling their plugs
        #[arg(long)]
        force: bool,
    },
    /// Run a command in the emulated host
    Exec {
        /// Command and arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_command_is_not_the_labfile() {
        for words in [&["export", "one", "out"][..], &["import", "in"], &["import", "in", "folder"]] {
            let cli = Cli::parse_from(["lab", "snapshot"].iter().chain(words));
            assert_eq!(cli.global.file, std::env::var_os("LAB_FILE").map(PathBuf::from), "{words:?}");
        }
    }
}
