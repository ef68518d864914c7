# The control plane's images and what the labfile's options add to the cluster, so that nodes find all of it without a
# download: manifests in /usr/local/share/lab/kubernetes, the images that those name in containerd's store.
set -eu
if [ "$LAB_OPT_GATEWAY" = true ] && [ -z "$LAB_OPT_LOAD_BALANCER" ]; then
    echo "gateway = true needs an address for the Gateway: give some by \`load_balancer\` in the labfile" >&2
    exit 1
fi
# Where a node of a cluster is asked for more, containerd runs, with the settings of the step `runtime`.
if [ ! -e /etc/kubernetes/kubelet.conf ]; then
    rm -f /etc/containerd/config.toml # Docker's package switches off what Kubernetes talks to
    systemctl stop containerd.service
fi
systemctl start containerd.service

# mirrored IMAGE: fetches it from the mirror, and gives it the name that it has upstream: nothing else knows of the mirror.
# Its path there is that of upstream, or the last part of that, where kubeadm looks in a registry of one's own.
mirrored() {
    names=${1##*/}
    [ "${1#*/}" = "$names" ] || names="$names ${1#*/}"
    for name in $names; do
        if again 3 ctr --namespace k8s.io images pull --hosts-dir $hosts "$mirror/$name" > /dev/null; then
            ctr --namespace k8s.io images tag --force "$mirror/$name" "$1"
            return
        fi
    done
    echo "cannot fetch the image $1 from $mirror" >&2
    echo "look whether this machine reaches it, then run \`lab up\` again" >&2
    return 1
}

version=$(kubeadm version -o short)
if [ -n "$LAB_OPT_IMAGES" ]; then
    hosts=/etc/containerd/certs.d
    mirror=${LAB_OPT_IMAGES#https://}
    mirror=${mirror%/}
    if [ -n "$LAB_OPT_MIRROR_CA" ]; then
        # Pods may name it, too: containerd looks here as long as the node lives.
        mkdir -p "$hosts/${mirror%%/*}"
        printf '%s\n' "$LAB_OPT_MIRROR_CA" > "$hosts/${mirror%%/*}/ca.crt"
        cat > "$hosts/${mirror%%/*}/hosts.toml" << END
server = "https://${mirror%%/*}"

[host."https://${mirror%%/*}"]
capabilities = ["pull", "resolve"]
ca = "$hosts/${mirror%%/*}/ca.crt"
END
    fi
    needed=$(kubeadm config images list --kubernetes-version "$version")
    for image in $needed; do mirrored "$image"; done
else
    kubeadm config images pull --kubernetes-version "$version"
fi

manifests=/usr/local/share/lab/kubernetes
mkdir -p $manifests
github=https://github.com
raw=https://raw.githubusercontent.com
case $LAB_OPT_NETWORK in
    flannel)
        download $github/flannel-io/flannel/releases/download/v0.27.4/kube-flannel.yml $manifests/network.yaml
        # It has the pods' addresses in its configuration.
        sed -i "s,10\.244\.0\.0/16,$LAB_OPT_POD_NETWORK," $manifests/network.yaml
        ;;
    calico)
        # It finds the pods' addresses in kubeadm's configuration.
        download $raw/projectcalico/calico/v3.32.1/manifests/calico.yaml $manifests/network.yaml
        ;;
esac
if [ "$LAB_OPT_METRICS_SERVER" = true ]; then
    download $github/kubernetes-sigs/metrics-server/releases/download/v0.8.0/components.yaml $manifests/metrics-server.yaml
    # Kubelets have certificates of their own making.
    sed -i 's,^\( *\)- --metric-resolution.*,&\n\1- --kubelet-insecure-tls,' $manifests/metrics-server.yaml
    grep -q kubelet-insecure-tls $manifests/metrics-server.yaml
fi
if [ -n "$LAB_OPT_LOAD_BALANCER" ]; then
    download $raw/metallb/metallb/v0.15.3/config/manifests/metallb-native.yaml $manifests/metallb.yaml
fi
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    : > $manifests/csi-nfs.yaml
    for part in rbac-csi-nfs csi-nfs-driverinfo csi-nfs-controller csi-nfs-node; do
        download $raw/kubernetes-csi/csi-driver-nfs/v4.12.1/deploy/v4.12.1/$part.yaml $manifests/part
        { echo ---; cat $manifests/part; } >> $manifests/csi-nfs.yaml
    done
    rm $manifests/part
fi
if [ "$LAB_OPT_GATEWAY" = true ]; then
    download $github/envoyproxy/gateway/releases/download/v1.9.0/install.yaml $manifests/gateway.yaml
    # What its manifest does not name: Envoy itself, which the controller starts.
    envoy=docker.io/envoyproxy/envoy:distroless-v1.39.0
fi

images=$(sed -n 's/^ *\(- \)\{0,1\}image: *"\{0,1\}\([^" ]*\)"\{0,1\} *$/\2/p' $manifests/*.yaml 2> /dev/null | sort -u)
for image in $images ${envoy:-}; do
    if ! again 3 crictl --runtime-endpoint unix:///run/containerd/containerd.sock pull "$image"; then
        echo "cannot fetch the image $image" >&2
        echo "look whether this machine reaches its registry, then run \`lab up\` again" >&2
        exit 1
    fi
done
[ -e /etc/kubernetes/kubelet.conf ] || systemctl stop containerd.service
