# Lets Prometheus ask the master's Kubernetes, if there is one: by a service account of its own.
set -eu
folder=/etc/prometheus/kubernetes
export KUBECONFIG=/etc/kubernetes/admin.conf
case " $LAB_STACKS " in
    *" kubernetes "*) ;;
    *)
        rm -rf $folder
        exit
        ;;
esac
if [ ! -e $KUBECONFIG ]; then
    echo "there is no cluster yet: put [stack.kubernetes] before [stack.prometheus] in the labfile, and run \`lab up\` again" >&2
    exit 1
fi

again 10 kubectl apply -f "$LAB_STEP/cluster.yaml"
umask 077
mkdir -p $folder
# Kubernetes makes the token a moment after the secret.
token() {
    kubectl -n kube-system get secret lab-prometheus -o 'jsonpath={.data.token}' | base64 -d > $folder/token.new
    [ -s $folder/token.new ]
}
again 60 token
mv $folder/token.new $folder/token
cat /etc/kubernetes/pki/ca.crt > $folder/ca.crt
chown -R prometheus: $folder
