# What a node of a cluster needs: Kubernetes from its own repository, the container runtime from Docker's, since Debian's
# is older than Kubernetes from 1.37 on wants it.
# https://kubernetes.io/docs/setup/production-environment/tools/kubeadm/install-kubeadm/
set -eu
# Of isv:kubernetes OBS Project <isv:kubernetes@build.opensuse.org>, which signs all minor versions.
url="https://pkgs.k8s.io/core:/stable:/v$LAB_OPT_VERSION/deb/"
repository kubernetes "$url" / "" "${url}Release.key" DE15B14486CD377B9E876E1A234654DA9A296436
# shellcheck source=/dev/null
. /etc/os-release
url="https://download.docker.com/linux/$ID"
repository docker "$url" "$VERSION_CODENAME" stable "$url/gpg" 9DC858229FC7DD38854AE2D88D81803C0EBFCD88
packages containerd.io iptables conntrack socat openssl kubelet kubeadm kubectl cri-tools kubernetes-cni
apt-mark hold kubelet kubeadm kubectl
# Its key is renewed every other year: with an old one, everything else could not be installed any more either.
rm /etc/apt/sources.list.d/kubernetes.sources
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    packages nfs-kernel-server nfs-common
    # The step `services` starts it on the master.
    [ -e /etc/kubernetes/kubelet.conf ] || systemctl disable nfs-server.service
fi
systemctl enable containerd.service kubelet.service
