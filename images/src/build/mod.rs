//! Building an image from its definition: kernel and initramfs from the kernel's package, then the root file system by
//! `mmdebstrap`, whose output goes straight into the program that makes an ext4 image of it. Rootless unless we are
//! root.

mod overlay;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use lab_vmm::config::DiskFormat;

use crate::{
    archive::{self, Package, quote},
    command,
    definition::{Definition, Variant},
    initramfs, kernel,
    kernel_package::{self, KernelPackage},
    manifest::{self, Manifest},
};

/// Makes an ext4 image out of a tar archive: standard input to standard output.
const ASSEMBLE: &str = include_str!("assemble.sh");
/// The end of each build's work inside the new root file system.
const FINISH: &str = include_str!("finish.sh");
/// Name of the root disk's file.
pub(crate) const ROOT: &str = "root.img";
/// Name of the archive with the root file system's files, a tar packed by zstd.
pub(crate) const FILES: &str = "root.tar.zst";
/// How hard the archive is packed: as fast as it goes.
const FILES_LEVEL: i32 = 1;
/// How an ext4 file system of a node is made, before its folder, its image and its size in bytes: nothing is left for the
/// kernel to initialise at its first mount.
pub const MKE2FS: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-T",
    "default",
    "-b",
    "4096",
    "-L",
    "lab-root",
    "-m",
    "1",
    "-E",
    "lazy_itable_init=0,lazy_journal_init=0",
    "-d",
];

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package could not be had, or the installation failed.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// The kernel's package could not be had.
    #[error(transparent)]
    KernelPackage(#[from] kernel_package::Error),
    /// The kernel could not be unpacked.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The initramfs could not be made.
    #[error(transparent)]
    Initramfs(#[from] initramfs::Error),
    /// A program of the host is missing or failed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// The packages need more than the definition gives.
    #[error("the image {name} does not fit into {size_mib} MiB: raise size_mib in its definition")]
    TooSmall {
        /// The image.
        name: String,
        /// Size of its root file system in MiB.
        size_mib: u64,
    },
    /// The host refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// An error of the host at a path.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// Build `definition` into the folder `out`, with temporary files in the folder `work`; returns the manifest, not yet
/// written.
pub(crate) fn build(
    definition: &Definition,
    work: &Path,
    out: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Manifest, Error> {
    progress("downloading the kernel");
    let package = kernel_package::fetch_kernel(&work.join("kernel"), &definition.suite, &definition.kernel)?;
    progress("making the initramfs");
    boot_files(&package, out)?;
    let overlay = work.join("overlay.tar");
    overlay::write(definition, &package, work, &overlay)?;
    progress(match definition.variant {
        Variant::Install => "installing packages: takes a minute or two",
        Variant::Extract => "unpacking packages",
    });
    let mut packages = root(definition, &package, work, &overlay, &out.join(ROOT))?;
    packages.extend(package.packages);
    packages.sort();
    packages.dedup();
    progress("computing digests");
    let mut files = std::collections::BTreeMap::new();
    for name in ["kernel", "initrd", ROOT] {
        let path = out.join(name);
        files.insert(name.to_owned(), manifest::digest_file(&path).map_err(io_error("read", &path))?);
    }
    Ok(Manifest {
        version: manifest::VERSION,
        name: definition.name.clone(),
        description: definition.description.clone(),
        architecture: "x86_64".into(),
        source: definition.suite.clone(),
        definition: definition.digest.clone(),
        created_unix_s: now_unix_s(),
        ssh: definition.ssh,
        clock_port: definition.clock_port,
        cloud_init: false,
        cmdline: definition.cmdline.clone(),
        root_file: ROOT.into(),
        root_format: DiskFormat::Raw,
        root_bytes: definition.size_mib << 20,
        root_sector_bytes: 512,
        files,
        packages,
    })
}

/// Seconds since 1970.
pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|duration| duration.as_secs()).unwrap_or_default()
}

/// Write `kernel` and `initrd`.
fn boot_files(package: &KernelPackage, out: &Path) -> Result<(), Error> {
    let read = |path: &Path| fs::read(path).map_err(io_error("read", path));
    let write = |name: &str, bytes: Vec<u8>| {
        let path = out.join(name);
        fs::write(&path, bytes).map_err(io_error("write", &path))
    };
    write("kernel", kernel::unpack(&read(&package.bzimage)?)?)?;
    write("initrd", initramfs::node_initramfs(read(&package.busybox)?, &package.modules_dir)?)
}

/// Make the root file system's image, and beside it the archive of its files; returns the packages in it.
fn root(
    definition: &Definition,
    kernel: &KernelPackage,
    work: &Path,
    overlay: &Path,
    image: &Path,
) -> Result<Vec<Package>, Error> {
    let list = work.join("packages");
    let logs = [work.join("mmdebstrap.log"), work.join("assemble.log")];
    let log = |path: &PathBuf| File::create(path).map_err(io_error("write", path));

    let mut mmdebstrap = archive::mmdebstrap(&definition.suite)?;
    mmdebstrap.args(["--format=tar", "--skip=output/dev,essential/unlink"]);
    match definition.variant {
        // The package lists stay: a node's `apt update` then fetches only what is newer than its image.
        Variant::Install => mmdebstrap.args(["--variant=minbase", "--skip=cleanup/apt/lists"]),
        Variant::Extract => mmdebstrap.arg("--variant=extract"),
    };
    mmdebstrap.arg(format!("--include={}", definition.packages.join(",")));
    mmdebstrap.args(definition.exclude.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
    mmdebstrap.args(definition.keep.iter().map(|pattern| format!("--dpkgopt=path-include={pattern}")));
    // The last hook that mmdebstrap runs for each variant.
    let hook = match definition.variant {
        Variant::Install => "--customize-hook",
        Variant::Extract => "--extract-hook",
    };
    mmdebstrap.arg(format!("{hook}=tar-in {} /", quote(&overlay.to_string_lossy())));
    if definition.modules {
        mmdebstrap.arg(format!("{hook}=chroot \"$1\" depmod {}", quote(&kernel.version)));
    }
    for shell in &definition.commands {
        mmdebstrap.arg(format!("{hook}=chroot \"$1\" /bin/sh -e -c {}", quote(shell)));
    }
    mmdebstrap.arg(format!("{hook}={FINISH}"));
    mmdebstrap.arg(format!("{hook}=download /packages {}", quote(&list.to_string_lossy())));
    mmdebstrap.arg(format!("{hook}=rm \"$1/packages\""));
    mmdebstrap.args([definition.suite.as_str(), "-"]);
    mmdebstrap.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log(&logs[0])?);

    // The file is given open, and open for all: inside a user namespace, neither its folder nor its owner is known.
    let file = File::create(image).map_err(io_error("write", image))?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o666))
        .map_err(|error| io_error("write", image)(error.into()))?;
    let mut assemble = if rustix::process::geteuid().is_root() {
        mmdebstrap.env("TMPDIR", work);
        let mut assemble = Command::new("sh");
        assemble.env("TMPDIR", work);
        assemble
    } else {
        let mut assemble = Command::new("mmdebstrap");
        assemble.args(["--unshare-helper", "sh"]);
        assemble
    };
    // mke2fs is often in a folder that is not on a user's PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    assemble.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    assemble.args(["-c", ASSEMBLE, "sh", &format!("{}M", definition.size_mib)]).args(MKE2FS);
    assemble.stdin(Stdio::piped()).stdout(file).stderr(log(&logs[1])?);
    let archive = image.with_file_name(FILES);
    let files = File::create(&archive).map_err(io_error("write", &archive))?;

    let start = |command: &mut Command| {
        command.spawn().map_err(|source| command::start_error(command.get_program(), source))
    };
    let mut producer = start(&mut mmdebstrap)?;
    let mut consumer = start(&mut assemble);
    let to = consumer.as_mut().ok().and_then(|consumer| consumer.stdin.take());
    // Without a consumer the pipe is closed all the same, so that mmdebstrap is not left writing to nobody.
    let kept = match (producer.stdout.take(), to) {
        (Some(tar), Some(to)) => pass_on(tar, to, files),
        _ => Ok(()),
    };
    let made = finish(&mut producer, "mmdebstrap", &logs[0]);
    let packed = finish(&mut consumer?, "mke2fs", &logs[1]);
    // Whoever failed first has the better reason: a consumer that ends makes mmdebstrap fail with a broken pipe.
    if let Err(command::Error::Failed { output, .. }) = &packed {
        if output.contains("Could not allocate block") || output.contains("too small") {
            let (name, size_mib) = (definition.name.clone(), definition.size_mib);
            return Err(Error::TooSmall { name, size_mib });
        }
        if output.contains("mke2fs: not found") {
            return Err(command::Error::Missing { program: "mke2fs".into(), package: "e2fsprogs" }.into());
        }
    }
    made.map_err(|error| archive::explain(error, &definition.suite))?;
    packed?;
    kept.map_err(io_error("write", &archive))?;
    let file = File::open(image).map_err(io_error("open", image))?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o644))
        .map_err(|error| io_error("write", image)(error.into()))?;
    let text = fs::read_to_string(&list).map_err(io_error("read", &list))?;
    Ok(text.lines().filter_map(package_line).collect())
}

/// Gives an archive to the program that makes an image of it, and keeps it packed. A program that takes no more has its
/// reasons, which its status tells.
fn pass_on(mut tar: impl Read, mut to: impl Write, kept: File) -> io::Result<()> {
    let mut kept = zstd::Encoder::new(kept, FILES_LEVEL)?;
    let mut piece = vec![0; 256 << 10];
    loop {
        let length = tar.read(&mut piece)?;
        let bytes = piece.get(..length).unwrap_or_default();
        if bytes.is_empty() {
            kept.finish()?.sync_all()?;
            return Ok(());
        }
        if to.write_all(bytes).is_err() {
            return Ok(());
        }
        kept.write_all(bytes)?;
    }
}

/// `NAME VERSION`, or the name of a .deb file as apt writes it: `NAME_VERSION_ARCHITECTURE.deb`.
fn package_line(line: &str) -> Option<Package> {
    let (name, version) = match line.split_once(' ') {
        Some(pair) => pair,
        None => {
            let (name, rest) = line.strip_suffix(".deb")?.split_once('_')?;
            (name, rest.rsplit_once('_')?.0)
        }
    };
    Some(Package { name: name.into(), version: version.replace("%3a", ":") })
}

/// Wait for a child, whose standard error went to `log`.
fn finish(child: &mut Child, program: &str, log: &Path) -> Result<(), command::Error> {
    let failed = |status: String| {
        let output = fs::read(log).unwrap_or_default();
        command::Error::Failed { program: program.into(), status, output: command::last_lines(&output) }
    };
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(status.to_string())),
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_read_from_either_list() {
        let package =
            |name: &str, version: &str| Some(Package { name: name.into(), version: version.into() });
        assert_eq!(package_line("dbus 1.16.2-2"), package("dbus", "1.16.2-2"));
        let deb = "busybox-static_1%3a1.37.0-6+b9_amd64.deb";
        assert_eq!(package_line(deb), package("busybox-static", "1:1.37.0-6+b9"));
        assert_eq!(package_line("lock"), None);
    }

    #[test]
    fn an_archive_is_passed_on_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILES);
        let tar: Vec<u8> = (0..700_000u32).map(|at| (at % 251) as u8).collect();
        let mut passed = Vec::new();
        pass_on(tar.as_slice(), &mut passed, File::create(&path).unwrap()).unwrap();
        assert_eq!(passed, tar);
        assert_eq!(zstd::decode_all(File::open(&path).unwrap()).unwrap(), tar);
        // Who takes no more ends it.
        let mut room = [0; 10];
        pass_on(tar.as_slice(), room.as_mut_slice(), File::create(&path).unwrap()).unwrap();
    }

    #[test]
    fn a_file_system_is_made_of_an_archive() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/motd"), "hello").unwrap();
        let image = folder.path().join("image");
        let shell = |size: &str| {
            let tar = format!(
                "tar -C {} -c . | sh -c \"$1\" sh {size} \"${{@:2}}\" >{}",
                tree.display(),
                image.display()
            );
            let mut command = Command::new("bash");
            command
                .args(["-o", "pipefail", "-c", &tar, "bash", ASSEMBLE])
                .args(MKE2FS)
                .env("TMPDIR", folder.path());
            command::run(command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap())))
        };
        shell("16M").unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), 16 << 20);
        let bytes = fs::read(&image).unwrap();
        assert_eq!(bytes[0x438..0x43a], [0x53, 0xef], "the magic number of ext4");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing temporary is left");
        fs::write(tree.join("big"), vec![7; 17 << 20]).unwrap();
        let error = shell("16M").unwrap_err().to_string();
        assert!(error.contains("Could not allocate block"), "{error}");
    }
}
