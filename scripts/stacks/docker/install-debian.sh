# Docker from Debian's archive. Recommended packages are left out; docker-cli is only recommended, yet needed, and
# registries are spoken to over TLS.
set -eu
packages="docker.io docker-cli ca-certificates curl"
[ "$LAB_OPT_PLUGINS" = no ] || packages="$packages docker-buildx docker-compose"
[ -z "$LAB_OPT_MIRROR" ] || packages="$packages jq"
[ "$LAB_OPT_ROOTLESS" = no ] || packages="$packages rootlesskit uidmap slirp4netns dbus-user-session"
# shellcheck disable=SC2086 # one word a package
packages $packages

if [ "$LAB_OPT_ROOTLESS" = yes ]; then
    # Debian has upstream's two scripts, but not where they look for each other and for the programs.
    ln -sf /usr/share/docker.io/contrib/dockerd-rootless.sh /usr/share/docker.io/contrib/dockerd-rootless-setuptool.sh \
        /usr/bin/
fi

# Containers are layers of overlayfs, and their bridge's traffic passes the firewall.
printf '%s\n' overlay br_netfilter > /etc/modules-load.d/docker.conf
systemctl enable docker.service

# The daemon has been started by its package. The next one draws an id of its own, in whatever node this disk is.
rm -f /var/lib/docker/engine-id
