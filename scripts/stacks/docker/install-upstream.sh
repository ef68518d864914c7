# Docker from its own repository: https://docs.docker.com/engine/install/debian/
set -eu
packages="docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin"
fingerprint=9DC858229FC7DD38854AE2D88D81803C0EBFCD88

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
    # The codename of this distribution; both Debian and Ubuntu have a folder there.
    # shellcheck source=/dev/null
    . /etc/os-release
    url="https://download.docker.com/linux/$ID"

    # An installation that was cut short is finished first.
    dpkg --configure -a
    apt update
    apt install --fix-broken --no-install-recommends ca-certificates gpg

    install -d -m 755 /etc/apt/keyrings
    key=/etc/apt/keyrings/docker.asc
    /usr/lib/apt/apt-helper -o Acquire::Retries=5 download-file "$url/gpg" "$key.new"
    # The key is trusted by its fingerprint, not by where it came from; a file with any other primary key is refused.
    found=$(gpg --batch --with-colons --show-keys "$key.new" |
        awk -F: '$1 == "pub" { wanted = 1 } $1 == "fpr" && wanted { print $10; wanted = 0 }')
    if [ "$found" != "$fingerprint" ]; then
        rm -f "$key.new"
        echo "$url/gpg is not Docker's key: its fingerprint is '$found', not $fingerprint" >&2
        exit 1
    fi
    chmod 644 "$key.new"
    mv "$key.new" "$key"

    cat > /etc/apt/sources.list.d/docker.sources << END
Types: deb
URIs: $url
Suites: $VERSION_CODENAME
Components: stable
Architectures: $(dpkg --print-architecture)
Signed-By: $key
END
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
