# A worker joins the master's cluster.
set -eu
# token, authority, api
# shellcheck source=/dev/null
. "$LAB_STEP/join"
socket=unix:///run/containerd/containerd.sock
[ "$api" != v1beta2 ] || socket=${socket#unix://}
if [ -e /etc/kubernetes/kubelet.conf ]; then
    key=$(openssl x509 -pubkey -noout -in /etc/kubernetes/pki/ca.crt | openssl pkey -pubin -outform der | sha256sum)
    if [ "sha256:${key%% *}" = "$authority" ]; then
        systemctl start kubelet.service
        exit
    fi
    # Of a cluster whose master was made anew.
    kubeadm reset --force --cri-socket "$socket"
fi
# What an earlier try left; the kubelet that it started is in the way.
systemctl stop kubelet.service
rm -rf /etc/kubernetes/bootstrap-kubelet.conf /etc/kubernetes/pki /var/lib/kubelet/config.yaml

config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat > "$config" << END
apiVersion: kubeadm.k8s.io/$api
kind: JoinConfiguration
$([ "$api" != v1beta4 ] || echo 'timeouts: {discovery: 15m0s, tlsBootstrap: 15m0s}')
discovery:
$([ "$api" = v1beta4 ] || echo '  timeout: 15m')
  bootstrapToken:
    apiServerEndpoint: "$LAB_MASTER_IP:6443"
    token: $token
    caCertHashes: [$authority]
nodeRegistration:
  name: $LAB_NODE
  criSocket: $socket
END
# The packages of pkgs.k8s.io have a file in the folder of manifests, which kubeadm takes for a node in use before 1.23.
ignored=NumCPU,Mem,SystemVerification,DirAvailable--etc-kubernetes-manifests
if ! kubeadm join --config "$config" --ignore-preflight-errors=$ignored; then
    # With a certificate of its own the node has joined. What kubeadm does after that is to note the runtime's socket on
    # the node, within 10 s, which is not enough for an API server that has much to do.
    [ -e /etc/kubernetes/kubelet.conf ] || exit 1
    again 10 kubectl --kubeconfig=/etc/kubernetes/kubelet.conf annotate --overwrite node "$LAB_NODE" \
        "kubeadm.alpha.kubernetes.io/cri-socket=$socket"
fi
