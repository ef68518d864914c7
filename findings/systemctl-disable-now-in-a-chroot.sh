#!/bin/bash
# systemd 257 (Debian 13), `systemctl` where no systemd runs: in a chroot, a container's build, a debootstrap hook.
#
# A good guess: `systemctl disable --now UNIT` is `disable` and `stop` in one, and since `stop` is ignored there with status 0
# ("Running in chroot, ignoring command 'stop'", SYSTEMD_OFFLINE=1), so is this.
# Seen: it disables the unit, then fails with status 1: "--now cannot be used when systemd is not running or in conjunction
# with --root=/--global, refusing." A script under `set -e` ends there, with the unit disabled; run again, it fails again.
# The two commands one after the other succeed. The same holds for `enable --now`.
#
# Needs mmdebstrap and Debian's keys (root, or user namespaces). Installs in a temporary folder, says OK if all is as told.
set -eu
version=257
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look" << 'END'
set -u
printf '[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n' > "$1/etc/systemd/system/example.service"
in_root() { chroot "$1" env SYSTEMD_OFFLINE=1 systemctl "${@:2}" 2>&1; }
link=$1/etc/systemd/system/multi-user.target.wants/example.service
{
    echo "version $(chroot "$1" dpkg-query -W -f '${Version}' systemd)"
    in_root "$1" enable example.service > /dev/null; echo "enable: status $?, link $([ -L "$link" ] && echo there)"
    in_root "$1" disable --now example.service | grep -e --now; echo "disable --now: status ${PIPESTATUS[0]}, link $([ -L "$link" ] || echo gone)"
    in_root "$1" stop example.service > /dev/null; echo "stop: status $?"
    in_root "$1" enable example.service > /dev/null
    in_root "$1" disable example.service > /dev/null; echo "disable: status $?, link $([ -L "$link" ] || echo gone)"
} > "$2"
END
: > "$work/seen"
chmod 755 "$work"
chmod 666 "$work/seen"
mmdebstrap --quiet --variant=minbase --include=systemd \
    --customize-hook="bash '$work/look' \"\$1\" '$work/seen'" trixie /dev/null
cat "$work/seen"
grep -q "^version $version" "$work/seen" || { echo "CHANGED: another version"; exit 1; }
tail -n +2 "$work/seen" | diff - <(cat << 'END'
enable: status 0, link there
--now cannot be used when systemd is not running or in conjunction with --root=/--global, refusing.
disable --now: status 1, link gone
stop: status 0
disable: status 0, link gone
END
) || { echo "CHANGED"; exit 1; }
echo "OK"
