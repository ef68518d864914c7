# What a node of a cluster needs: the container runtime and tools from Debian's archive, Kubernetes' own programs from
# the bundle.
set -eu
# Debian 13's containerd is the last that talks to the kubelets of before 1.23; it knows the later ones, too.
needed="containerd runc containernetworking-plugins iptables conntrack socat openssl curl zstd"
[ "$LAB_OPT_STORAGE" != nfs ] || needed="$needed nfs-kernel-server nfs-common"
# shellcheck disable=SC2086 # one word a package
packages $needed
if [ "$LAB_OPT_STORAGE" = nfs ]; then
    # The step `services` starts it on the master.
    [ -e /etc/kubernetes/kubelet.conf ] || systemctl disable nfs-server.service
fi

zstd -dc --long=27 "$LAB_STEP/k8s-node-binaries.tar.zst" | tar -C /usr/bin -x --no-same-owner kubelet kubeadm kubectl

cat > /etc/systemd/system/kubelet.service << 'END'
[Unit]
Description=kubelet, the node agent of Kubernetes
Documentation=https://kubernetes.io/docs/
StartLimitIntervalSec=0
Wants=network-online.target
After=network-online.target containerd.service

[Service]
# Written by kubeadm and by lab; the first is what a node joins with.
Environment="KUBECONFIGS=--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf"
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
EnvironmentFile=-/etc/default/kubelet
ExecStart=/usr/bin/kubelet $KUBECONFIGS --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
Restart=always
RestartSec=5

[Install]
WantedBy=multi-user.target
END

# kubeadm asks the runtime by crictl, which Debian does not have. This stand-in knows the few questions that kubeadm has,
# and puts them to containerd by its own client.
cat > /usr/local/bin/crictl << 'END'
#!/bin/sh
# A stand-in for crictl: only what kubeadm needs.
runtime() { ctr --address /run/containerd/containerd.sock --namespace k8s.io "$@"; }
has() { [ -n "$(runtime images ls -q "name==$1")" ]; }
while [ "${1#-}" != "${1:-}" ]; do
    case $1 in
        --version | -v) echo "crictl: a stand-in by lab"; exit ;;
        -r | --runtime-endpoint | -i | --image-endpoint) shift 2 ;;
        *) shift ;;
    esac
done
verb=${1:-}
[ $# = 0 ] || shift
case $verb in
    info) runtime version > /dev/null ;;
    inspecti) has "$1" ;;
    pull) has "$1" || { echo "the image $1 is not in the bundle" >&2; exit 1; } ;;
    pods) runtime containers ls -q 'labels."io.cri-containerd.kind"==sandbox' ;;
    stopp) for pod; do runtime tasks kill -s KILL "$pod" || true; done ;;
    rmp) for pod; do runtime tasks rm -f "$pod" || true; runtime containers rm "$pod" || true; done ;;
    *) echo "crictl: this stand-in does not know $verb" >&2; exit 1 ;;
esac
END
chmod 755 /usr/local/bin/crictl

# shellcheck source=/dev/null
. "$LAB_STEP/settings.sh"
