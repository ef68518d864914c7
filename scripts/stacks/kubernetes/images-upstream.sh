# The control plane's images, so that nodes find them without a download.
set -eu
systemctl restart containerd.service # with its new configuration
kubeadm config images pull --kubernetes-version "$(kubeadm version -o short)"
systemctl stop containerd.service
