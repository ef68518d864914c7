# Makes an ext4 image of $1 bytes (with a suffix) on standard output, a regular file, out of the tar archive on standard
# input. Nothing is left for the kernel to initialise at its first mount.
set -eu
tree=$(mktemp -d "${TMPDIR:-/var/tmp}/lab-root-XXXXXX")
trap 'rm -rf "$tree"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$tree"
tar -x -p --numeric-owner --xattrs --xattrs-include='*' -C "$tree"
# Device nodes are not in the archive: whoever boots mounts a devtmpfs there.
mkdir -p "$tree/dev"
mke2fs -q -F -t ext4 -T default -b 4096 -L lab-root -m 1 -E lazy_itable_init=0,lazy_journal_init=0 -d "$tree" /dev/stdout "$1"
