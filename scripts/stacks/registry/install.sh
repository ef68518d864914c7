# The registry from Debian's archive, and what `lab image push` brings images into it with.
set -eu
packages docker-registry openssl skopeo
# The lab's own configuration comes with the step `serve`.
systemctl disable docker-registry.service
systemctl stop docker-registry.service
