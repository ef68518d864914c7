# What pods find in the cluster: its DNS, and volumes.
set -eu
export KUBECONFIG=/etc/kubernetes/admin.conf

# again COMMAND…: what asks a busy API server may be turned away.
again() {
    for left in 9 8 7 6 5 4 3 2 1 0; do
        if "$@"; then return; fi
        [ $left = 0 ] && exit 1
    done
}

if [ "$LAB_PATIENCE" -gt 1 ]; then
    again kubectl -n kube-system scale deployment coredns --replicas=1
fi

[ "$LAB_OPT_STORAGE" = nfs ] || exit 0
for number in 1 2 3; do mkdir -p -m 777 "/srv/volumes/$number"; done
echo "/srv/volumes $LAB_SUBNET(rw,no_root_squash,no_subtree_check)" > /etc/exports
# Version 4 alone: one port, and nothing beside it.
mkdir -p /etc/nfs.conf.d
printf '[nfsd]\nvers3=n\nthreads=2\n' > /etc/nfs.conf.d/lab.conf
systemctl enable --now nfs-server.service
exportfs -ra
volumes=$(mktemp)
trap 'rm -f "$volumes"' EXIT
cat > "$volumes" << 'END'
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: nfs, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
END
for number in 1 2 3; do
    cat >> "$volumes" << END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: nfs-$number}
spec:
  storageClassName: nfs
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce, ReadOnlyMany, ReadWriteMany]
  persistentVolumeReclaimPolicy: Retain
  mountOptions: [nfsvers=4.2]
  nfs: {server: "$LAB_MASTER_IP", path: /srv/volumes/$number}
END
done
again kubectl apply -f "$volumes"
