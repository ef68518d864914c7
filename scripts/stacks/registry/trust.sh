# The node trusts the master's registry: what asks by the system's certificates, Docker, and containerd.
set -eu
install -m 644 "$LAB_STEP/ca.crt" /usr/local/share/ca-certificates/lab-registry.crt
update-ca-certificates

# containerd NAME SERVER [ADDRESS]: where containerd finds what is called NAME/…, by another address than the server's.
containerd() {
    mkdir -p "/etc/containerd/certs.d/$1"
    cat > "/etc/containerd/certs.d/$1/hosts.toml" << END
server = "$2"

[host."${3:-$2}"]
capabilities = ["pull", "resolve"$([ $# = 3 ] || echo ', "push"')]
ca = "/usr/local/share/ca-certificates/lab-registry.crt"
END
}

registry=$LAB_MASTER:$LAB_OPT_PORT
install -D -m 644 "$LAB_STEP/ca.crt" "/etc/docker/certs.d/$registry/ca.crt"
containerd "$registry" "https://$registry"
if [ -n "$LAB_OPT_MIRROR_OF" ]; then
    mirror=$LAB_MASTER:5001
    install -D -m 644 "$LAB_STEP/ca.crt" "/etc/docker/certs.d/$mirror/ca.crt"
    name=${LAB_OPT_MIRROR_OF#*://}
    case $name in
        *docker.io) name=docker.io ;; # what images of Docker Hub are called by
    esac
    containerd "$name" "$LAB_OPT_MIRROR_OF" "https://$mirror"
    # It may be a registry of the lab that it mirrors, whose certificate is known only now.
    if [ "$LAB_NODE" = "$LAB_MASTER" ]; then systemctl restart lab-registry-mirror.service; fi
fi
