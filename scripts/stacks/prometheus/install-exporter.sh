# The exporter of a node's metrics, from Debian's archive.
set -eu
packages prometheus-node-exporter
