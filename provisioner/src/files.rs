//! Removing files and folders, and giving them second names, so that doing it again does no harm.

use std::{fs, io, path::Path};

use crate::paths;

/// Removes a file, or a folder with all that is in it, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Gives all files below `from` a second name below `to`; those that are there already stay.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    paths::private_dir(to).map_err(io::Error::other)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            link(&entry.path(), &target)?;
        } else if !target.exists() {
            fs::hard_link(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("folder/below"));
        fs::write(&file, "").unwrap();
        fs::create_dir_all(&folder).unwrap();
        for _ in 0..2 {
            remove(&file).unwrap();
            remove(folder.parent().unwrap()).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn trees_are_linked_and_complete_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/file"), "1").unwrap();
        fs::write(from.join("top"), "2").unwrap();
        link(&from.join("a"), &to.join("a")).unwrap();
        link(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/b/file")).unwrap(), "1");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&fs::metadata(to.join("top")).unwrap()), 2);
    }
}
