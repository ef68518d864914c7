# Docker from its own repository: https://docs.docker.com/engine/install/debian/
set -eu
packages="docker-ce docker-ce-cli containerd.io curl"
[ "$LAB_OPT_PLUGINS" = no ] || packages="$packages docker-buildx-plugin docker-compose-plugin"
[ -z "$LAB_OPT_MIRROR" ] || packages="$packages jq"
[ "$LAB_OPT_ROOTLESS" = no ] || packages="$packages docker-ce-rootless-extras uidmap slirp4netns dbus-user-session"

# The codename of this distribution; both Debian and Ubuntu have a folder there.
# shellcheck source=/dev/null
. /etc/os-release
url="https://download.docker.com/linux/$ID"
repository docker "$url" "$VERSION_CODENAME" stable "$url/gpg" 9DC858229FC7DD38854AE2D88D81803C0EBFCD88
# shellcheck disable=SC2086 # one word a package
packages $packages

# Containers are layers of overlayfs, and their bridge's traffic passes the firewall.
printf '%s\n' overlay br_netfilter > /etc/modules-load.d/docker.conf
systemctl enable docker.service

# The daemon has been started by its package. The next one draws an id of its own, in whatever node this disk is.
rm -f /var/lib/docker/engine-id
