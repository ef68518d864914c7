# The last hook of mmdebstrap: $1 is its root folder. Lists the packages, one a line, as "NAME VERSION" where dpkg knows
# them, as names of .deb files where they were only unpacked; removes what was downloaded, and the host's own name and
# name servers, which mmdebstrap copies.
set -eu
if [ -s "$1/var/lib/dpkg/status" ]; then
    chroot "$1" dpkg-query -W -f '${Package} ${Version}\n' >"$1/packages"
else
    (cd "$1/var/cache/apt/archives" && ls) >"$1/packages"
fi
rm -f "$1"/var/cache/apt/archives/*.deb
for file in etc/hostname etc/resolv.conf; do
    if [ ! -L "$1/$file" ] && cmp -s "/$file" "$1/$file"; then
        rm "$1/$file"
    fi
done
