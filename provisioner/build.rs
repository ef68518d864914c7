//! Puts the labfiles of `labfiles/` and the files of `scripts/stacks/` into the binary, so that an installed `lab`
//! needs no checkout.

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    let (manifest, out) = (variable("CARGO_MANIFEST_DIR")?, variable("OUT_DIR")?);
    let root = manifest.parent().unwrap_or(&manifest).to_owned();

    // An example is a labfile, or a folder with one and what it takes along.
    let mut labfiles = String::from("const LABFILES: &[(&str, &[File])] = &[\n");
    for path in entries(&root.join("labfiles"))? {
        let mut files = Vec::new();
        if path.is_dir() {
            below(&path, "", &mut files)?;
        } else if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(("lab.toml".to_owned(), path.clone()));
        }
        if files.iter().any(|(name, _)| name == "lab.toml") {
            labfiles += &format!("    ({:?}, &[\n", path.file_stem().unwrap_or_default().to_string_lossy());
            for (name, file) in files {
                let executable = fs::metadata(&file)?.permissions().mode() & 0o100 != 0;
                let file = file.display().to_string();
                labfiles += &format!("        ({name:?}, include_bytes!({file:?}), {executable}),\n");
            }
            labfiles += "    ]),\n";
        }
    }
    fs::write(out.join("labfiles.rs"), labfiles + "];\n")?;

    let mut stacks = String::from("const FILES: &[(&str, &str)] = &[\n");
    for folder in entries(&root.join("scripts/stacks"))? {
        if !folder.is_dir() {
            continue;
        }
        for file in entries(&folder)?.into_iter().filter(|file| file.is_file()) {
            let name = format!("{}/{}", name_of(&folder), name_of(&file));
            stacks += &format!("    ({name:?}, include_str!({:?})),\n", file.display().to_string());
        }
    }
    fs::write(out.join("stacks.rs"), stacks + "];\n")
}

/// The files in a folder, by name; cargo builds again when one is added, changed or removed.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    // What Python, editors and `lab up` leave beside the files is no part of an example.
    paths.retain(|path| {
        let name = name_of(path);
        !name.starts_with('.') && name != "__pycache__" && !name.ends_with(".lock")
    });
    paths.sort();
    Ok(paths)
}

/// Adds all files below a folder, links followed, as they are called from there.
fn below(folder: &Path, prefix: &str, found: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    for path in entries(folder)? {
        let name = format!("{prefix}{}", name_of(&path));
        if path.is_dir() {
            below(&path, &format!("{name}/"), found)?;
        } else {
            found.push((name, path));
        }
    }
    Ok(())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
