# The control plane, by the phases of `kubeadm init`: each can be done again, so this goes on where it was cut off. The API
# server starts with its store alone; the controllers, which ask it without end, when it answers.
set -eu
export KUBECONFIG=/etc/kubernetes/admin.conf
version=$(kubeadm version -o short)
minor=${version#v1.}
minor=${minor%%.*}
work=/etc/kubernetes/lab
mkdir -p -m 700 "$work/patches"

# Workers join by it, now and whenever one is added: it holds as long as the lab, inside which it is known.
[ -s "$work/token" ] || (umask 077 && kubeadm token generate > "$work/token")
token=$(cat "$work/token")

api=v1beta4
[ "$minor" -ge 31 ] || api=v1beta3
[ "$minor" -ge 22 ] || api=v1beta2
patches= # where kubeadm takes them from its configuration, it takes no flag for them
[ "$minor" -ge 22 ] || patches="--experimental-patches $work/patches"
socket=unix:///run/containerd/containerd.sock
[ "$minor" -ge 24 ] || socket=${socket#unix://} # earlier ones have no scheme in front of the path
allocate=true
[ "$LAB_OPT_NETWORK" != bridge ] || allocate=false # nodes know their pods' addresses
slow=no
driver=systemd
if [ "$LAB_PATIENCE" -gt 1 ]; then
    slow=yes
    driver=cgroupfs
fi

only_slow() {
    if [ $slow = yes ]; then printf '%s\n' "$@"; fi
}

# arguments NAME=VALUE…: of a part of the control plane, as the configuration's version wants them.
arguments() {
    [ $# -gt 0 ] || return 0
    echo "  extraArgs:"
    for pair; do
        case $api in
            v1beta4) printf '  - {name: "%s", value: "%s"}\n' "${pair%%=*}" "${pair#*=}" ;;
            *) printf '    %s: "%s"\n' "${pair%%=*}" "${pair#*=}" ;;
        esac
    done
}

(umask 077 && cat > "$work/config.yaml") << END
apiVersion: kubeadm.k8s.io/$api
kind: InitConfiguration
bootstrapTokens:
- token: $token
  ttl: "0s"
  usages: [signing, authentication]
  groups: ["system:bootstrappers:kubeadm:default-node-token"]
localAPIEndpoint:
  advertiseAddress: $LAB_IP
nodeRegistration:
  name: $LAB_NODE
  criSocket: $socket
  taints: [] # a lab is small: its master carries pods, too
$([ -n "$patches" ] || printf 'patches: {directory: %s}' "$work/patches")
---
apiVersion: kubeadm.k8s.io/$api
kind: ClusterConfiguration
clusterName: $LAB_NAME
kubernetesVersion: $version
controlPlaneEndpoint: "$LAB_IP:6443"
networking:
  podSubnet: $LAB_OPT_POD_NETWORK
  serviceSubnet: 10.96.0.0/16
apiServer:
  certSANs: ["127.0.0.1", localhost, $LAB_NODE]
$(arguments $(only_slow enable-priority-and-fairness=false profiling=false))
controllerManager:
$(arguments allocate-node-cidrs=$allocate leader-elect=false $(only_slow node-monitor-period=20s node-monitor-grace-period=300s))
scheduler:
$(arguments leader-elect=false)
$([ $api = v1beta4 ] || only_slow 'featureGates:' '  PublicKeysECDSA: true')
$([ $api != v1beta4 ] || only_slow 'encryptionAlgorithm: ECDSA-P256')
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: $driver
$(only_slow 'nodeStatusUpdateFrequency: 30s' 'runtimeRequestTimeout: 15m')
---
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: $LAB_OPT_POD_NETWORK
conntrack:
  maxPerCore: 0
END

rm -f "$work/patches/"*
if [ $slow = yes ]; then
    # Nobody is killed for being slow, and Go's collector runs less often.
    for name in kube-apiserver kube-controller-manager kube-scheduler etcd; do
        cat > "$work/patches/$name+strategic.yaml" << END
spec:
  containers:
  - name: $name
    env:
    - {name: GOGC, value: "400"}
    livenessProbe: {periodSeconds: 60, timeoutSeconds: 60, failureThreshold: 60}
    startupProbe: {periodSeconds: 20, timeoutSeconds: 60, failureThreshold: 120}
END
    done
    echo '    readinessProbe: {periodSeconds: 20, timeoutSeconds: 60, failureThreshold: 60}' \
        >> "$work/patches/kube-apiserver+strategic.yaml"

    # At boot, too, the API server starts with its store alone.
    cat > /usr/local/sbin/lab-control-plane << 'END'
#!/bin/sh -e
# Written by lab: what asks the API server without end is held until that serves, or for half an hour.
cd /etc/kubernetes
mkdir -p lab/later
if [ "$1" = hold ]; then
    for name in kube-controller-manager kube-scheduler; do
        [ ! -e "manifests/$name.yaml" ] || mv "manifests/$name.yaml" lab/later/
    done
    exit
fi
end=$(($(date +%s) + 1800))
until [ "$(curl -sk --max-time 60 https://127.0.0.1:6443/readyz)" = ok ] || [ "$(date +%s)" -ge $end ]; do
    sleep 5
done
mv lab/later/* manifests/
END
    chmod 755 /usr/local/sbin/lab-control-plane
    cat > /etc/systemd/system/lab-control-plane.service << 'END'
[Unit]
Description=The controllers of Kubernetes, when its API server serves
Before=kubelet.service

[Service]
Type=exec
ExecStartPre=/usr/local/sbin/lab-control-plane hold
ExecStart=/usr/local/sbin/lab-control-plane release

[Install]
WantedBy=multi-user.target
END
    systemctl enable lab-control-plane.service
fi

phase() {
    echo "kubeadm init phase $*"
    kubeadm init phase "$@" --config "$work/config.yaml"
}

# answers SECONDS: waits until the API server has no more to do before it serves.
answers() {
    end=$(($(date +%s) + $1))
    until said=$(kubectl get --raw /readyz --request-timeout=30s 2>&1) && [ "$said" = ok ]; do
        if [ "$(date +%s)" -ge $end ]; then
            echo "the API server does not answer within $1 s; last seen: $said" >&2
            ctr --namespace k8s.io containers ls >&2 || true
            journalctl -u kubelet -n 20 --no-pager -o cat >&2 || true
            exit 1
        fi
        sleep 2
    done
}

# asks COMMAND…: what asks a busy API server may be turned away: then again, when it answers.
asks() {
    for left in 4 3 2 1 0; do
        if "$@"; then return; fi
        [ $left = 0 ] && exit 1
        answers 300
    done
}

phase certs all
phase kubeconfig all
phase control-plane apiserver $patches
phase etcd local $patches
phase kubelet-start
answers $((300 * LAB_PATIENCE))
phase control-plane controller-manager $patches
phase control-plane scheduler $patches
asks phase upload-config all
asks phase mark-control-plane
asks phase bootstrap-token
asks phase addon all
# The pods' network, where it consists of pods itself. Some of it can be understood only when the rest is known.
[ "$LAB_OPT_NETWORK" = bridge ] ||
    asks kubectl apply --server-side -f /usr/local/share/lab/kubernetes/network.yaml

authority=$(openssl x509 -pubkey -noout -in /etc/kubernetes/pki/ca.crt | openssl pkey -pubin -outform der | sha256sum)
umask 077
printf 'token=%s\nauthority=sha256:%s\napi=%s\n' "$token" "${authority%% *}" "$api" > "$LAB_STEP/join"
cat /etc/kubernetes/admin.conf > "$LAB_STEP/kubeconfig"
# For whoever looks around on the master.
mkdir -p /root/.kube
cat /etc/kubernetes/admin.conf > /root/.kube/config
