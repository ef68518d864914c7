//! A Kubernetes cluster in a lab, asked by kubectl on its master.

use std::time::Duration;

use super::{TestLab, waiting::Waiting};

/// How long a cluster may take for one thing.
const LIMIT: Duration = Duration::from_secs(1500);
/// How often it is asked: on emulated processors it has better things to do than to answer.
const PAUSE: Duration = Duration::from_secs(5);

/// A lab whose master has kubectl.
pub struct Cluster {
    /// The lab.
    pub lab: TestLab,
}

impl Cluster {
    /// Runs a shell command on the master; what it wrote.
    pub fn master(&self, script: &str) -> String {
        let (status, said) = self.lab.shell("master", script, b"");
        assert_eq!(status, Some(0), "{script}: {said}");
        said.trim().into()
    }

    /// Runs kubectl on the master. One that is turned away by a busy API server is run again.
    pub fn kubectl(&self, arguments: &str) -> String {
        self.master(&format!(
            "for left in 4 3 2 1 0; do kubectl {arguments} && exit; [ $left = 0 ] || echo again >&2; done; exit 1"
        ))
    }

    /// Waits until what is tried no longer says what is wrong.
    pub fn until(&self, what: &str, mut tried: impl FnMut() -> Result<(), String>) {
        let mut waiting = Waiting::new(what, LIMIT);
        while let Err(said) = tried() {
            let pods = || self.lab.shell("master", "kubectl get nodes,pods -A -o wide 2>&1", b"").1;
            assert!(!waiting.is_over(&said), "{what}: {said}\n{}", pods());
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Waits until a shell condition on the master holds.
    pub fn until_holds(&self, what: &str, condition: &str) {
        self.until(what, || match self.lab.shell("master", condition, b"") {
            (Some(0), _) => Ok(()),
            (_, said) => Err(said),
        });
    }
}

/// The lab of labfiles/kubernetes.toml under another name, with other ports of this machine for its application and its
/// API server.
pub fn example(name: &str, web: u16, api: u16) -> TestLab {
    TestLab::example("kubernetes.toml", |text| {
        let text = text.replacen("name = \"kubernetes\"", &format!("name = \"{name}\""), 1);
        assert!(text.contains("\"8080:") && text.contains("\"6443:"));
        text.replace("\"8080:", &format!("\"{web}:")).replace("\"6443:", &format!("\"{api}:"))
    })
}

/// Whether there is a bundle for a cluster; says what is missing.
pub fn can_be_had(what: &str) -> bool {
    let there = std::env::var_os("LAB_BUNDLES").is_some_and(|folders| !folders.is_empty());
    if !there {
        eprintln!("SKIPPED: {what}: LAB_BUNDLES names no folder with a bundle (docs/bundles.md)");
    }
    there
}
