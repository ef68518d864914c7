//! The way into a node: OpenSSH over vsock, or over TCP through `lab-net` for images that don't listen on vsock.

use std::{
    io::{self, Read},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lab_images::manifest::SshTransport;

use crate::{child, clock, control, json_file, paths::LabPaths, proxy};

/// Port of the SSH server in every node.
const SSH_PORT: u16 = 22;
/// How long a machine may take until it can be asked how it is, after a reset.
const RESET_LIMIT: Duration = Duration::from_secs(60);
/// How long a node that boots may take to run a command, before it is asked anew.
const ANSWER_LIMIT: Duration = Duration::from_secs(90);
/// How far the clocks of two processes may be apart.
const CLOCK: Duration = Duration::from_secs(2);
/// How long an idle connection to a node is kept for the next command.
const CONTROL_PERSIST_S: u32 = 600;

/// Why a node cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection can't be made.
    #[error(
        "{node} cannot be reached: {reason} (is it running? `lab status` tells; `lab console {node}` shows its console)"
    )]
    Unreachable {
        /// The node.
        node: String,
        /// What was seen.
        reason: String,
    },
    /// A tool of OpenSSH's is missing or failed.
    #[error("cannot run {tool}: {source} (it is in Debian's package openssh-client)")]
    Tool {
        /// `ssh` or `ssh-keygen`.
        tool: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A key could not be made.
    #[error("ssh-keygen made no key in {path}: {reason}")]
    Key {
        /// The key's file.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// A file of lab's own.
    #[error(transparent)]
    File(#[from] json_file::Error),
}

/// Makes an ed25519 key pair at `path` unless there is one; returns the public key's line (`ssh-ed25519 AAAA…`).
pub fn ensure_key(path: &Path) -> Result<String, Error> {
    let public = path.with_extension("pub");
    if !path.exists() || !public.exists() {
        let dir = tempfile::tempdir_in(path.parent().unwrap_or(Path::new(".")))
            .map_err(|source| Error::Tool { tool: "ssh-keygen", source })?;
        let new = dir.path().join("key");
        let output = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
            .arg(&new)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| Error::Tool { tool: "ssh-keygen", source })?;
        // The public half first: a key counts as made when both are there.
        let moved =
            std::fs::rename(new.with_extension("pub"), &public).and_then(|()| std::fs::rename(&new, path));
        if !output.status.success() || moved.is_err() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(Error::Key { path: path.into(), reason });
        }
    }
    let line = std::fs::read_to_string(&public).map_err(|source| json_file::Error::Io {
        action: "read",
        path: public,
        source,
    })?;
    Ok(line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

/// Whether an `ssh` ended because its connection did, as far as that can be told: with a status that a command may have,
/// too.
pub fn lost(outcome: &child::Outcome) -> bool {
    outcome.status.is_some_and(|status| status.code() == Some(255))
}

/// Runs the shell script on standard input, in the node. The script goes into a file, since what it runs may read
/// standard input. `sync`: a step that is recorded as done must be on the disk, whatever ends the machine.
///
/// A process that the script leaves behind holds its output open, and SSH would wait for that, too: so the output ends at
/// a line of ours behind the script's end, and what is written later is read by somebody, and thrown away. Lines are
/// passed on as they come by GNU's sed, and by BusyBox's awk, whose sed cannot; mawk waits for a full buffer.
const RUN_SCRIPT: &str = r#"
d=$(mktemp -d) && cat >"$d/script" && mkfifo "$d/output" || exit
{
    if sed -u q </dev/null 2>/dev/null; then
        sed -un "\\|$d/end\$|{s|||;/./p;q};p"
    else
        awk -v end="$d/end" '
            { at = length($0) - length(end) + 1 }
            at > 0 && substr($0, at) == end { if (at > 1) print substr($0, 1, at - 1); exit }
            { print; fflush() }'
    fi
    exec cat >/dev/null 2>&1
} <"$d/output" &
exec 3>"$d/output"
/bin/sh -e "$d/script" </dev/null >&3 2>&1 3>&-
s=$?
echo "$d/end" >&3
exec 3>&-
rm -rf "$d"
sync
exit "$s"
"#;

/// The way into one node.
#[derive(Debug, Clone)]
pub struct Channel {
    lab: String,
    node: String,
    paths: LabPaths,
}

impl Channel {
    /// The way into `node` of `lab`.
    pub fn new(paths: &LabPaths, lab: &str, node: &str) -> Self {
        Self { lab: lab.into(), node: node.into(), paths: paths.clone() }
    }

    /// OpenSSH options, as `KEY VALUE` pairs, that lead into the node. `shared`: connections are kept for the next
    /// command.
    pub fn options(&self, program: &Path, shared: bool) -> Vec<(&'static str, String)> {
        let mut proxy = format!("{} proxy {} {}", quote(&program.to_string_lossy()), self.lab, self.node);
        if let Some(home) = std::env::var_os("LAB_HOME") {
            // For whoever reads a file of these options later, somewhere else.
            proxy = format!("env {} {proxy}", quote(&format!("LAB_HOME={}", home.to_string_lossy())));
        }
        let mut options = vec![
            ("User", "root".into()),
            ("HostKeyAlias", self.node.clone()),
            ("ProxyCommand", proxy.replace('%', "%%")),
            ("IdentityFile", quote_option(&self.paths.identity())),
            ("IdentitiesOnly", "yes".into()),
            ("UserKnownHostsFile", quote_option(&known_hosts(&self.paths, &self.node))),
            ("GlobalKnownHostsFile", "/dev/null".into()),
            ("StrictHostKeyChecking", "yes".into()),
            ("UpdateHostKeys", "no".into()),
            ("PasswordAuthentication", "no".into()),
            // The way into a node is a private socket of this machine: nothing to record for a quantum computer, and the
            // default costs an emulated guest a second.
            ("KexAlgorithms", "curve25519-sha256".into()),
            ("LogLevel", "ERROR".into()),
        ];
        if shared {
            options.extend([
                ("ControlMaster", "auto".into()),
                ("ControlPath", quote_option(&self.paths.node_socket(&self.node, "ssh"))),
                ("ControlPersist", CONTROL_PERSIST_S.to_string()),
            ]);
        }
        options
    }

    /// These options as a block of a file that OpenSSH reads (ssh_config(5)), for the names NODE and NODE.LAB.
    pub fn config(&self, program: &Path, shared: bool) -> String {
        let mut text = format!("Host {0} {0}.{1}\n", self.node, self.lab);
        for (key, value) in self.options(program, shared) {
            text.push_str(&format!("  {key} {value}\n"));
        }
        text
    }

    /// An `ssh` command into the node, to which arguments can be added.
    pub fn ssh(&self) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| "lab".into());
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null"]);
        for (key, value) in self.options(&program, true) {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        command
    }

    /// An `ssh` that runs a command in the node, without a terminal and without questions.
    pub fn ssh_to(&self, what: &str) -> Command {
        let mut command = self.ssh();
        command.args(["-T", "-o", "BatchMode=yes", &self.node, what]);
        command
    }

    /// Runs a shell script in the node as root: `/bin/sh -e`, nothing on its standard input. When it has ended, what it
    /// wrote is on the node's disk. `line` is given its output, line by line, and so is the file `log`.
    pub fn script(
        &self,
        script: &str,
        environment: &[(String, String)],
        log: Option<&Path>,
        limit: Duration,
        line: &mut dyn FnMut(&str),
    ) -> Result<child::Outcome, Error> {
        let mut text = String::new();
        for (key, value) in environment {
            text.push_str(&format!("export {key}={}\n", quote(value)));
        }
        text.push_str(script);
        text.push('\n');
        let command = self.ssh_to(RUN_SCRIPT);
        child::run(command, text.as_bytes(), log, limit, line)
            .map_err(|source| Error::Tool { tool: "ssh", source })
    }

    /// Runs a shell command in the node with `input` on its standard input; what it writes is not kept.
    pub fn feed(
        &self,
        what: &str,
        input: impl Read + Send,
        limit: Duration,
    ) -> Result<child::Outcome, Error> {
        child::run(self.ssh_to(what), input, None, limit, &mut |_| ())
            .map_err(|source| Error::Tool { tool: "ssh", source })
    }

    /// What a shell command in the node writes to its standard output: of more than `most` bytes, one more than that.
    /// `None` if it fails or has not ended within `limit`.
    pub fn fetch(&self, what: &str, most: u64, limit: Duration) -> Result<Option<Vec<u8>>, Error> {
        let failed = |source| Error::Tool { tool: "ssh", source };
        let mut command = self.ssh_to(what);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(failed)?;
        let output = child.stdout.take();
        std::thread::scope(|scope| {
            // A reader that has enough ends the command: its next write has nobody to go to.
            let reader = scope.spawn(move || {
                let mut bytes = Vec::new();
                let read = output.map(|output| output.take(most + 1).read_to_end(&mut bytes));
                read.transpose().map(|_| bytes)
            });
            let status = child::wait(&mut child, limit);
            if !matches!(status, Ok(Some(_))) {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
            }
            let bytes = reader.join().unwrap_or_else(|_| Ok(Vec::new())).map_err(failed)?;
            let ended = status.map_err(failed)?.is_some_and(|status| status.success());
            Ok((ended || bytes.len() as u64 > most).then_some(bytes))
        })
    }

    /// Waits until the node runs commands, the first of which sets its clock. `transport` is how its image is reached,
    /// `pause` the time between two tries.
    pub fn wait_ready(
        &self,
        transport: SshTransport,
        ip: Ipv4Addr,
        limit: Duration,
        pause: Duration,
        seen: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        let end = Instant::now() + limit;
        let mut last = String::from("nothing yet");
        while Instant::now() < end {
            let open = match transport {
                SshTransport::Vsock => self.announced(),
                SshTransport::Tcp => control::dial(&self.paths.net_control(), ip, SSH_PORT)
                    .map(drop)
                    .map_err(|error| error.to_string()),
            };
            match open.and_then(|()| {
                clock::step_by_ssh(self, end.saturating_duration_since(Instant::now()).min(ANSWER_LIMIT))
            }) {
                Ok(()) => return Ok(()),
                Err(reason) => last = reason,
            }
            seen(&last);
            if !self.is_on() {
                let log = self.paths.node(&self.node).join("vmm.log");
                let reason = format!("its machine has ended; {} tells why", log.display());
                return Err(Error::Unreachable { node: self.node.clone(), reason });
            }
            // Nothing tells across both kinds of image when the next try is worth it.
            std::thread::park_timeout(pause);
        }
        let reason = format!("no answer within {} s; last seen: {last}", limit.as_secs());
        Err(Error::Unreachable { node: self.node.clone(), reason })
    }

    /// How long the node's machine has run since it was switched on or reset; `None` if it does not run.
    pub fn uptime(&self) -> Option<Duration> {
        let end = Instant::now() + RESET_LIMIT;
        loop {
            match control::vmm_status(&self.paths.node_socket(&self.node, "ctl")) {
                Ok(status) => return Some(Duration::from_millis(status.uptime_ms)),
                // Amid a reset, its monitor lives, but nobody listens for a moment.
                Err(_) if self.is_on() && Instant::now() < end => {
                    std::thread::park_timeout(Duration::from_millis(100));
                }
                Err(_) => return None,
            }
        }
    }

    /// Waits until the node's machine has been reset, if it had run for `before` at `since`; false if it was not, or is
    /// off.
    pub fn restarts(&self, before: Option<Duration>, since: Instant, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while let (Some(before), Some(now)) = (before, self.uptime()) {
            if now + CLOCK < before + since.elapsed() {
                return true;
            }
            if Instant::now() >= end {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(200));
        }
        false
    }

    fn is_on(&self) -> bool {
        crate::lock::is_held(&crate::state::vmm_lock(&self.paths.node(&self.node)))
    }

    /// Whether systemd in the node has said that SSH is there.
    fn announced(&self) -> Result<(), String> {
        let status = control::vmm_status(&self.paths.node_socket(&self.node, "ctl"))
            .map_err(|error| error.to_string())?;
        if goes_down(&status) {
            return Err("it is going down".into());
        }
        let ready = ["READY=1", "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target"];
        match status.notified.iter().any(|line| ready.contains(&line.as_str())) {
            true => Ok(()),
            false => Err(match status.notified.last() {
                Some(line) => format!("systemd has said {line}"),
                None => format!("the kernel has run for {} s", status.uptime_ms / 1000),
            }),
        }
    }

    /// The socket of the node's vsock device.
    pub fn vsock_socket(&self) -> PathBuf {
        self.paths.node_socket(&self.node, "vsock")
    }

    /// Asks the node's vsock device for one of the guest's ports.
    pub fn connect_vsock(&self, port: u32) -> io::Result<UnixStream> {
        let stream = lab_vmm::virtio::vsock::connect(&self.vsock_socket(), port)?;
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    /// Ends the connection that is kept for the next command.
    pub fn close(&self) {
        if self.paths.node_socket(&self.node, "ssh").exists() {
            let mut command = self.ssh();
            command.args(["-O", "exit", &self.node]).stdout(Stdio::null()).stderr(Stdio::null());
            // Whether there was one does not matter.
            drop(command.status());
        }
    }

    /// Connects standard input and output with the node's SSH server: what `ProxyCommand` runs.
    pub fn proxy(&self, transport: SshTransport, ip: Ipv4Addr) -> Result<(), Error> {
        proxy::run(|| match transport {
            SshTransport::Vsock => {
                self.connect_vsock(SSH_PORT.into()).map_err(|error| format!("vsock: {error}"))
            }
            SshTransport::Tcp => {
                control::dial(&self.paths.net_control(), ip, SSH_PORT).map_err(|error| error.to_string())
            }
        })
        .map_err(|reason| Error::Unreachable { node: self.node.clone(), reason })
    }
}

/// Whether a node's systemd has said that it reboots, or ends in another way (systemd 254 and later).
pub fn goes_down(status: &lab_vmm::control::Status) -> bool {
    status.notified.iter().any(|line| line == "STOPPING=1" || line.starts_with("X_SYSTEMD_SHUTDOWN="))
}

/// The file with a node's host key, which lab gave it: the only one that is trusted.
pub fn known_hosts(paths: &LabPaths, node: &str) -> PathBuf {
    paths.node(node).join("known_hosts")
}

/// Quotes a word for a POSIX shell.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@,+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Quotes a path as a value of ssh_config(5).
fn quote_option(path: &Path) -> String {
    let text = path.to_string_lossy().replace('%', "%%");
    if text.contains(' ') { format!("\"{text}\"") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain", "", "two words", "it's", "$HOME `x` \"q\"", "a\nb", "ü"] {
            let output =
                Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn a_script_ends_though_it_leaves_a_process_behind() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("left");
        let script = format!(
            "echo one; read x || echo nothing to read; echo bad >&2\n\
             sh -c 'trap \"\" HUP; while [ ! -e {0}.go ]; do sleep 0.1; done; echo late; touch {0}' &\n\
             printf two; exit 3\n",
            left.display()
        );
        let mut command = Command::new("sh");
        command.args(["-c", RUN_SCRIPT]).env("TMPDIR", dir.path());
        let limit = Duration::from_secs(60);
        let outcome = child::run(command, script.as_bytes(), None, limit, &mut |_| ()).unwrap();
        assert_eq!(outcome.status.and_then(|status| status.code()), Some(3));
        assert_eq!(outcome.tail, ["one", "nothing to read", "bad", "two"]);
        // What it left behind goes on, and may still write.
        std::fs::write(format!("{}.go", left.display()), "").unwrap();
        let end = Instant::now() + limit;
        while !left.exists() {
            assert!(Instant::now() < end, "it was ended with its script");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    #[test]
    fn paths_pass_ssh_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("an odd %d, folder");
        let paths = crate::paths::Paths::at(&odd, &dir.path().join("run"));
        let channel = Channel::new(&paths.lab("demo"), "demo", "a");
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-G"]);
        for (key, value) in channel.options(&odd.join("lab"), false) {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        let output = command.arg("a").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let option = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
        assert!(option("identityfile ").replace("%%", "%").contains(odd.to_str().unwrap()), "{said}");
        assert!(option("proxycommand ").replace("%%", "%").contains(odd.to_str().unwrap()), "{said}");
    }

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("id_ed25519");
        let first = ensure_key(&path).unwrap();
        assert!(first.starts_with("ssh-ed25519 "));
        assert_eq!(ensure_key(&path).unwrap(), first);
    }
}
