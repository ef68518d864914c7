//! Puts the labfiles of `labfiles/` and the files of `scripts/stacks/` into the binary, so that an installed `lab`
//! needs no checkout.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    let (manifest, out) = (variable("CARGO_MANIFEST_DIR")?, variable("OUT_DIR")?);
    let root = manifest.parent().unwrap_or(&manifest).to_owned();

    let mut labfiles = String::from("const LABFILES: &[(&str, &str)] = &[\n");
    for file in entries(&root.join("labfiles"))? {
        if file.extension().is_some_and(|extension| extension == "toml") {
            labfiles += &entry(&file.file_stem().unwrap_or_default().to_string_lossy(), &file);
        }
    }
    fs::write(out.join("labfiles.rs"), labfiles + "];\n")?;

    let mut stacks = String::from("const FILES: &[(&str, &str)] = &[\n");
    for folder in entries(&root.join("scripts/stacks"))? {
        if !folder.is_dir() {
            continue;
        }
        for file in entries(&folder)?.into_iter().filter(|file| file.is_file()) {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            stacks += &entry(&format!("{}/{}", name(&folder), name(&file)), &file);
        }
    }
    fs::write(out.join("stacks.rs"), stacks + "];\n")
}

/// The files in a folder, by name; cargo builds again when one is added, changed or removed.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn entry(name: &str, file: &Path) -> String {
    format!("    ({name:?}, include_str!({:?})),\n", file.display().to_string())
}
