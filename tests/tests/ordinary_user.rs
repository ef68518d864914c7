//! A lab of a user who has no right but the group of /dev/kvm: CI runs all other tests as root.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use lab_tests::{OtherHome, output, program, text};

/// Number and group of a user that no machine has.
const USER: u32 = 31999;

/// Goes on as that user, who is there in this mount namespace alone. `$1` is his folder, `$2` what he runs.
const BECOME: &str = r#"
set -e
for file in passwd group subuid subgid; do cp "/etc/$file" "$1/$file"; done
echo "lab-user:x:31999:31999::$1/home:/bin/sh" >>"$1/passwd"
echo "lab-user:x:31999:" >>"$1/group"
echo "lab-user:500000000:65536" | tee -a "$1/subuid" >>"$1/subgid"
for file in passwd group subuid subgid; do mount --bind "$1/$file" "/etc/$file"; done
groups=--clear-groups
if [ -e /dev/kvm ] && [ "$(stat -c %g /dev/kvm)" != 0 ]; then groups="--groups $(stat -c %g /dev/kvm)"; fi
export HOME="$1/home" USER=lab-user LAB_HOME="$1" PATH="$1/bin:$PATH"
unset XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_DATA_HOME XDG_CONFIG_HOME LOGNAME SUDO_UID
cd "$HOME"
exec setpriv --reuid 31999 --regid 31999 $groups --inh-caps=-all sh -ec "$2"
"#;

/// What he does.
const USES: &str = r#"
[ "$(id -u)" = 31999 ]
printf 'name = "mine"\nimage = "tiny"\n[node.a]\nmemory = "128MiB"\n' >lab.toml
lab doctor
lab image build tiny
lab up
[ "$(lab exec a hostname)" = a ]
date >file
lab cp file a:/tmp/file
lab cp a:/tmp/file back
cmp file back
lab snapshot save one
lab exec a rm /tmp/file
lab snapshot restore one
lab exec a cat /tmp/file | cmp - file
lab fork one
[ "$(lab -f lab.toml ls | grep -c '1 of 1')" = 2 ]
lab destroy --yes --all-forks
# From another environment, as of a job of cron's.
XDG_RUNTIME_DIR=$HOME lab exec a true
lab destroy --yes --forget
"#;

/// The file of a program that is not where every user looks, if it is one of this user's alone.
fn virtiofsd() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".cache"))
    })?;
    let built = fs::read_dir(cache.join("lab")).ok()?.flatten();
    built.map(|entry| entry.path().join("bin/virtiofsd")).find(|path| path.exists())
}

#[test]
fn a_lab_of_an_ordinary_user() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: an ordinary user's lab: this user is one already, in all tests");
        return;
    }
    if !Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: an ordinary user's lab: this root may not have a mount namespace");
        return;
    }
    let home = OtherHome::new();
    let folder = home.path();
    let own = |path: &Path| chown(path, Some(USER), Some(USER)).unwrap();
    own(folder);
    for name in ["home", "bin"] {
        fs::create_dir(folder.join(name)).unwrap();
        own(&folder.join(name));
    }
    // The repository may be where only root can go.
    let built = program();
    let mut programs: Vec<PathBuf> =
        ["lab", "lab-vmm", "lab-net"].iter().map(|name| built.with_file_name(name)).collect();
    programs.extend(virtiofsd());
    for program in programs {
        let copy = folder.join("bin").join(program.file_name().unwrap());
        fs::copy(&program, &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", BECOME, "become"]).arg(folder).arg(USES);
    let used = output(command, b"");
    assert!(used.status.success(), "{}", text(&used));
}
