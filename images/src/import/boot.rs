//! What a cloud image boots: the newest kernel that has an initrd, and the root file system that it is to mount.

use std::error::Error as StdError;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::{
    Error,
    disk::{Cursor, Disk},
    version,
};

/// Largest kernel or initrd that is read, in bytes.
const MAX_FILE: u64 = 512 << 20;
/// Most partitions that are looked at.
const MAX_PARTITIONS: usize = 128;

/// What was found in an image.
pub(super) struct Boot {
    /// The kernel, as it is in the image.
    pub kernel: Vec<u8>,
    /// Its initrd.
    pub initrd: Vec<u8>,
    /// The root file system as the kernel's command line names it.
    pub root: String,
    /// Name of the distribution.
    pub description: String,
    /// Whether systemd makes sshd listen on AF_VSOCK by itself (from version 256).
    pub ssh_over_vsock: bool,
}

/// A part of the disk.
struct Part {
    disk: Disk,
    start: u64,
    length: u64,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn StdError + Send + Sync + 'static>> {
        let inside = start.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.length);
        match self.start.checked_add(start) {
            Some(offset) if inside => Ok(self.disk.read_at(buffer, offset)?),
            _ => Err("the file system is larger than its partition".into()),
        }
    }
}

/// A file system, and its name on the kernel's command line.
struct FileSystem {
    ext4: Ext4,
    name: String,
}

/// Find kernel, initrd and root file system.
pub(super) fn find(disk: &Disk) -> Result<Boot, Error> {
    let systems = file_systems(disk)?;
    let is_root = |system: &&FileSystem| {
        exists(&system.ext4, "/usr/lib/os-release") || exists(&system.ext4, "/etc/os-release")
    };
    let Some(root) = systems.iter().find(is_root) else {
        let names: Vec<&str> = systems.iter().map(|system| system.name.as_str()).collect();
        return Err(Error::NoRoot(names.join(", ")));
    };
    // A partition of its own for /boot has the kernels at its top.
    let places = systems.iter().flat_map(|system| [(system, "/boot"), (system, "")]);
    let mut best: Option<(&FileSystem, String, String, String)> = None;
    for (system, folder) in places {
        for (release, kernel, initrd) in kernels(&system.ext4, folder)? {
            if best.as_ref().is_none_or(|(_, other, ..)| version::compare(&release, other).is_gt()) {
                best = Some((system, release, kernel, initrd));
            }
        }
    }
    let Some((system, _, kernel, initrd)) = best else { return Err(Error::NoKernel) };
    let generator = "/usr/lib/systemd/system-generators/systemd-ssh-generator";
    Ok(Boot {
        kernel: read(&system.ext4, &kernel)?,
        initrd: read(&system.ext4, &initrd)?,
        root: root.name.clone(),
        description: description(&root.ext4),
        ssh_over_vsock: exists(&root.ext4, generator)
            || exists(&root.ext4, generator.trim_start_matches("/usr")),
    })
}

/// All ext4 file systems: of the partitions, or of the whole disk if it has none.
fn file_systems(disk: &Disk) -> Result<Vec<FileSystem>, Error> {
    let part = |start, length| Box::new(Part { disk: disk.clone(), start, length });
    let table = gpt::GptConfig::new().writable(false).open_from_device(Cursor::new(disk.clone()));
    let Ok(table) = table else {
        check_length(disk, 0, disk.size_bytes())?;
        let ext4 = Ext4::load(part(0, disk.size_bytes())).map_err(|_| Error::NoFileSystem)?;
        let name = format!("UUID={}", ext4.uuid());
        return Ok(vec![FileSystem { ext4, name }]);
    };
    let sector = table.logical_block_size().as_u64();
    let mut systems = Vec::new();
    for partition in table.partitions().values().filter(|p| p.is_used()).take(MAX_PARTITIONS) {
        let sectors =
            partition.last_lba.checked_sub(partition.first_lba).and_then(|length| length.checked_add(1));
        let start = partition.first_lba.checked_mul(sector);
        let length = sectors.and_then(|sectors| sectors.checked_mul(sector));
        let (Some(start), Some(length)) = (start, length) else { continue };
        let end = start.saturating_add(length);
        if end > disk.size_bytes() {
            return Err(Error::Truncated { end, length: disk.size_bytes() });
        }
        check_length(disk, start, length)?;
        // Boot loaders' and EFI partitions are not ext4.
        if let Ok(ext4) = Ext4::load(part(start, length)) {
            let name = format!("PARTUUID={}", partition.part_guid.hyphenated());
            systems.push(FileSystem { ext4, name });
        }
    }
    if systems.is_empty() { Err(Error::NoFileSystem) } else { Ok(systems) }
}

/// Compare an ext4 file system's size, as its superblock tells it, with that of its partition (ext4 data structures,
/// "The Super Block": magic at 0x38, blocks at 0x4 and 0x150, size of a block at 0x18).
fn check_length(disk: &Disk, start: u64, length: u64) -> Result<(), Error> {
    let mut block = [0; 1024];
    let read = start.checked_add(1024).map(|offset| disk.read_at(&mut block, offset));
    let field =
        |at: usize| block.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    if !matches!(read, Some(Ok(()))) || field(0x38) & 0xffff != 0xef53 {
        return Ok(());
    }
    let blocks = u64::from(field(0x4)) | u64::from(field(0x150)) << 32;
    let bytes =
        1024u64.checked_shl(field(0x18)).and_then(|size| size.checked_mul(blocks)).unwrap_or(u64::MAX);
    match bytes > length {
        true => Err(Error::Truncated { end: start.saturating_add(bytes), length: disk.size_bytes() }),
        false => Ok(()),
    }
}

/// Kernels that have an initrd in a folder: release, kernel, initrd.
fn kernels(ext4: &Ext4, folder: &str) -> Result<Vec<(String, String, String)>, Error> {
    let path = if folder.is_empty() { "/" } else { folder };
    if !exists(ext4, path) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in ext4.read_dir(path).map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let name = entry.file_name();
        let Some(release) = name.as_str().ok().and_then(|name| name.strip_prefix("vmlinuz-")) else {
            continue;
        };
        if release.contains("rescue") {
            continue;
        }
        let initrds = [
            format!("{folder}/initrd.img-{release}"),
            format!("{folder}/initramfs-{release}.img"),
            format!("{folder}/initrd-{release}"),
        ];
        if let Some(initrd) = initrds.into_iter().find(|path| exists(ext4, path)) {
            found.push((release.to_owned(), format!("{folder}/vmlinuz-{release}"), initrd));
        }
    }
    Ok(found)
}

/// What the distribution calls itself.
fn description(ext4: &Ext4) -> String {
    let text = ["/usr/lib/os-release", "/etc/os-release"].iter().find_map(|path| read(ext4, path).ok());
    let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name: String =
        name.unwrap_or_default().trim_matches('"').chars().filter(|c| !c.is_control()).collect();
    name.chars().take(80).collect()
}

fn exists(ext4: &Ext4, path: &str) -> bool {
    ext4.exists(path).unwrap_or(false)
}

fn read(ext4: &Ext4, path: &str) -> Result<Vec<u8>, Error> {
    let bytes = ext4.metadata(path).map_err(damaged)?.len();
    if bytes > MAX_FILE {
        return Err(Error::TooLarge { file: path.into(), bytes });
    }
    ext4.read(path).map_err(damaged)
}

fn damaged(error: Ext4Error) -> Error {
    Error::FileSystem(error.to_string())
}
