# A kubeconfig for Jenkins, if the master has a cluster: for one namespace of it.
set -eu
folder=/etc/jenkins
mkdir -p $folder
case " $LAB_STACKS " in
    *" kubernetes "*) ;;
    *)
        rm -f $folder/kubeconfig
        exit
        ;;
esac
if [ ! -e /etc/kubernetes/admin.conf ]; then
    echo "there is no cluster yet: put [stack.kubernetes] before [stack.jenkins] in the labfile, and run \`lab up\` again" >&2
    exit 1
fi

export KUBECONFIG=/etc/kubernetes/admin.conf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed "s/NAMESPACE/$LAB_OPT_NAMESPACE/" "$LAB_STEP/cluster.yaml" > "$work/cluster.yaml"
again 10 kubectl apply -f "$work/cluster.yaml"
umask 077
# Kubernetes makes the token a moment after the secret.
token() {
    kubectl -n "$LAB_OPT_NAMESPACE" get secret lab-jenkins -o 'jsonpath={.data.token}' | base64 -d > "$work/token"
    [ -s "$work/token" ]
}
again 60 token

# Jenkins reads it and cannot change it: a kubeconfig may name programs, and the pipeline's script runs as root.
cat > $folder/kubeconfig.new << END
apiVersion: v1
kind: Config
clusters:
- name: $LAB_NAME
  cluster:
    server: https://$LAB_IP:6443
    certificate-authority-data: $(base64 -w 0 /etc/kubernetes/pki/ca.crt)
users:
- name: lab-jenkins
  user: {token: "$(cat "$work/token")"}
contexts:
- name: $LAB_NAME
  context: {cluster: $LAB_NAME, user: lab-jenkins, namespace: $LAB_OPT_NAMESPACE}
current-context: $LAB_NAME
END
chown root:jenkins $folder/kubeconfig.new
chmod 640 $folder/kubeconfig.new
mv $folder/kubeconfig.new $folder/kubeconfig
