# The exporter of a node's metrics, from Debian's archive.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 "$@"
}
dpkg --configure -a
apt update
apt install --fix-broken --no-install-recommends prometheus-node-exporter
apt clean
