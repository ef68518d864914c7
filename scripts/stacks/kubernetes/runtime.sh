# containerd and the kernel as Kubernetes wants them.
set -eu
cni=/usr/lib/cni
[ "$LAB_SOURCE" = bundle ] || cni=/opt/cni/bin # where the package kubernetes-cni, flannel and calico have theirs
systemd_groups=true
extra="--node-ip=$LAB_IP"
if [ "$LAB_PATIENCE" -gt 1 ]; then
    # On emulated processors: no tree of control groups to be read every few seconds, and less housekeeping.
    systemd_groups=false
    extra="$extra --cgroups-per-qos=false --enforce-node-allocatable= --housekeeping-interval=60s"
    # Without an API server a kubelet says so many times a second, which keeps the journal busy: some of it is enough.
    units=/etc/systemd/system/kubelet.service.d
    mkdir -p $units
    printf '[Service]\nLogRateLimitIntervalSec=30s\nLogRateLimitBurst=20\n' > $units/lab.conf
fi
pause=$(kubeadm config images list --kubernetes-version "$(kubeadm version -o short)" | grep /pause:)
mkdir -p /etc/containerd
# containerd 2 understands the configuration of version 1, too.
cat > /etc/containerd/config.toml << END
version = 2

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$pause"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "$cni"
conf_dir = "/etc/cni/net.d"

# Registries of the lab: /etc/containerd/certs.d/HOST:PORT/hosts.toml
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "/etc/containerd/certs.d"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = $systemd_groups
END
echo "KUBELET_EXTRA_ARGS=$extra" > /etc/default/kubelet
printf '%s\n' overlay br_netfilter > /etc/modules-load.d/kubernetes.conf
cat > /etc/sysctl.d/90-kubernetes.conf << 'END'
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
END
# A container's first process may ignore SIGTERM, as a shell does. A node that shuts down waits for it as long as Kubernetes
# gives a pod, not for systemd's minute and a half.
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStopSec=30s\n' > /etc/systemd/system.conf.d/kubernetes.conf
systemctl daemon-reload
modprobe -a overlay br_netfilter
sysctl -q -p /etc/sysctl.d/90-kubernetes.conf
systemctl restart containerd.service
