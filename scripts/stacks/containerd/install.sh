# containerd, and what its containers' network is made with.
# https://github.com/containerd/containerd/blob/main/docs/getting-started.md
set -eu
if [ "$LAB_SOURCE" = upstream ]; then
    # Docker's repository; runc is in the same package.
    # shellcheck source=/dev/null
    . /etc/os-release
    url="https://download.docker.com/linux/$ID"
    repository docker "$url" "$VERSION_CODENAME" stable "$url/gpg" 9DC858229FC7DD38854AE2D88D81803C0EBFCD88
    packages containerd.io
else
    packages containerd runc
fi
packages containernetworking-plugins iptables ca-certificates

# A node of a cluster has settings of its own, and the cluster's network. The network here has a name that comes after
# that one's, so it makes no difference which of the stacks comes first.
if [ ! -e /usr/bin/kubelet ]; then
    install -D -m 644 "$LAB_STEP/config.toml" /etc/containerd/config.toml
fi
install -D -m 644 "$LAB_STEP/99-bridge.conflist" /etc/cni/net.d/99-bridge.conflist
mkdir -p /etc/containerd/certs.d
echo overlay > /etc/modules-load.d/containerd.conf
systemctl enable containerd.service
# The package has started it with other settings. Containers do not mind.
systemctl stop containerd.service
