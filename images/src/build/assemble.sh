# Makes an ext4 image of $1 bytes (with a suffix) on standard output, a regular file, out of the tar archive on standard
# input; the other arguments are mke2fs'.
set -eu
size=$1
shift
tree=$(mktemp -d "${TMPDIR:-/var/tmp}/lab-root-XXXXXX")
trap 'rm -rf "$tree"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$tree"
tar -x -p --numeric-owner --xattrs --xattrs-include='*' -C "$tree"
# Device nodes are not in the archive: whoever boots mounts a devtmpfs there.
mkdir -p "$tree/dev"
mke2fs "$@" "$tree" /dev/stdout "$size"
