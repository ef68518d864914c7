# Of both sources' step `packages`: what nodes have in common, written while it is baked. Starting kubeadm and having systemd
# read its units again take seconds each on a slow node.
facts=/usr/local/share/lab/kubernetes
mkdir -p $facts
version=$(kubeadm version -o short)
echo "$version" > $facts/version
kubeadm config images list --kubernetes-version "$version" | grep /pause: > $facts/pause

units=/etc/systemd/system
mkdir -p $units/kubelet.service.d
cat > $units/kubelet.service.d/lab.conf << 'END'
[Unit]
# Until its node is of a cluster it would only fail, every few seconds.
ConditionPathExists=/var/lib/kubelet/config.yaml
END
# Without an API server a kubelet says so many times a second, which keeps the journal busy: some of it is enough. Where
# that costs nothing, the step `runtime` takes it away.
[ -e /etc/kubernetes/kubelet.conf ] ||
    printf '[Service]\nLogRateLimitIntervalSec=30s\nLogRateLimitBurst=20\n' > $units/kubelet.service.d/lab-slow.conf

# Its script is written by the step `pod-network`, and run at each boot.
cat > $units/lab-pod-network.service << 'END'
[Unit]
Description=Routes to the pods of other nodes
ConditionPathExists=/usr/local/sbin/lab-pod-network
Wants=network-online.target
After=network-online.target
Before=kubelet.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/lab-pod-network

[Install]
WantedBy=multi-user.target
END

printf '%s\n' overlay br_netfilter > /etc/modules-load.d/kubernetes.conf
cat > /etc/sysctl.d/90-kubernetes.conf << 'END'
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
END
# A container's first process may ignore SIGTERM, as a shell does. A node that shuts down waits for it as long as Kubernetes
# gives a pod, not for systemd's minute and a half.
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStopSec=30s\n' > /etc/systemd/system.conf.d/kubernetes.conf

systemctl daemon-reload # of a node that runs
systemctl enable containerd.service kubelet.service lab-pod-network.service
