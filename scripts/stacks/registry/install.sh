# The registry from Debian's archive.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 "$@"
}
dpkg --configure -a
apt update
apt install --fix-broken --no-install-recommends docker-registry openssl
apt clean
# The lab's own configuration comes with the step `serve`.
systemctl disable --now docker-registry.service
