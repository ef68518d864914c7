//! Direct boot: kernel and initial RAM file systems into guest memory, and the structures that tell the kernel where
//! everything is. No firmware runs. `pvh` and `bzimage` are the two boot protocols, `foreign` names kernels of others;
//! registers are `cpu::registers`.

mod bzimage;
pub mod foreign;
mod initrd;
mod memory_map;
mod pvh;
mod reset_vector;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use linux_loader::loader::{
    Elf, KernelLoader, bootparam::setup_header, bzimage::BzImage, elf::PvhBootCapability,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub use initrd::{Initrd, is_initrd};

use crate::layout;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{what} {path} {problem}")]
    File {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// Kernel and initial RAM file systems need more memory than there is.
    #[error(
        "the kernel ends at {kernel_end_mib} MiB and the initrds take {initrd_mib} MiB, but only {memory_mib} MiB of \
         memory lie below 3 GiB: give the machine more memory"
    )]
    NoRoom {
        /// End of the kernel in MiB.
        kernel_end_mib: u64,
        /// Size of all initrds in MiB.
        initrd_mib: u64,
        /// Memory below the hole in MiB.
        memory_mib: u64,
    },
    /// The command line is longer than kernels take.
    #[error("the kernel command line is {0} bytes long; a kernel takes at most {max}", max = layout::CMDLINE_MAX)]
    Cmdline(usize),
    /// The command line holds a zero byte.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
    /// A boot structure does not fit into guest memory.
    #[error("cannot write the boot structures into guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the kernel is entered.
#[derive(Debug, Clone)]
pub enum Entry {
    /// At a 32-bit entry point with paging off (PVH).
    Pvh {
        /// Its guest physical address.
        address: u64,
    },
    /// At a bzImage's 64-bit entry point (Linux x86 boot protocol, 64-bit).
    Linux64 {
        /// Its guest physical address.
        address: u64,
        /// The image's setup header.
        header: Box<setup_header>,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// How and where it is entered.
    pub entry: Entry,
    /// First guest physical address that the kernel does not need, its BSS included.
    pub end: u64,
}

/// Bytes of RAM below the hole.
fn low_ram(memory: &GuestMemoryMmap) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Read the kernel at `path` into guest memory.
pub fn load_kernel(memory: &GuestMemoryMmap, path: &Path) -> Result<Kernel, Error> {
    let read = |source| Error::Read { what: "kernel", path: path.into(), source };
    let bad = |problem: String| Error::File { what: "kernel", path: path.into(), problem };
    let mut file = File::open(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let mut head = Vec::with_capacity(foreign::HEAD);
    (&mut file).take(foreign::HEAD as u64).read_to_end(&mut head).map_err(read)?;
    if head.len() < 4 {
        return Err(bad(format!("is {size} bytes long: that is not a kernel")));
    }
    if let Some(name) = foreign::name(&head) {
        return Err(bad(name));
    }
    let kernel = if head.starts_with(b"\x7fELF") {
        load_elf(memory, &mut file).map_err(bad)?
    } else {
        load_bzimage(memory, &mut file, size).map_err(bad)?
    };
    if kernel.end > low_ram(memory) {
        let (needed, there) = (kernel.end.div_ceil(layout::MIB), low_ram(memory) / layout::MIB);
        return Err(bad(format!("needs {needed} MiB of memory below 3 GiB, the machine has {there}")));
    }
    Ok(kernel)
}

fn load_elf(memory: &GuestMemoryMmap, file: &mut File) -> Result<Kernel, String> {
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(layout::HIGH_RAM))).map_err(|error| {
        let memory = low_ram(memory) / layout::MIB;
        format!(
            "cannot be loaded into {memory} MiB ({error}): it is cut short or corrupt, or needs more memory"
        )
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(
            "is an ELF file without a PVH entry point: it needs a kernel configured with CONFIG_PVH=y".into(),
        );
    };
    if entry.0 < layout::HIGH_RAM || entry.0 >= loaded.kernel_end {
        return Err(format!("is corrupt: its PVH entry point {:#x} lies outside of it", entry.0));
    }
    Ok(Kernel { entry: Entry::Pvh { address: entry.0 }, end: loaded.kernel_end })
}

/// What the loader says, without its layers of "Kernel Loader: ".
fn reason(error: &linux_loader::loader::Error) -> String {
    let text = error.to_string();
    text.rsplit("Kernel Loader: ").next().unwrap_or(&text).trim_end_matches('.').to_lowercase()
}

fn load_bzimage(memory: &GuestMemoryMmap, file: &mut File, size: u64) -> Result<Kernel, String> {
    const NEITHER: &str = "is neither an ELF kernel with a PVH entry point nor a bzImage";
    let loaded =
        BzImage::load(memory, None, file, Some(GuestAddress(layout::HIGH_RAM))).map_err(|error| {
            use linux_loader::loader::{Error, bzimage};
            match error {
                Error::Bzimage(bzimage::Error::InvalidBzImage | bzimage::Error::ReadBzImageHeader) => {
                    NEITHER.into()
                }
                error => format!("is cut short or corrupt, or needs more memory ({})", reason(&error)),
            }
        })?;
    let Some(header) = loaded.setup_header else { return Err(NEITHER.into()) };
    bzimage::check(&header, size)?;
    let start = loaded.kernel_load.0;
    Ok(Kernel {
        entry: Entry::Linux64 { address: start + bzimage::ENTRY64, header: Box::new(header) },
        end: bzimage::end(&header, loaded.kernel_end),
    })
}

/// Write command line, memory map and boot structures for `kernel`; the RSDP lies at [`layout::ACPI`].
pub fn describe(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<&Initrd>,
    cmdline: &str,
) -> Result<(), Error> {
    if let Some(initrd) = initrd
        && initrd.address < kernel.end
    {
        return Err(Error::NoRoom {
            kernel_end_mib: kernel.end.div_ceil(layout::MIB),
            initrd_mib: initrd.size.div_ceil(layout::MIB),
            memory_mib: low_ram(memory) / layout::MIB,
        });
    }
    check_cmdline(cmdline)?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    reset_vector::write(memory)?;
    let map = memory_map::build(memory);
    match &kernel.entry {
        Entry::Pvh { .. } => pvh::write(memory, &map, initrd)?,
        Entry::Linux64 { header, .. } => bzimage::write(memory, header, &map, initrd, cmdline)?,
    }
    Ok(())
}

/// Whether a kernel can take this command line.
pub fn check_cmdline(cmdline: &str) -> Result<(), Error> {
    if cmdline.len() > layout::CMDLINE_MAX {
        return Err(Error::Cmdline(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineZero);
    }
    Ok(())
}

/// Read the initial RAM file systems at `paths` to the end of the memory below the hole; none if there are none.
pub fn load_initrds(memory: &GuestMemoryMmap, paths: &[PathBuf]) -> Result<Option<Initrd>, Error> {
    initrd::load(memory, low_ram(memory), paths)
}
