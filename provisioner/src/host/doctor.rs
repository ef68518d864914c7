//! `lab doctor`: what this machine has and lacks for labs, and what to do about it.

use std::{
    env, fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    emulated::{corrections, machine, tools},
    probe::{self, Probe, Verdict},
};
use crate::{
    memory::{self, Available},
    paths::Paths,
    subordinate_ids::{self, COUNT},
};

/// Free disk space below which a lab has no room, and below which it is tight, in MiB: an image and a few nodes.
const DISK_MIB: [u64; 2] = [2 << 10, 10 << 10];

/// How what is missing gets here.
fn install() -> String {
    match lab_images::command::has_apt() {
        true => "run scripts/install-dependencies".into(),
        false => {
            "install it by this system's packages; scripts/install-dependencies has the names of Debian's"
                .into()
        }
    }
}

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// Labs run, but something of them does not, or not well.
    Warning,
    /// No lab runs.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub about: &'static str,
    /// How good it is.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where labs run: `local` or `emulated`.
    pub host: &'static str,
    /// The probe of KVM.
    #[serde(flatten)]
    pub probe: Probe,
    /// In the order in which they are best looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether labs can run.
    pub fn good(&self) -> bool {
        self.findings.iter().all(|finding| finding.grade != Grade::Problem)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let grade = match finding.grade {
                Grade::Ok => "ok",
                Grade::Warning => "warning",
                Grade::Problem => "PROBLEM",
            };
            writeln!(f, "{grade:8} {}: {}", finding.about, finding.found)?;
            if let Some(next) = &finding.next {
                writeln!(f, "{:8} -> {next}", "")?;
            }
        }
        if self.good() {
            write!(f, "Labs run on the {} host.", self.host)
        } else {
            write!(f, "No lab can run before the problems above are solved.")
        }
    }
}

fn finding(about: &'static str, grade: Grade, found: impl Into<String>, next: Option<String>) -> Finding {
    Finding { about, grade, found: found.into(), next }
}

/// Looks at everything.
pub fn run(paths: &Paths) -> Report {
    let probe = probe::run();
    let local = probe.verdict == Verdict::Works;
    let mut findings = vec![
        processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default(), local),
        kvm(&probe, Path::new("/sys/module")),
    ];
    if !local {
        findings.extend(emulation());
    }
    findings.push(siblings());
    findings.extend(programs());
    findings.push(keyring());
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    findings.push(namespaces(&Rights {
        root: rustix::process::getuid().is_root(),
        names: subordinate_ids::names(),
        uidmap: tools::find("newuidmap").is_some() && tools::find("newgidmap").is_some(),
        tables: [read("/etc/subuid"), read("/etc/subgid")],
        most: read("/proc/sys/user/max_user_namespaces"),
        clone: read("/proc/sys/kernel/unprivileged_userns_clone"),
    }));
    findings.push(memory(memory::available(), local));
    findings.push(disk(paths.home()));
    findings.push(home(paths.home(), local));
    findings.push(ping(
        &fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default(),
        rustix::process::getgid().as_raw(),
        local,
    ));
    findings.push(runtime_folder(env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)));
    Report { host: if local { "local" } else { "emulated" }, probe, findings }
}

fn processor(cpuinfo: &str, local: bool) -> Finding {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|it| it == flag);
    let found = match (has("vmx"), has("svm")) {
        (true, _) => "it has Intel's virtualization (vmx)",
        (_, true) => "it has AMD's virtualization (svm)",
        _ if local => "it shows no virtualization, and KVM works all the same",
        _ if has("hypervisor") => {
            "this is a virtual machine, and it is given no virtualization of its own (neither vmx nor svm)"
        }
        _ => "it shows no virtualization (neither vmx nor svm)",
    };
    let next = match (has("vmx") || has("svm") || local, has("hypervisor")) {
        (true, _) => None,
        (_, true) => Some(
            "turn on nested virtualization for this virtual machine, or go on with the emulated host".into(),
        ),
        _ => Some(
            "turn on VT-x or AMD-V (SVM) in the firmware's setup, or go on with the emulated host".into(),
        ),
    };
    finding("processor", if next.is_some() { Grade::Warning } else { Grade::Ok }, found, next)
}

fn kvm(probe: &Probe, modules: &Path) -> Finding {
    let speed = probe.ns_per_instruction.map(|ns| format!(" ({ns} ns per instruction)")).unwrap_or_default();
    let slowly = "labs run in the emulated host, which is slow";
    let (found, next) = match probe.verdict {
        Verdict::Works => return finding("KVM", Grade::Ok, format!("it works{speed}"), None),
        Verdict::EmulatedKernelMode => {
            let pvm = if modules.join("kvm_pvm").exists() { ", whose backend is PVM," } else { "" };
            let missing = match probe.missing_instructions.as_slice() {
                [] => String::new(),
                names => format!(", without {}", names.join(", ")),
            };
            let found = format!(
                "/dev/kvm{pvm} emulates the kernel mode of guests{speed}{missing}: no stock kernel runs on it"
            );
            (found, format!("nothing can be done about it from here: {slowly}"))
        }
        Verdict::Missing => {
            let next = if modules.join("kvm_intel").exists() || modules.join("kvm_amd").exists() {
                "the module is loaded, so this may be a container: give it the device /dev/kvm".into()
            } else {
                format!(
                    "load the module (modprobe kvm_intel or kvm_amd) where the processor has virtualization; else {slowly}"
                )
            };
            ("there is no /dev/kvm".into(), next)
        }
        Verdict::NoPermission => (
            "this user may not open /dev/kvm".into(),
            "join its group (sudo usermod -aG kvm $USER), then log in again".into(),
        ),
        Verdict::Broken => {
            let error = probe.error.as_deref().unwrap_or("no reason given");
            (
                format!("/dev/kvm does not work: {error}"),
                format!("see the kernel's messages (dmesg); until then {slowly}"),
            )
        }
    };
    finding("KVM", Grade::Warning, found, Some(next))
}

/// What the emulated host is made of.
fn emulation() -> Vec<Finding> {
    let install = || Some(install());
    let qemu = match tools::find("qemu-system-x86_64") {
        None => finding("QEMU", Grade::Problem, "qemu-system-x86_64 is not installed", install()),
        Some(path) => {
            let version = tools::qemu_version(&path).unwrap_or_else(|| "of an unknown version".into());
            if tools::major(&version) < tools::OLDEST_QEMU {
                let found = format!("{version}, and {} or newer is needed", tools::OLDEST_QEMU);
                finding("QEMU", Grade::Problem, found, install())
            } else if corrections::find(&path).len() < corrections::FAULTS {
                let found = format!("{version}, a build whose faults in VMRUN lab cannot correct");
                let next = "nodes may crash now and then: use the QEMU of Debian's packages";
                finding("QEMU", Grade::Warning, found, Some(next.into()))
            } else {
                finding("QEMU", Grade::Ok, version, None)
            }
        }
    };
    let virtiofsd = match tools::virtiofsd() {
        Some(path) => finding("virtiofsd", Grade::Ok, path.display().to_string(), None),
        None => finding("virtiofsd", Grade::Problem, "it is not installed", install()),
    };
    vec![qemu, virtiofsd, program("dropbear", Grade::Problem), program("dropbearkey", Grade::Problem)]
}

/// The programs that labs are made of lie beside `lab`.
fn siblings() -> Finding {
    let folder =
        env::current_exe().ok().and_then(|lab| lab.parent().map(Path::to_path_buf)).unwrap_or_default();
    let missing: Vec<_> =
        ["lab-vmm", "lab-net"].into_iter().filter(|name| !folder.join(name).exists()).collect();
    if missing.is_empty() {
        return finding("lab", Grade::Ok, format!("lab-vmm and lab-net are in {}", folder.display()), None);
    }
    let found = format!("{} lacks {}", folder.display(), missing.join(" and "));
    finding("lab", Grade::Problem, found, Some("build all of it: cargo build --release".into()))
}

fn programs() -> Vec<Finding> {
    vec![
        program("ssh", Grade::Problem),
        program("ssh-keygen", Grade::Problem),
        program("mmdebstrap", Grade::Problem),
        program("mke2fs", Grade::Problem),
    ]
}

fn program(name: &'static str, without: Grade) -> Finding {
    match tools::find(name) {
        Some(path) => finding(name, Grade::Ok, path.display().to_string(), None),
        None => finding(name, without, "it is not installed", Some(install())),
    }
}

fn keyring() -> Finding {
    const ABOUT: &str = "Debian's keys";
    let folder = Path::new("/usr/share/keyrings");
    let next = Some(install());
    if !folder.join("debian-archive-keyring.gpg").exists() {
        return finding(
            ABOUT,
            Grade::Problem,
            "debian-archive-keyring is not installed: no image can be built",
            next,
        );
    }
    if !folder.join("debian-archive-trixie-automatic.gpg").exists()
        && !folder.join("debian-archive-trixie-automatic.pgp").exists()
    {
        return finding(ABOUT, Grade::Warning, "debian-archive-keyring is too old to know Debian 13", next);
    }
    finding(ABOUT, Grade::Ok, "they are there, Debian 13's among them", None)
}

/// What decides whether a user may build images, and have steps baked without a node.
struct Rights {
    root: bool,
    names: Vec<String>,
    uidmap: bool,
    /// /etc/subuid and /etc/subgid.
    tables: [String; 2],
    /// How many user namespaces there may be; empty if the kernel has none.
    most: String,
    /// Debian's switch for those of ordinary users; empty elsewhere.
    clone: String,
}

/// Images are built in a user namespace with the ids of a whole system.
fn namespaces(rights: &Rights) -> Finding {
    const ABOUT: &str = "user namespaces";
    let problem = |found: String, next: String| finding(ABOUT, Grade::Problem, found, Some(next));
    if rights.root {
        return finding(ABOUT, Grade::Ok, "root needs none to build images", None);
    }
    for (switch, value) in
        [("user.max_user_namespaces", &rights.most), ("kernel.unprivileged_userns_clone", &rights.clone)]
    {
        if value.trim() == "0" {
            let on = if switch.starts_with("user") { 65536 } else { 1 };
            let next = format!("sudo sysctl -w {switch}={on}");
            return problem(format!("{switch} is 0: this user may not have any, and builds no image"), next);
        }
    }
    if !rights.uidmap {
        let found = "newuidmap and newgidmap are not installed: this user builds no image";
        return problem(found.into(), format!("{} (Debian's package uidmap)", install()));
    }
    let user = rights.names.first().map_or("", String::as_str);
    for (file, table) in ["/etc/subuid", "/etc/subgid"].iter().zip(&rights.tables) {
        if subordinate_ids::first(table, &rights.names).is_none() {
            let found = format!("{file} gives {user} no {COUNT} ids: this user builds no image");
            let next = format!(
                "echo {user}:100000:{COUNT} | sudo tee -a {file} (another first number where others have these)"
            );
            return problem(found, next);
        }
    }
    finding(ABOUT, Grade::Ok, format!("{user} may have them, with {COUNT} ids"), None)
}

fn memory(available: Option<Available>, local: bool) -> Finding {
    let (free, limited_by) = available.map_or((0, None), |available| (available.mib, available.limited_by));
    let needed = if local { 1024 } else { machine::LEAST_MEMORY_MIB + machine::RESERVE_MIB };
    let found = match &limited_by {
        Some(file) => format!("{free} MiB are free, by the control group's limit in {}", file.display()),
        None => format!("{free} MiB are free"),
    };
    if free < needed {
        let more =
            if limited_by.is_some() { "raise that limit" } else { "end something that uses much of it" };
        let next = format!("{more}: at least {needed} MiB are needed");
        return finding("memory", Grade::Problem, found, Some(next));
    }
    if free < needed + 2048 {
        let next = "give nodes little memory: there is room for one or two of them".into();
        return finding("memory", Grade::Warning, found, Some(next));
    }
    finding("memory", Grade::Ok, found, None)
}

fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn disk(home: &Path) -> Finding {
    let Ok(stat) = rustix::fs::statvfs(existing(home)) else {
        return finding(
            "disk",
            Grade::Warning,
            format!("the file system of {} cannot be asked", home.display()),
            None,
        );
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    let found = format!("{free} MiB are free for {}", home.display());
    let [least, tight] = DISK_MIB;
    let next = Some("make room there, or set LAB_HOME to a folder on a larger file system".to_string());
    match free {
        free if free < least => finding("disk", Grade::Problem, found, next),
        free if free < tight => finding("disk", Grade::Warning, found, next),
        _ => finding("disk", Grade::Ok, found, None),
    }
}

fn home(home: &Path, local: bool) -> Finding {
    const ABOUT: &str = "LAB_HOME";
    let found = home.display().to_string();
    if !local && ["/run", "/dev", "/proc", "/sys"].iter().any(|own| home.starts_with(own)) {
        let next = "set LAB_HOME to a folder elsewhere: the emulated host has a file system of its own there";
        return finding(ABOUT, Grade::Problem, found, Some(next.into()));
    }
    if rustix::fs::access(existing(home), rustix::fs::Access::WRITE_OK).is_err() {
        let next = "set LAB_HOME to a folder that you can write to";
        return finding(ABOUT, Grade::Problem, format!("{found} cannot be written"), Some(next.into()));
    }
    finding(ABOUT, Grade::Ok, found, None)
}

fn ping(range: &str, gid: u32, local: bool) -> Finding {
    const ABOUT: &str = "ping";
    if !local {
        return finding(ABOUT, Grade::Ok, "the emulated host lets nodes ping the world", None);
    }
    let mut bounds = range.split_whitespace().map(|bound| bound.parse::<u32>().ok());
    if let (Some(Some(low)), Some(Some(high))) = (bounds.next(), bounds.next())
        && (low..=high).contains(&gid)
    {
        return finding(ABOUT, Grade::Ok, "nodes can ping the world (net.ipv4.ping_group_range)", None);
    }
    let found = "nodes cannot ping the world: net.ipv4.ping_group_range leaves this user out";
    finding(
        ABOUT,
        Grade::Warning,
        found,
        Some("sudo sysctl -w net.ipv4.ping_group_range='0 2147483647'".into()),
    )
}

fn runtime_folder(set: Option<PathBuf>) -> Finding {
    const ABOUT: &str = "XDG_RUNTIME_DIR";
    let Some(folder) = set.filter(|folder| !folder.as_os_str().is_empty()) else {
        let uid = rustix::process::getuid();
        let used = if uid.is_root() { "/run/lab".into() } else { format!("/tmp/lab-{}", uid.as_raw()) };
        return finding(ABOUT, Grade::Ok, format!("it is not set: sockets are in {used}"), None);
    };
    let found = folder.display().to_string();
    let ours = fs::metadata(&folder)
        .is_ok_and(|data| data.is_dir() && data.uid() == rustix::process::getuid().as_raw());
    if ours {
        return finding(ABOUT, Grade::Ok, found, None);
    }
    let next = "log in afresh, or unset it: lab then uses a folder of its own";
    finding(ABOUT, Grade::Problem, format!("{found} is no folder of this user's"), Some(next.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_machine_without_nesting_is_told_so() {
        let it = processor("processor : 0\nflags\t\t: fpu sse2 hypervisor\n", false);
        assert_eq!(it.grade, Grade::Warning);
        assert!(it.next.unwrap().contains("nested virtualization"));
        let it = processor("flags : fpu sse2\n", false);
        assert!(it.next.unwrap().contains("firmware"));
        let it = processor("flags : fpu svm\n", false);
        assert_eq!((it.grade, it.next), (Grade::Ok, None));
    }

    #[test]
    fn each_verdict_has_a_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let probe = |verdict| Probe {
            verdict,
            ns_per_instruction: Some(1040.5),
            missing_instructions: vec!["popcnt".into(), "xgetbv".into()],
            error: None,
        };
        assert_eq!(kvm(&probe(Verdict::Works), dir.path()).grade, Grade::Ok);
        for (verdict, step) in [
            (Verdict::Missing, "modprobe"),
            (Verdict::NoPermission, "usermod -aG kvm"),
            (Verdict::Broken, "dmesg"),
            (Verdict::EmulatedKernelMode, "emulated host"),
        ] {
            assert!(kvm(&probe(verdict), dir.path()).next.unwrap().contains(step), "{verdict:?}");
        }
        fs::create_dir(dir.path().join("kvm_pvm")).unwrap();
        let it = kvm(&probe(Verdict::EmulatedKernelMode), dir.path());
        assert_eq!(
            it.found,
            "/dev/kvm, whose backend is PVM, emulates the kernel mode of guests (1040.5 ns per instruction), \
             without popcnt, xgetbv: no stock kernel runs on it"
        );
    }

    #[test]
    fn too_little_of_anything_is_a_problem() {
        let free = |mib: u64| Some(Available { mib, limited_by: None });
        assert_eq!(memory(free(6000), false).grade, Grade::Ok);
        assert_eq!(memory(free(4000), false).grade, Grade::Warning);
        assert_eq!(memory(free(2000), false).grade, Grade::Problem);
        assert_eq!(memory(free(2000), true).grade, Grade::Warning);
        assert_eq!(memory(None, true).grade, Grade::Problem);
        let limited = memory(Some(Available { mib: 9, limited_by: Some("/x/memory.max".into()) }), true);
        assert!(
            limited.found.contains("/x/memory.max") && limited.next.unwrap().contains("raise that limit")
        );
        assert_eq!(home(Path::new("/run/me/lab"), false).grade, Grade::Problem);
        assert_eq!(runtime_folder(Some("/nowhere/at/all".into())).grade, Grade::Problem);
        assert_eq!(runtime_folder(None).grade, Grade::Ok);
    }

    #[test]
    fn an_ordinary_user_is_told_what_building_images_takes() {
        let able = || Rights {
            root: false,
            names: vec!["ann".into(), "1000".into()],
            uidmap: true,
            tables: ["ann:100000:65536\n".into(), "1000:100000:65536\n".into()],
            most: "63381\n".into(),
            clone: "1\n".into(),
        };
        assert_eq!(namespaces(&able()).grade, Grade::Ok);
        assert_eq!(namespaces(&Rights { clone: String::new(), ..able() }).grade, Grade::Ok);
        for (rights, found, next) in [
            (Rights { uidmap: false, ..able() }, "newuidmap", "uidmap"),
            (Rights { most: "0\n".into(), ..able() }, "user.max_user_namespaces is 0", "=65536"),
            (Rights { clone: "0\n".into(), ..able() }, "kernel.unprivileged_userns_clone is 0", "=1"),
            (
                Rights { tables: ["ann:100000:1000\n".into(), String::new()], ..able() },
                "/etc/subuid gives ann no 65536 ids",
                "echo ann:100000:65536 | sudo tee -a /etc/subuid",
            ),
            (
                Rights { tables: ["ann:1:65536\n".into(), "bob:1:65536\n".into()], ..able() },
                "/etc/subgid gives ann no",
                "/etc/subgid",
            ),
        ] {
            let it = namespaces(&rights);
            assert_eq!(it.grade, Grade::Problem);
            assert!(it.found.contains(found), "{}", it.found);
            assert!(it.next.unwrap().contains(next));
            assert_eq!(namespaces(&Rights { root: true, ..rights }).grade, Grade::Ok);
        }
    }

    #[test]
    fn who_may_ping_is_read_from_the_range() {
        assert_eq!(ping("0\t2147483647\n", 1000, true).grade, Grade::Ok);
        assert_eq!(ping("1\t0\n", 1000, true).grade, Grade::Warning);
        assert_eq!(ping("", 0, true).grade, Grade::Warning);
        assert_eq!(ping("1\t0\n", 1000, false).grade, Grade::Ok);
    }

    #[test]
    fn a_problem_decides() {
        let report = |grade| Report {
            host: "local",
            probe: probe::Probe {
                verdict: Verdict::Works,
                ns_per_instruction: Some(0.5),
                missing_instructions: Vec::new(),
                error: None,
            },
            findings: vec![finding("ssh", grade, "it is not installed", Some(install()))],
        };
        assert!(report(Grade::Warning).good() && !report(Grade::Problem).good());
        assert!(report(Grade::Warning).to_string().ends_with("Labs run on the local host."));
        let json = serde_json::to_value(report(Grade::Problem)).unwrap();
        assert_eq!(json["verdict"], "works");
        assert_eq!(json["findings"][0]["grade"], "problem");
    }
}
