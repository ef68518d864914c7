# Prometheus and Alertmanager from Debian's archive.
set -eu
packages prometheus prometheus-alertmanager
# What they measured of the node that this layer was made in is nobody's.
systemctl stop prometheus.service prometheus-alertmanager.service
rm -rf /var/lib/prometheus/metrics2 /var/lib/prometheus/alertmanager
