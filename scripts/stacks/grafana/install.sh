# Grafana from its own repository: https://grafana.com/docs/grafana/latest/setup-grafana/installation/debian/
set -eu
# The key that has signed the repository since 2023-08-24, as https://apt.grafana.com tells.
repository grafana https://apt.grafana.com stable main \
    https://apt.grafana.com/gpg.key B53AE77BADB630A683046005963FA27710458545
packages grafana curl
