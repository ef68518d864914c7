# Prometheus and Alertmanager from Debian's archive.
set -eu
packages prometheus prometheus-alertmanager
# What they measured of the node that this layer was made in is nobody's. Nor is what they would measure at a node's first
# boot, by the settings of the package: the step `start-server` starts them with the lab's.
systemctl disable prometheus.service prometheus-alertmanager.service
systemctl stop prometheus.service prometheus-alertmanager.service
rm -rf /var/lib/prometheus/metrics2 /var/lib/prometheus/alertmanager
