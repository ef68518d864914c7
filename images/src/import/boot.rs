//! What a cloud image boots: kernel, initrd and root file system of one installed system.

use lab_vmm::boot::is_initrd;

use super::{Error, access, disk::Disk, efi, filesystem::FileSystem, menu, recognise, volumes};

/// What was found in an image.
pub(super) struct Boot {
    /// The kernel, as it is in the image.
    pub kernel: Vec<u8>,
    /// Its path there.
    pub kernel_path: String,
    /// Its initrd.
    pub initrd: Vec<u8>,
    /// The root file system as the kernel's command line names it.
    pub root: String,
    /// Name of the distribution.
    pub description: String,
    /// Whether systemd makes sshd listen on AF_VSOCK by itself (from version 256).
    pub ssh_over_vsock: bool,
    /// Size of the sectors that the partition table counts in, in bytes.
    pub sector_bytes: u32,
    /// What the image seems to lack for a node, a sentence each.
    pub warnings: Vec<String>,
}

/// A kernel in an image that has an initrd.
pub(super) struct Kernel<'f> {
    /// The file system that it is in.
    pub system: &'f FileSystem,
    /// Its folder there, `/boot` or nothing.
    pub folder: &'static str,
    /// Name of its file.
    pub name: String,
    /// What its name says behind `vmlinuz-`: with most distributions, its release.
    pub release: String,
    /// Path of its initrd.
    pub initrd: String,
}

impl Kernel<'_> {
    /// The path of a file beside it.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    /// Whether it lies beside another.
    pub fn same_folder(&self, other: &Self) -> bool {
        std::ptr::eq(self.system, other.system) && self.folder == other.folder
    }
}

/// Find kernel, initrd and root file system.
pub(super) fn find(disk: &Disk) -> Result<Boot, Error> {
    recognise::foreign(disk)?;
    let (volumes, sector_bytes) = volumes::all(disk)?;
    let systems: Vec<&FileSystem> =
        volumes.iter().filter_map(|volume| volume.content.as_ref().ok()).collect();
    let mut own = Vec::new();
    for root in systems.iter().copied().filter(|system| is_root(system)) {
        own.push((root, kernels(root, &systems)?));
    }
    if own.is_empty() {
        return Err(Error::NoRoot(volumes::list(&volumes)));
    }
    // A kernel belongs to the root that has its modules, wherever it lies itself.
    let with_modules = own.iter().find_map(|(root, kernels)| {
        let kernels: Vec<_> = kernels.iter().filter(|kernel| has_modules(root, &kernel.release)).collect();
        Some((*root, menu::default(root, &kernels)?))
    });
    let any = || {
        own.iter().find_map(|(root, kernels)| {
            Some((*root, menu::default(root, &kernels.iter().collect::<Vec<_>>())?))
        })
    };
    let Some((root, kernel)) = with_modules.or_else(any) else {
        let is_fat =
            |volume: &&volumes::Volume| matches!(&volume.content, Err(what) if what == recognise::FAT);
        let others =
            volumes.iter().filter(is_fat).find_map(|volume| efi::kernels(disk, volume.start, volume.length));
        return Err(Error::NoKernel(others.unwrap_or_default()));
    };
    let generator = "/usr/lib/systemd/system-generators/systemd-ssh-generator";
    let kernel_path = kernel.path(&kernel.name);
    let initrd = kernel.system.read(&kernel.initrd)?;
    if !is_initrd(&initrd) {
        return Err(Error::NoInitrd(kernel.initrd.clone()));
    }
    Ok(Boot {
        kernel: kernel.system.read(&kernel_path)?,
        kernel_path,
        initrd,
        root: root.name.clone(),
        description: description(root),
        ssh_over_vsock: root.exists(generator) || root.exists(generator.trim_start_matches("/usr")),
        sector_bytes,
        warnings: access::warnings(root),
    })
}

fn has_modules(root: &FileSystem, release: &str) -> bool {
    ["/usr/lib/modules", "/lib/modules"].iter().any(|folder| root.exists(&format!("{folder}/{release}")))
}

fn is_root(system: &FileSystem) -> bool {
    system.exists("/usr/lib/os-release") || system.exists("/etc/os-release")
}

/// The kernels with an initrd that a system with this root may boot: in itself, or in a file system that is no other
/// system's. A partition of its own for /boot has them at its top.
fn kernels<'f>(root: &'f FileSystem, systems: &[&'f FileSystem]) -> Result<Vec<Kernel<'f>>, Error> {
    let mut found = Vec::new();
    for system in systems.iter().copied().filter(|system| std::ptr::eq(*system, root) || !is_root(system)) {
        for folder in ["/boot", ""] {
            for name in system.names(if folder.is_empty() { "/" } else { folder })? {
                let Some(release) = name.strip_prefix("vmlinuz-") else { continue };
                let initrds = [
                    format!("{folder}/initrd.img-{release}"),
                    format!("{folder}/initramfs-{release}.img"),
                    format!("{folder}/initrd-{release}"),
                ];
                let release = release.to_owned();
                if let Some(initrd) = initrds.into_iter().find(|path| system.exists(path)) {
                    found.push(Kernel { system, folder, name, release, initrd });
                }
            }
        }
    }
    Ok(found)
}

/// What the distribution calls itself.
fn description(root: &FileSystem) -> String {
    let text = ["/usr/lib/os-release", "/etc/os-release"].iter().find_map(|path| root.text(path));
    let text = text.unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name: String =
        name.unwrap_or_default().trim_matches('"').chars().filter(|c| !c.is_control()).collect();
    name.chars().take(80).collect()
}
