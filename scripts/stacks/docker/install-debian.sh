# Docker from Debian's archive. Recommended packages are left out; docker-cli is only recommended, yet needed, and
# registries are spoken to over TLS.
set -eu
packages="docker.io docker-cli ca-certificates"

export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 "$@"
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2> /dev/null)" = installed ]
}

missing=
for package in $packages; do
    is_installed "$package" || missing="$missing $package"
done
if [ -n "$missing" ]; then
    # An installation that was cut short is finished first.
    dpkg --configure -a
    apt update
    # shellcheck disable=SC2086 # one word a package
    apt install --fix-broken --no-install-recommends $missing
    apt clean
fi

# Containers are layers of overlayfs, and their bridge's traffic passes the firewall.
printf '%s\n' overlay br_netfilter > /etc/modules-load.d/docker.conf
systemctl enable docker.service

# The daemon has been started by its package. The next one draws an id of its own, in whatever node this disk is.
rm -f /var/lib/docker/engine-id
