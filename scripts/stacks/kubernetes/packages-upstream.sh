# What a node of a cluster needs: Kubernetes from its own repository, or a mirror of it; the container runtime from
# Docker's, since Debian's is older than Kubernetes from 1.37 on wants it, but beside a mirror from Debian's.
# https://kubernetes.io/docs/setup/production-environment/tools/kubeadm/install-kubeadm/
set -eu
ca=/usr/local/share/ca-certificates/lab-mirror.crt
settings=/etc/apt/apt.conf.d/90lab-mirror
mirror=${LAB_OPT_PACKAGES:-https://pkgs.k8s.io}
url="${mirror%/}/core:/stable:/v$LAB_OPT_VERSION/deb/"
host=${mirror#*://}
host=${host%%/*}
host=${host%%:*}
if [ -n "$LAB_OPT_MIRROR_CA" ]; then
    mkdir -p ${ca%/*}
    printf '%s\n' "$LAB_OPT_MIRROR_CA" > $ca
    printf 'Acquire::https::%s::CaInfo "%s";\n' "$host" $ca > $settings
fi
# The distribution may have a later kubectl, which is no version of this cluster.
printf 'Package: *\nPin: origin "%s"\nPin-Priority: 990\n' "$host" > /etc/apt/preferences.d/kubernetes
if [ -n "$LAB_OPT_PACKAGES_KEY" ]; then
    key=$(mktemp)
    printf '%s\n' "$LAB_OPT_PACKAGES_KEY" > "$key"
    repository kubernetes "$url" / "" "$key"
    rm "$key"
else
    # Of isv:kubernetes OBS Project <isv:kubernetes@build.opensuse.org>, which signs all minor versions.
    repository kubernetes "$url" / "" "${url}Release.key" DE15B14486CD377B9E876E1A234654DA9A296436
fi
runtime=containerd.io
if [ -n "$LAB_OPT_PACKAGES" ]; then
    runtime="containerd runc" # from where the node has all others
else
    # shellcheck source=/dev/null
    . /etc/os-release
    url="https://download.docker.com/linux/$ID"
    repository docker "$url" "$VERSION_CODENAME" stable "$url/gpg" 9DC858229FC7DD38854AE2D88D81803C0EBFCD88
fi
# shellcheck disable=SC2086 # one word a package
packages $runtime iptables conntrack socat openssl curl kubelet kubeadm kubectl cri-tools kubernetes-cni
apt-mark hold kubelet kubeadm kubectl
# Its key is renewed every other year: with an old one, everything else could not be installed any more either.
rm -f /etc/apt/sources.list.d/kubernetes.sources $settings
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    packages nfs-kernel-server nfs-common
    # The step `services` starts it on the master.
    [ -e /etc/kubernetes/kubelet.conf ] || systemctl disable nfs-server.service
fi
# shellcheck source=/dev/null
. "$LAB_STEP/settings.sh"
