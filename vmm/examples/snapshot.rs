//! Times one machine: its fresh boot against its restoring, each from the start of the process to the guest's first reply
//! over vsock; and the pause for a snapshot against writing the same bytes to a file. `scripts/bench/snapshot` runs it.
//!
//! `snapshot CONFIG RUNS`: CONFIG is a `lab-vmm`'s, whose machine does not run; its disks are not written to.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lab_vmm::{
    config::VmConfig,
    control::{Action, Reply, Request, VERSION},
    qcow2,
};

const LIMIT: Duration = Duration::from_secs(300);

/// A machine of its own: other overlays on the same disks, other sockets.
struct Bench {
    config: VmConfig,
    folder: PathBuf,
}

impl Bench {
    fn new(config: &Path, folder: &Path) -> Self {
        let mut config: VmConfig = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
        let at = |name: &str| folder.join(name);
        for (index, disk) in config.disks.iter_mut().filter(|disk| !disk.read_only).enumerate() {
            let overlay = at(&format!("disk{index}"));
            let size = qcow2::info(&disk.path).unwrap().size_bytes;
            qcow2::create_overlay(&overlay, &disk.path, disk.format, size).unwrap();
            disk.path = overlay;
        }
        config.nets.iter_mut().for_each(|net| net.socket = at("net"));
        config.console = Default::default();
        config.control = Some(at("ctl"));
        config.lock = None;
        (config.restore, config.paused, config.prefetch) = (None, false, true);
        let vsock = config.vsock.as_mut().unwrap();
        vsock.socket = at("vsock");
        vsock.notify_port = None;
        Self { config, folder: folder.into() }
    }

    /// Starts the machine; the seconds until its guest has answered.
    fn start(&self) -> (Child, f64) {
        let file = self.folder.join("config");
        fs::write(&file, serde_json::to_vec(&self.config).unwrap()).unwrap();
        for socket in ["ctl", "vsock"] {
            let _ = fs::remove_file(self.folder.join(socket));
        }
        let program = std::env::current_exe().unwrap();
        let program = program.parent().unwrap().parent().unwrap().join("lab-vmm");
        let started = Instant::now();
        let child = Command::new(program).arg("--config").arg(file).stdin(Stdio::null()).spawn().unwrap();
        while !self.answers() {
            assert!(started.elapsed() < LIMIT, "no answer within {LIMIT:?}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        (child, started.elapsed().as_secs_f64())
    }

    /// Whether somebody in the guest listens on port 22.
    fn answers(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(self.folder.join("vsock")) else { return false };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"CONNECT 22\n").unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).is_ok() && &answer == b"OK "
    }

    /// Asks for something that must succeed.
    fn ask(&self, action: Action) {
        let mut stream = UnixStream::connect(self.folder.join("ctl")).unwrap();
        let mut line = serde_json::to_vec(&Request { v: VERSION, action }).unwrap();
        line.push(b'\n');
        stream.write_all(&line).unwrap();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap();
        assert_eq!(serde_json::from_str::<Reply>(&reply).unwrap(), Reply::Done);
    }
}

/// Writes the pages of `memory` that are not zero to a new file, as plainly as can be; the seconds that takes, and how
/// many bytes they are.
fn write_again(memory: &Path, copy: &Path) -> (f64, usize) {
    const PIECE: usize = 2 << 20;
    let source = File::open(memory).unwrap();
    let length = source.metadata().unwrap().len();
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for piece in (0..length).step_by(PIECE) {
        let mut data = vec![0; PIECE.min((length - piece) as usize)];
        source.read_exact_at(&mut data, piece).unwrap();
        for (index, page) in data.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
            let at = piece + index as u64 * 4096;
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at && run.len() < PIECE => {
                    run.extend(page)
                }
                _ => runs.push((at, page.to_vec())),
            }
        }
    }
    let started = Instant::now();
    let target = File::create(copy).unwrap();
    for (at, run) in &runs {
        target.write_all_at(run, *at).unwrap();
    }
    (started.elapsed().as_secs_f64(), runs.iter().map(|(_, run)| run.len()).sum())
}

/// Prints times; their median.
fn told(what: &str, mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    println!("{what}: {:.2} {median:.2} {:.2} s (min median max)", seconds[0], seconds[seconds.len() - 1]);
    median
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, config, runs] = &arguments[..] else { panic!("snapshot CONFIG RUNS") };
    let runs: usize = runs.parse().unwrap();
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut bench = Bench::new(Path::new(config), folder.path());
    let (mut boots, mut saves, mut writes, mut restores) = (vec![], vec![], vec![], vec![]);
    for round in 0..runs {
        let (mut booted, seconds) = bench.start();
        boots.push(seconds);
        let snapshot = folder.path().join(format!("snapshot{round}"));
        fs::create_dir(&snapshot).unwrap();
        let started = Instant::now();
        bench.ask(Action::Save { folder: snapshot.clone() });
        saves.push(started.elapsed().as_secs_f64());
        bench.ask(Action::Kill);
        booted.wait().unwrap();
        let (seconds, bytes) = write_again(&snapshot.join("memory"), &folder.path().join("copy"));
        writes.push(seconds);
        println!("snapshot {round} has {} MiB of memory", bytes >> 20);
        bench.config.restore = Some(snapshot);
        let (mut restored, seconds) = bench.start();
        restores.push(seconds);
        bench.ask(Action::Kill);
        restored.wait().unwrap();
        bench.config.restore = None;
    }
    let (boot, restore) = (told("fresh boot", boots), told("restore", restores));
    println!("fresh boot / restore, of medians: {:.1}", boot / restore);
    let (save, write) = (told("save", saves), told("writing the same bytes", writes));
    println!("save / write, of medians: {:.2}", save / write);
}
