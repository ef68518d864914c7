# What pods find in the cluster: its DNS, volumes, and what the labfile's options add.
set -eu
export KUBECONFIG=/etc/kubernetes/admin.conf
manifests=/usr/local/share/lab/kubernetes

# rolled_out NAMESPACE WHAT…: waits until they run; what they were at if they don't.
rolled_out() {
    namespace=$1
    shift
    for what; do
        if ! kubectl -n "$namespace" rollout status "$what" --timeout=$((300 * LAB_PATIENCE))s; then
            kubectl -n "$namespace" get pods -o wide >&2
            kubectl -n "$namespace" get events --sort-by=.lastTimestamp | tail -n 20 >&2
            exit 1
        fi
    done
}

if [ "$LAB_PATIENCE" -gt 1 ]; then
    again 10 kubectl -n kube-system scale deployment coredns --replicas=1
fi

if [ "$LAB_OPT_STORAGE" = nfs ]; then
    for number in 1 2 3; do mkdir -p -m 777 "/srv/volumes/$number"; done
    echo "/srv/volumes $LAB_SUBNET(rw,no_root_squash,no_subtree_check)" > /etc/exports
    # Version 4 alone: one port, and nothing beside it.
    mkdir -p /etc/nfs.conf.d
    printf '[nfsd]\nvers3=n\nthreads=2\n' > /etc/nfs.conf.d/lab.conf
    systemctl enable --now nfs-server.service
    exportfs -ra
fi

# class PROVISIONER [PARAMETERS]: the class of volumes that is taken unless a claim names another.
class() {
    cat << END
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: managed-nfs-storage, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: $1
parameters: {${2:-}}
mountOptions: [nfsvers=4.2]
END
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $LAB_OPT_STORAGE/$LAB_SOURCE in
    nfs/upstream)
        # A driver makes a folder of the share a volume when one is asked for.
        again 5 kubectl apply -f $manifests/csi-nfs.yaml
        class nfs.csi.k8s.io "server: \"$LAB_MASTER_IP\", share: /srv/volumes, mountPermissions: \"0777\"" > "$work/volumes.yaml"
        again 10 kubectl apply -f "$work/volumes.yaml"
        ;;
    nfs/bundle)
        # Three folders of the share are volumes that wait to be claimed.
        class kubernetes.io/no-provisioner > "$work/volumes.yaml"
        for number in 1 2 3; do
            cat >> "$work/volumes.yaml" << END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: nfs-$number}
spec:
  storageClassName: managed-nfs-storage
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce, ReadOnlyMany, ReadWriteMany]
  persistentVolumeReclaimPolicy: Retain
  mountOptions: [nfsvers=4.2]
  nfs: {server: "$LAB_MASTER_IP", path: /srv/volumes/$number}
END
        done
        again 10 kubectl apply -f "$work/volumes.yaml"
        ;;
esac

if [ "$LAB_OPT_METRICS_SERVER" = true ]; then
    again 5 kubectl apply -f $manifests/metrics-server.yaml
    rolled_out kube-system deployment/metrics-server
fi

if [ -n "$LAB_OPT_LOAD_BALANCER" ]; then
    again 5 kubectl apply -f $manifests/metallb.yaml
    # The addresses are looked at by a webhook of the controller's, and told by a speaker on every node: where they are set
    # before both run, no service ever gets one.
    rolled_out metallb-system deployment/controller daemonset/speaker
    # kubeadm keeps it from a control plane; here the master carries pods, and may be the only node.
    again 5 kubectl label node "$LAB_NODE" node.kubernetes.io/exclude-from-external-load-balancers-
    cat > "$work/addresses.yaml" << END
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lab, namespace: metallb-system}
spec: {addresses: ["$LAB_OPT_LOAD_BALANCER"]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lab, namespace: metallb-system}
spec: {ipAddressPools: [lab]}
END
    tries=0
    until kubectl apply -f "$work/addresses.yaml"; do
        [ $((tries = tries + 1)) -lt 60 ] || exit 1
        sleep 5 # the webhook's certificate is still on its way
    done
fi

if [ "$LAB_OPT_GATEWAY" = true ]; then
    again 5 kubectl apply --server-side --force-conflicts -f $manifests/gateway.yaml
    rolled_out envoy-gateway-system deployment/envoy-gateway
    cat > "$work/gateway.yaml" << END
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: lab}
spec: {controllerName: gateway.envoyproxy.io/gatewayclass-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: lab, namespace: default}
spec:
  gatewayClassName: lab
  listeners: [{name: http, protocol: HTTP, port: 80, allowedRoutes: {namespaces: {from: All}}}]
END
    again 10 kubectl apply -f "$work/gateway.yaml"
fi
