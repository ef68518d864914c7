# Starts the node's exporter; that it answers is for the step's `ready` to see.
set -eu
systemctl enable --now prometheus-node-exporter.service
