# containerd and the kernel as Kubernetes wants them, beside what the step `packages` has written.
set -eu
cni=/usr/lib/cni
[ "$LAB_SOURCE" = bundle ] || cni=/opt/cni/bin # where the package kubernetes-cni, flannel and calico have theirs
systemd_groups=true
extra="--node-ip=$LAB_IP"
limited=/etc/systemd/system/kubelet.service.d/lab-slow.conf
if [ "$LAB_PATIENCE" -gt 1 ]; then
    # On emulated processors: no tree of control groups to be read every few seconds, and less housekeeping.
    systemd_groups=false
    extra="$extra --cgroups-per-qos=false --enforce-node-allocatable= --housekeeping-interval=60s"
elif [ -e "$limited" ]; then
    rm "$limited"
    systemctl daemon-reload
fi
pause=$(cat /usr/local/share/lab/kubernetes/pause)
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
modprobe -a overlay br_netfilter
sysctl -q -p /etc/sysctl.d/90-kubernetes.conf
systemctl restart containerd.service
