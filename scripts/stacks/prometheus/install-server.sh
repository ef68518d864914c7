# Prometheus and Alertmanager from Debian's archive.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 "$@"
}
dpkg --configure -a
apt update
apt install --fix-broken --no-install-recommends prometheus prometheus-alertmanager
apt clean
# What they measured of the node that this layer was made in is nobody's.
systemctl stop prometheus.service prometheus-alertmanager.service
rm -rf /var/lib/prometheus/metrics2 /var/lib/prometheus/alertmanager
