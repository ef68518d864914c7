#!/bin/bash
# ext4-view 1.0.0 (crates.io), on what mke2fs 1.47 makes with `-O metadata_csum -I 128`: inodes of 128 bytes, as every
# file system of the days before ext4 has, with the checksums that are on by default. Linux mounts it, e2fsck is content.
#
# A good guess: a reader that knows metadata_csum reads it, or refuses to load it.
# Seen: it loads, and then each inode is "truncated": `metadata` of a file that is there is an error, and `exists` is an error,
# too; who takes that error for "no" finds an empty disk. With inodes of 256 bytes, or without checksums, all is well.
#
# Needs cargo and mke2fs (Debian's e2fsprogs). Builds in a temporary folder, says OK if all is as told.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
PATH=$PATH:/usr/sbin:/sbin
mkdir src files
echo hello > files/hello
for kind in "small 128 metadata_csum" "large 256 metadata_csum" "plain 128 ^metadata_csum"; do
    set -- $kind
    mke2fs -q -t ext4 -I "$2" -O "$3" -d files "$1" 4M >/dev/null 2>&1
    e2fsck -fn "$1" >/dev/null 2>&1 || { echo "mke2fs made no good file system: $1"; exit 1; }
done
cat > Cargo.toml <<'TOML'
[package]
name = "small-inodes"
version = "0.0.0"
edition = "2024"
[dependencies]
ext4-view = { version = "=1.0.0", features = ["std"] }
TOML
cat > src/main.rs <<'RUST'
fn main() {
    for image in ["small", "large", "plain"] {
        let said = match ext4_view::Ext4::load_from_path(image) {
            Err(error) => format!("not loaded: {error}"),
            Ok(system) => match (system.read_to_string("/hello"), system.exists("/hello")) {
                (Ok(text), Ok(true)) => text.trim().to_string(),
                (text, exists) => format!("error: {:?}, exists: {:?}", text.map_err(|e| e.to_string()), exists.is_ok()),
            },
        };
        println!("{image}: {said}");
    }
}
RUST
cargo run -q --release | tee seen
grep -q '^small: error: .*truncated' seen && grep -qx 'large: hello' seen && grep -qx 'plain: hello' seen || { echo "not as told"; exit 1; }
echo OK
