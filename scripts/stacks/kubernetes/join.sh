# A worker joins the master's cluster.
set -eu
if [ -e /etc/kubernetes/kubelet.conf ]; then
    systemctl start kubelet.service
    exit
fi
# What an earlier try left; the kubelet that it started is in the way.
systemctl stop kubelet.service
rm -rf /etc/kubernetes/bootstrap-kubelet.conf /etc/kubernetes/pki /var/lib/kubelet/config.yaml

# token, authority, api
# shellcheck source=/dev/null
. "$LAB_STEP/join"
socket=unix:///run/containerd/containerd.sock
[ "$api" != v1beta2 ] || socket=${socket#unix://}
config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat > "$config" << END
apiVersion: kubeadm.k8s.io/$api
kind: JoinConfiguration
discovery:
  timeout: 15m
  bootstrapToken:
    apiServerEndpoint: "$LAB_MASTER_IP:6443"
    token: $token
    caCertHashes: [$authority]
nodeRegistration:
  name: $LAB_NODE
  criSocket: $socket
END
kubeadm join --config "$config" --ignore-preflight-errors=NumCPU,Mem,SystemVerification
