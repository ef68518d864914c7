//! Fetches a Debian suite's cloud kernel and makes a node's initramfs for it: `fetch-kernel SUITE FOLDER`.

use std::{fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(suite), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("usage: fetch-kernel SUITE FOLDER".into());
    };
    let folder = PathBuf::from(folder);
    let package = lab_images::kernel_package::fetch(&folder.join("package"), &suite)?;
    fs::write(folder.join("kernel"), lab_images::kernel::unpack(&fs::read(&package.bzimage)?)?)?;
    let busybox = fs::read(&package.busybox)?;
    fs::write(folder.join("initrd"), lab_images::initramfs::node_initramfs(busybox, &package.modules_dir)?)?;
    println!("{} {:?}", package.version, package.packages);
    Ok(())
}
