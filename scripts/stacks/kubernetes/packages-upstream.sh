# What a node of a cluster needs: the container runtime from Debian's archive, Kubernetes from its own repository.
# https://kubernetes.io/docs/setup/production-environment/tools/kubeadm/install-kubeadm/
set -eu
if ! echo "$LAB_OPT_VERSION" | grep -Eqx '1\.[0-9]+'; then
    echo "source = \"upstream\" needs the minor version, as in version = \"1.34\"; the labfile has '$LAB_OPT_VERSION'" >&2
    exit 1
fi
packages="containerd runc containernetworking-plugins iptables conntrack socat openssl kubelet kubeadm kubectl cri-tools"
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    packages="$packages nfs-kernel-server nfs-common"
fi
# Of isv:kubernetes OBS Project <isv:kubernetes@build.opensuse.org>, which signs all minor versions.
fingerprint=DE15B14486CD377B9E876E1A234654DA9A296436

export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 "$@"
}

dpkg --configure -a
apt update
apt install --fix-broken --no-install-recommends ca-certificates gpg
url="https://pkgs.k8s.io/core:/stable:/v$LAB_OPT_VERSION/deb/"
key=/etc/apt/keyrings/kubernetes.asc
install -d -m 755 /etc/apt/keyrings
/usr/lib/apt/apt-helper -o Acquire::Retries=5 download-file "${url}Release.key" "$key.new"
# The key is trusted by its fingerprint, not by where it came from; a file with any other primary key is refused.
found=$(gpg --batch --with-colons --show-keys "$key.new" |
    awk -F: '$1 == "pub" { wanted = 1 } $1 == "fpr" && wanted { print $10; wanted = 0 }')
if [ "$found" != "$fingerprint" ]; then
    rm -f "$key.new"
    echo "${url}Release.key is not Kubernetes' key: its fingerprint is '$found', not $fingerprint" >&2
    exit 1
fi
chmod 644 "$key.new"
mv "$key.new" "$key"
cat > /etc/apt/sources.list.d/kubernetes.sources << END
Types: deb
URIs: $url
Suites: /
Signed-By: $key
END
apt update
# shellcheck disable=SC2086 # one word a package
apt install --fix-broken --no-install-recommends $packages
apt clean
apt-mark hold kubelet kubeadm kubectl
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    systemctl disable nfs-server.service # the step `services` starts it on the master
fi

pause=$(kubeadm config images list --kubernetes-version "$(kubeadm version -o short)" | grep /pause:)
mkdir -p /etc/containerd
cat > /etc/containerd/config.toml << END
version = 2

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$pause"

# Kubernetes' package has its own CNI plugins, in /opt/cni/bin.
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"

# Registries of the lab: /etc/containerd/certs.d/HOST:PORT/hosts.toml
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "/etc/containerd/certs.d"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
END

printf '%s\n' overlay br_netfilter > /etc/modules-load.d/kubernetes.conf
cat > /etc/sysctl.d/90-kubernetes.conf << 'END'
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
END
systemctl enable containerd.service kubelet.service
