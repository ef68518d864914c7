//! The harness that the end-to-end tests share: labs of their own, driven by the real `lab` command, on this machine's
//! KVM where that works and in the emulated host otherwise. The choice is lab's own.
//!
//! `scripts/test` sets LAB_HOME and builds the images first; run alone, a test builds what it needs. What a test prints
//! tells `run-tests` whether it gets on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a harness fails by panicking"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

pub mod cluster;
pub mod disk_contents;
pub mod load;
pub mod waiting;

use waiting::Waiting;

/// A lab that a test made, removed with the value.
pub struct TestLab {
    dir: tempfile::TempDir,
    file: PathBuf,
    /// LAB_HOME, where it is not that of the test.
    home: Option<PathBuf>,
}

impl TestLab {
    /// A lab from a labfile's text, in a folder of its own.
    pub fn new(text: &str) -> Self {
        let dir = scratch();
        let file = dir.path().join("lab.toml");
        std::fs::write(&file, text).unwrap();
        Self { dir, file, home: None }
    }

    /// The same, in another LAB_HOME, and without what LAB_BUNDLES names.
    pub fn at_home(text: &str, home: &Path) -> Self {
        let mut lab = Self::new(text);
        lab.home = Some(home.into());
        lab
    }

    /// A lab that is not there yet, nor its labfile: `folder` is where it will be imported to.
    pub fn to_import(home: &Path) -> Self {
        let dir = scratch();
        let file = dir.path().join("imported").join("lab.toml");
        Self { dir, file, home: Some(home.into()) }
    }

    /// The folder that its labfile is in, or will be.
    pub fn folder(&self) -> &Path {
        self.file.parent().unwrap()
    }

    /// A lab from a labfile of the repository, under a name of its own and with another port for `forward`.
    pub fn example(name: &str, change: impl FnOnce(String) -> String) -> Self {
        let path = repository().join("labfiles").join(name);
        Self::new(&change(std::fs::read_to_string(path).unwrap()))
    }

    /// The same, from an example that is a folder, with all that is in it.
    pub fn example_folder(name: &str, change: impl FnOnce(String) -> String) -> Self {
        let lab = Self::new("");
        let mut init = Command::new(program());
        let folder = lab.dir().join("init");
        std::fs::create_dir(&folder).unwrap();
        init.args(["init", "--from", name]).current_dir(&folder);
        let output = output(init, b"");
        assert!(output.status.success(), "{}", text(&output));
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            std::fs::rename(entry.path(), lab.dir().join(entry.file_name())).unwrap();
        }
        let file = std::fs::read_to_string(&lab.file).unwrap();
        lab.rewrite(&change(file));
        lab
    }

    /// The folder of its labfile.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Changes the labfile.
    pub fn rewrite(&self, text: &str) {
        std::fs::write(&self.file, text).unwrap();
    }

    /// A `lab` command for this lab.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg("-f").arg(&self.file).args(arguments).current_dir(self.dir.path());
        if let Some(home) = &self.home {
            command.env("LAB_HOME", home).env_remove("LAB_BUNDLES");
        }
        command
    }

    /// Runs a `lab` command; panics with all that it said unless it succeeds. Returns its standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = output(self.command(arguments), b"");
        let said = text(&output);
        assert!(output.status.success(), "lab {arguments:?}: {}\n{said}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a `lab` command that must fail with this exit status; returns what it said on standard error.
    pub fn fails(&self, status: i32, arguments: &[&str]) -> String {
        let output = output(self.command(arguments), b"");
        assert_eq!(output.status.code(), Some(status), "lab {arguments:?}\n{}", text(&output));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!error.contains("panicked"), "{error}");
        error
    }

    /// Runs `lab up` after a command was killed.
    pub fn up_after_kill(&self) {
        self.after_kill(&["up"]);
    }

    /// Runs a `lab` command after another one was killed: what that was carried by may take a moment to notice.
    pub fn after_kill(&self, arguments: &[&str]) {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let output = output(self.command(arguments), b"");
            let busy = String::from_utf8_lossy(&output.stderr).contains("another lab command");
            if !busy {
                assert!(output.status.success(), "lab {arguments:?}: {}\n{}", output.status, text(&output));
                return;
            }
            assert!(Instant::now() < end, "the dead command still holds the lab");
            std::thread::park_timeout(Duration::from_millis(500));
        }
    }

    /// Runs a shell command in a node, with `input`; returns status and standard output.
    pub fn shell(&self, node: &str, script: &str, input: &[u8]) -> (Option<i32>, String) {
        let output = output(self.command(&["exec", node, "sh", "-c", script]), input);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Types `input` into `lab ssh` on a terminal of this size; returns status and what was on the screen.
    pub fn terminal(&self, node: &str, (rows, columns): (u16, u16), input: &str) -> (Option<i32>, String) {
        let (lab, file) = (program(), self.file.display());
        let inside = format!("stty rows {rows} cols {columns}; exec {} -f {file} ssh {node}", lab.display());
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "120", "script", "-qec", &inside, "/dev/null"])
            .current_dir(self.dir.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Nobody hangs up before the shell has ended by itself.
        let mut keyboard = child.stdin.take().unwrap();
        keyboard.write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        drop(keyboard);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What `lab status` tells, as JSON.
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.run(&["status", "-o", "json"])).unwrap()
    }

    /// State of a node: `absent`, `stopped`, `running`.
    pub fn state_of(&self, node: &str) -> String {
        let status = self.status();
        let nodes = status["nodes"].as_array().unwrap();
        let node = nodes.iter().find(|entry| entry["name"] == node).unwrap();
        node["state"].as_str().unwrap().into()
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        let output = output(self.command(&["destroy", "--yes", "--forget"]), b"");
        if !output.status.success() && !std::thread::panicking() {
            panic!("lab destroy: {}\n{}", output.status, text(&output));
        }
    }
}

/// A LAB_HOME that has nothing, neither images nor labs. Its emulated host is the only one as long as it is used: two at
/// once are much too slow.
pub struct OtherHome {
    dir: tempfile::TempDir,
    emulated: bool,
}

impl OtherHome {
    /// Makes it, and ends the emulated host of the test's own home.
    #[allow(clippy::new_without_default, reason = "it ends a host")]
    pub fn new() -> Self {
        let home = Self { dir: scratch(), emulated: emulated() };
        if home.emulated {
            lab_host(None, &["stop", "--force"]);
        }
        home
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Starts its emulated host and lets that reach nothing but this machine; false without one.
    pub fn unplug(&self) -> bool {
        if self.emulated {
            lab_host(Some(self.path()), &["start"]);
            lab_host(Some(self.path()), &["exec", "ip", "route", "del", "default"]);
        }
        self.emulated
    }
}

impl Drop for OtherHome {
    fn drop(&mut self) {
        if self.emulated {
            lab_host(Some(self.dir.path()), &["stop", "--force"]);
            lab_host(None, &["start"]);
        }
    }
}

/// A folder for a test, removed with the value; by who runs the tests, if one is ended before.
pub fn scratch() -> tempfile::TempDir {
    // Not in /tmp: the emulated host has one of its own.
    let folder = std::env::var_os("LAB_TEST_SCRATCH").unwrap_or_else(|| "/var/tmp".into());
    tempfile::tempdir_in(folder).unwrap()
}

/// Runs `lab host` in a LAB_HOME, the test's own unless given.
pub fn lab_host(home: Option<&Path>, arguments: &[&str]) {
    let mut command = Command::new(program());
    command.args(["-q", "host"]).args(arguments).envs(home.map(|home| ("LAB_HOME", home)));
    let output = output(command, b"");
    assert!(output.status.success(), "lab host {arguments:?}: {}", text(&output));
}

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// The `lab` that was built in the same profile as this test.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join("lab");
    assert!(program.exists(), "{} is missing: build the workspace first", program.display());
    program
}

/// LAB_HOME, which scripts/test sets.
pub fn home() -> PathBuf {
    std::env::var_os("LAB_HOME").expect("LAB_HOME is set by scripts/test").into()
}

/// Whether labs run in the emulated host here.
pub fn emulated() -> bool {
    home().join("host").exists()
}

/// Runs a shell script on the machine where lab's processes are; what it wrote. In it, `lab_pid FILE` tells which process
/// holds the lock of a file below LAB_HOME/labs.
pub fn on_host(script: &str) -> String {
    // fuser is not everywhere; /proc/locks names holder and inode.
    let script = format!(
        "lab_pid() {{ i=$(stat -c %i {}/labs/$1); awk -v i=\":$i\\$\" '$2 == \"FLOCK\" && $6 ~ i {{ print $5 }}' /proc/locks | head -n 1; }}\n{script}",
        home().display()
    );
    let mut command = if emulated() {
        let mut command = Command::new(program());
        command.args(["host", "exec", "--", "sh", "-c", &script]);
        command
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        command
    };
    command.stderr(Stdio::inherit());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{script}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command with input to its end. Tells that it begins, what it says on standard error as it comes, and how it
/// ended.
pub fn output(mut command: Command, input: &[u8]) -> Output {
    let started = Instant::now();
    let tell = |line: String| {
        if !waiting::is_asking() {
            eprintln!("    {line}");
        }
    };
    tell(shown(&command));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: between fork and exec, prctl(2) is async-signal-safe and touches no memory of the parent.
    unsafe {
        // A test that is killed leaves no command.
        command.pre_exec(|| {
            let term = Some(rustix::process::Signal::TERM);
            Ok(rustix::process::set_parent_process_death_signal(term)?)
        });
    }
    let mut child = command.spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let input = input.to_vec();
    std::thread::spawn(move || drop(stdin.write_all(&input)));
    let stdout = std::thread::spawn(move || {
        let mut all = Vec::new();
        stdout.read_to_end(&mut all).map(|_| all)
    });
    let mut stderr = Vec::new();
    loop {
        let begin = stderr.len();
        if errors.read_until(b'\n', &mut stderr).unwrap() == 0 {
            break;
        }
        tell(format!("  {}", String::from_utf8_lossy(&stderr[begin..]).trim_end()));
    }
    let stdout = stdout.join().unwrap().unwrap();
    let status = child.wait().unwrap();
    tell(format!("{status} after {:.1} s", started.elapsed().as_secs_f64()));
    Output { status, stdout, stderr }
}

/// A command as it may be typed, on one line.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = [program].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy().replace('\n', "\\n")).collect::<Vec<_>>().join(" ")
}

/// All that a command said.
pub fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("--- standard output\n{out}\n--- standard error\n{err}")
}

/// Runs a `lab` command and kills it after a while; false if it had ended by then.
pub fn kill_after(lab: &TestLab, arguments: &[&str], delay: Duration) -> bool {
    let mut child = lab.command(arguments).stdin(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + delay;
    while Instant::now() < end {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

/// A port of this machine that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Where lab's processes listen on this machine, as in /proc/net/tcp: address and port in hexadecimal.
pub fn listeners() -> Vec<String> {
    const OURS: [&str; 6] = ["lab", "lab-net", "lab-vmm", "qemu-system-x86", "virtiofsd", "dropbear"];
    let mut ours = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if OURS.contains(&name.trim())
            && let Ok(files) = std::fs::read_dir(process.path().join("fd"))
        {
            let links = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
            ours.extend(links.map(|link| link.display().to_string()));
        }
    }
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            // 0A is LISTEN (net/tcp_states.h of Linux).
            if words[3] == "0A" && ours.contains(&format!("socket:[{}]", words[9])) {
                found.push(words[1].to_owned());
            }
        }
    }
    found
}

/// Fetches a page over HTTP/1.0; waits up to a minute for somebody to answer.
pub fn http_get(port: u16, path: &str) -> String {
    let mut waiting = Waiting::new(format!("an answer from port {port}"), Duration::from_secs(60));
    loop {
        let answer = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n").as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        match answer {
            Ok(answer) if !answer.is_empty() => return answer,
            other => {
                let said = format!("{other:?}");
                assert!(!waiting.is_over(&said), "no answer from port {port}: {said}");
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Fetches a page until it has all of `wanted` in it, for five minutes.
pub fn page_with(port: u16, path: &str, wanted: &[&str]) -> String {
    let mut waiting = Waiting::new(format!("{wanted:?} in {path}"), Duration::from_secs(300));
    loop {
        let page = http_get(port, path);
        if wanted.iter().all(|part| page.contains(part)) {
            return page;
        }
        assert!(!waiting.is_over(&page), "{path} has not {wanted:?}: {page}");
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

/// Whether there is time for what takes long; says what is missing.
pub fn long(what: &str) -> bool {
    let long = std::env::var_os("LAB_TEST_LONG").is_some();
    if !long {
        eprintln!("SKIPPED: {what}: LAB_TEST_LONG is not set (scripts/soak sets it)");
    }
    long
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_on_one_line_and_what_it_says_is_kept() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo out\ncat\necho err >&2; exit 3"]);
        assert_eq!(shown(&command), "sh -c echo out\\ncat\\necho err >&2; exit 3");
        let output = output(command, b"in\n");
        assert_eq!(output.status.code(), Some(3));
        assert_eq!((&*output.stdout, &*output.stderr), (&b"out\nin\n"[..], &b"err\n"[..]));
    }

    /// Seen from outside: this test once more, in a process of its own.
    #[test]
    fn what_a_command_says_is_told_at_once_and_it_ends_with_the_test() {
        const INSIDE: &str = "LAB_TEST_INSIDE";
        if std::env::var_os(INSIDE).is_some() {
            let mut command = Command::new("sh");
            command.args(["-c", "echo $$ >&2; exec sleep 1000"]);
            output(command, b"");
        }
        let mut test = Command::new(std::env::current_exe().unwrap());
        let name = "tests::what_a_command_says_is_told_at_once_and_it_ends_with_the_test";
        test.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let mut test = test.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(test.stderr.take().unwrap()).lines().map(Result::unwrap);
        let pid = lines.find_map(|line| line.trim().parse::<u32>().ok()).unwrap();
        test.kill().unwrap();
        test.wait().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        while runs() {
            assert!(Instant::now() < end, "the command runs on");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}
