//! Kernel modules: finding them below `lib/modules/RELEASE`, what they need, and unpacking them.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use elf::{ElfBytes, endian::LittleEndian};

/// Largest module that is unpacked, in bytes; xfs, Debian's largest here, has 6 MB.
const MAX_MODULE: u64 = 64 << 20;
/// Memory that unpacking an xz file may take, in KiB.
const XZ_MEMORY_KIB: u32 = 128 << 10;

/// Why a module cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no such module, neither as a file nor built in.
    #[error("the kernel {release} has no module {name}")]
    NoSuchModule {
        /// The kernel's release.
        release: String,
        /// The module.
        name: String,
    },
    /// A module file that cannot be unpacked or understood.
    #[error("the kernel module {} is corrupt: {reason}", path.display())]
    Corrupt {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The host refused to read it.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// A kernel's modules.
pub struct Tree {
    release: String,
    /// Files by the modules' names.
    files: BTreeMap<String, PathBuf>,
    /// Names of what is built in.
    builtin: Vec<String>,
}

/// A module, unpacked.
#[derive(Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file, with its signature.
    pub bytes: Vec<u8>,
    /// What it needs directly.
    pub needs: Vec<String>,
}

/// A module's name as the kernel writes it.
pub(crate) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's name of a file `virtio-net.ko.xz`.
fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, suffix) = file.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst" | ".gz").then(|| normal(name))
}

impl Tree {
    /// Find the modules in `lib/modules/RELEASE`.
    pub fn open(folder: &Path) -> Result<Tree, Error> {
        let read = |path: &Path, source| Error::Read { path: path.into(), source };
        let builtin = folder.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin).map_err(|e| read(&builtin, e))?;
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.join("kernel")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|e| read(&folder, e))? {
                let entry = entry.map_err(|e| read(&folder, e))?;
                if entry.file_type().map_err(|e| read(&folder, e))?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = name_of(&entry.file_name().to_string_lossy()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Tree {
            release: folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            files,
            builtin: builtin.lines().filter_map(name_of).collect(),
        })
    }

    /// The kernel's release.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Files of all modules.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.values().map(PathBuf::as_path)
    }

    /// These modules and all that they need, each behind what it needs; what is built in is passed over.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Module>, Error> {
        let mut loaded: Vec<Module> = Vec::new();
        for name in names {
            self.add(&normal(name), &mut loaded, &mut Vec::new())?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<Module>, path: &mut Vec<String>) -> Result<(), Error> {
        // A cycle cannot be loaded by the kernel either; stopping is enough.
        let known = loaded.iter().any(|m| m.name == name) || path.iter().any(|n| n == name);
        if known || self.builtin.iter().any(|builtin| builtin == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            return Err(Error::NoSuchModule { release: self.release.clone(), name: name.into() });
        };
        let bytes = unpack(file)?;
        let (needs, wishes) = dependencies(file, &bytes)?;
        path.push(name.into());
        for need in &needs {
            self.add(need, loaded, path)?;
        }
        // A soft dependency (crc32c for ext4) is loaded first where the kernel has it.
        let wishes: Vec<String> = wishes.into_iter().filter(|wish| self.files.contains_key(wish)).collect();
        for wish in &wishes {
            self.add(wish, loaded, path)?;
        }
        path.pop();
        let needs = needs.into_iter().chain(wishes).collect();
        loaded.push(Module { name: name.into(), bytes, needs });
        Ok(())
    }
}

impl Module {
    /// Names of all modules that must be loaded before this one, the last needed first, as `modules.dep` has them.
    pub(crate) fn all_dependencies<'a>(&self, modules: &'a [Module]) -> Vec<&'a str> {
        let mut found: Vec<&str> = Vec::new();
        let mut open: Vec<&str> = self.needs.iter().map(String::as_str).collect();
        while let Some(name) = open.pop() {
            if let Some(module) = modules.iter().find(|m| m.name == name && !found.contains(&name)) {
                found.push(&module.name);
                open.extend(module.needs.iter().map(String::as_str));
            }
        }
        // `modules` is in load order; modprobe walks the line from its end.
        let order = |name: &&str| modules.iter().position(|m| m.name == *name);
        found.sort_by_key(|name| std::cmp::Reverse(order(name)));
        found
    }
}

/// The content of a module's file, unpacked.
pub fn unpack(path: &Path) -> Result<Vec<u8>, Error> {
    let packed = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let corrupt = |reason: String| Error::Corrupt { path: path.into(), reason };
    let mut bytes = Vec::new();
    let read = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new_mem_limit(packed.as_slice(), false, XZ_MEMORY_KIB)
            .take(MAX_MODULE)
            .read_to_end(&mut bytes),
        Some("zst") => ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
            .map_err(|error| corrupt(error.to_string()))?
            .take(MAX_MODULE)
            .read_to_end(&mut bytes),
        Some("gz") => {
            flate2::read::GzDecoder::new(packed.as_slice()).take(MAX_MODULE).read_to_end(&mut bytes)
        }
        _ => return Ok(packed),
    };
    read.map_err(|error| corrupt(error.to_string()))?;
    Ok(bytes)
}

/// What a module needs (`depends=`) and what it wishes for (`softdep=pre: …`), from its section `.modinfo`.
fn dependencies(path: &Path, bytes: &[u8]) -> Result<(Vec<String>, Vec<String>), Error> {
    let corrupt = |reason: String| Error::Corrupt { path: path.into(), reason };
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).map_err(|error| corrupt(error.to_string()))?;
    let section = file.section_header_by_name(".modinfo").map_err(|error| corrupt(error.to_string()))?;
    let section = section.ok_or_else(|| corrupt("it has no section .modinfo".into()))?;
    let (data, _) = file.section_data(&section).map_err(|error| corrupt(error.to_string()))?;
    let (mut needs, mut wishes) = (Vec::new(), Vec::new());
    for field in data.split(|byte| *byte == 0) {
        let field = String::from_utf8_lossy(field);
        if let Some(names) = field.strip_prefix("depends=") {
            needs.extend(names.split(',').filter(|name| !name.is_empty()).map(normal));
        } else if let Some(soft) = field.strip_prefix("softdep=pre:") {
            wishes.extend(soft.split_whitespace().take_while(|word| *word != "post:").map(normal));
        }
    }
    Ok((needs, wishes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, needs: &[&str]) -> Module {
        Module { name: name.into(), bytes: Vec::new(), needs: needs.iter().map(|n| n.to_string()).collect() }
    }

    #[test]
    fn file_names_become_module_names() {
        assert_eq!(name_of("kernel/drivers/net/virtio-net.ko.xz").as_deref(), Some("virtio_net"));
        assert_eq!(name_of("ext4.ko").as_deref(), Some("ext4"));
        assert_eq!(name_of("modules.order"), None);
        assert_eq!(name_of("x.ko.bak"), None);
    }

    #[test]
    fn dependencies_are_told_last_first() {
        let modules = [module("a", &[]), module("b", &["a"]), module("c", &["b", "a"]), module("d", &[])];
        assert_eq!(modules[2].all_dependencies(&modules), ["b", "a"]);
        assert!(modules[3].all_dependencies(&modules).is_empty());
    }

    #[test]
    fn what_is_no_module_is_corrupt() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.ko.xz");
        fs::write(&path, b"not xz").unwrap();
        let error = unpack(&path).unwrap_err();
        assert!(error.to_string().contains("x.ko.xz is corrupt"), "{error}");
        let error = dependencies(&path, b"\x7fELF").unwrap_err();
        assert!(error.to_string().contains("x.ko.xz is corrupt"), "{error}");
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("6.1.0-test");
        fs::create_dir_all(tree.join("kernel")).unwrap();
        fs::write(tree.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let tree = Tree::open(&tree).unwrap();
        assert!(tree.closure(&["ext4"]).unwrap().is_empty());
        let error = tree.closure(&["virtio-blk"]).unwrap_err();
        assert_eq!(error.to_string(), "the kernel 6.1.0-test has no module virtio_blk");
    }
}
