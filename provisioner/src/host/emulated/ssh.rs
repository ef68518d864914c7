//! The system's OpenSSH client, as the carrier of standard input and output into the emulated host.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Error, State, files::Files, init, keys, request::runtime_folder, tools};

/// The SSH client, up to the command. All of them share one connection, whose making costs the emulated processor a
/// second.
pub fn client(files: &Files, state: &State, terminal: bool) -> Result<Command, Error> {
    let program = tools::find("ssh").ok_or(tools::Error::Missing("ssh"))?;
    let mut command = Command::new(program);
    let option = |name: &str, value: &dyn std::fmt::Display| format!("-o{name}={value}");
    let path = |path: PathBuf| escaped(&path);
    command
        .args(["-F", "none", "-e", "none", if terminal { "-tt" } else { "-T" }, "-p"])
        .arg(state.ssh_port.to_string())
        .arg(option("IdentityFile", &path(files.key())))
        .arg(option("UserKnownHostsFile", &path(files.known_hosts())))
        .arg(option("GlobalKnownHostsFile", &"none"))
        .arg(option("HostKeyAlias", &keys::HOST_ALIAS))
        .arg(option("HostKeyAlgorithms", &"ssh-ed25519"))
        .arg(option("StrictHostKeyChecking", &"yes"))
        .arg(option("UpdateHostKeys", &"no"))
        .arg(option("IdentitiesOnly", &"yes"))
        .arg(option("IdentityAgent", &"none"))
        .arg(option("PreferredAuthentications", &"publickey"))
        .arg(option("KexAlgorithms", &"curve25519-sha256"))
        .arg(option("BatchMode", &"yes"))
        .arg(option("LogLevel", &"QUIET"))
        .arg(option("ConnectTimeout", &20))
        .arg(option("ServerAliveInterval", &30))
        .arg(option("ControlMaster", &"auto"))
        .arg(option("ControlPath", &path(files.ssh_socket())))
        .arg(option("ControlPersist", &"yes"))
        .arg(format!("{}@127.0.0.1", init::USER));
    Ok(command)
}

/// A path in an option of ssh(1), where `%` begins a token and spaces separate files.
fn escaped(path: &Path) -> String {
    let text = path.display().to_string().replace('%', "%%");
    if text.contains(' ') { format!("\"{text}\"") } else { text }
}

/// The command line for the shell in there that runs this `lab` with arguments of its own.
pub fn command_line(files: &Files, arguments: &[&OsStr]) -> Result<OsString, Error> {
    let lab = std::env::current_exe()
        .map_err(|source| Error::Io { what: "cannot find the lab binary".into(), source })?;
    let mut line = OsString::from("export LAB_HOME=");
    line.push(quoted(files.home.as_os_str()));
    line.push(format!(" XDG_RUNTIME_DIR={}; exec", runtime_folder()));
    for word in [lab.as_os_str()].iter().chain(arguments) {
        line.push(" ");
        line.push(quoted(word));
    }
    Ok(line)
}

/// A word as the shell reads it.
fn quoted(word: &OsStr) -> OsString {
    let mut bytes = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => bytes.extend(b"'\\''"),
            byte => bytes.push(*byte),
        }
    }
    bytes.push(b'\'');
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME; \"x\" \\ *";
        let mut script = OsString::from("printf %s ");
        script.push(quoted(word.as_ref()));
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
    }

    #[test]
    fn a_home_of_any_name_is_one_to_ssh() {
        let home = PathBuf::from("/a home of %d, too");
        let files = Files { dir: home.join("host"), sockets: "/run/x".into(), home };
        let state = State { v: 1, pid: 1, ssh_port: 1, cpus: 1, memory_mib: 1, by_hand: false };
        let mut ssh = client(&files, &state, false).unwrap();
        let output = ssh.arg("-G").output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap().replace("%%", "%");
        for option in ["identityfile", "userknownhostsfile"] {
            let line = said.lines().find(|line| line.starts_with(option)).unwrap();
            assert!(line.contains("/a home of %d, too/host/"), "{line}");
        }
    }

    #[test]
    fn options_of_ssh_hold_any_path() {
        assert_eq!(escaped(Path::new("/a/b")), "/a/b");
        assert_eq!(escaped(Path::new("/a b/100%")), "\"/a b/100%%\"");
    }
}
