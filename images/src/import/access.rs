//! What a node of an imported image needs so that it can be entered: cloud-init for its keys, and an SSH server.

use super::filesystem::FileSystem;

const CLOUD_INIT: [&str; 2] = ["/usr/bin/cloud-init", "/usr/local/bin/cloud-init"];
/// With this file, cloud-init does nothing.
const DISABLED: &str = "/etc/cloud/cloud-init.disabled";
const SSH: [&str; 4] = ["/usr/sbin/sshd", "/usr/bin/sshd", "/usr/local/sbin/sshd", "/usr/sbin/dropbear"];

/// What seems to be missing in the system with this root, a sentence each. It is no error: programs may lie elsewhere, and
/// keys may be in the image.
pub(super) fn warnings(root: &FileSystem) -> Vec<String> {
    let has = |paths: &[&str]| paths.iter().any(|path| root.exists(path));
    let mut warnings = Vec::new();
    if !has(&CLOUD_INIT) {
        warnings.push(
            "it seems to have no cloud-init, by which nodes get their names and keys: `lab up` may wait for them in vain. \
             Install cloud-init in it and import it again"
                .into(),
        );
    } else if root.exists(DISABLED) {
        warnings.push(format!(
            "cloud-init, by which nodes get their names and keys, is disabled in it: remove {DISABLED} in it and import it \
             again"
        ));
    }
    if !has(&SSH) {
        warnings.push(
            "it seems to have no SSH server, by which nodes are entered: `lab up` may wait for them in vain. Install \
             openssh-server in it and import it again"
                .into(),
        );
    }
    warnings
}
