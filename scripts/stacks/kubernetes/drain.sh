# Before a node is removed: its pods go elsewhere, and the cluster forgets it.
set -eu
export KUBECONFIG=/etc/kubernetes/admin.conf
if [ -n "$(kubectl get node "$LAB_LEAVING" --ignore-not-found -o name)" ]; then
    kubectl drain "$LAB_LEAVING" --ignore-daemonsets --delete-emptydir-data --force --timeout=$((60 * LAB_PATIENCE))s ||
        echo "some pods of $LAB_LEAVING did not end: they end with it"
    kubectl delete node "$LAB_LEAVING"
fi
