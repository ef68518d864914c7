# The node trusts the master's registry: what asks by the system's certificates, Docker, and containerd.
set -eu

# trust NAME FILE: the system trusts this certificate, too. As update-ca-certificates(8) does it, which makes a process of
# every other certificate for that; it is left to it where one is replaced, or where somebody wants to be told (Java does).
trust() {
    own=/usr/local/share/ca-certificates/$1.crt system=/etc/ssl/certs
    if cmp -s "$2" "$own" && [ -e "$system/$1.pem" ]; then return; fi
    replaced=no
    [ ! -e "$own" ] || replaced=yes
    install -m 644 "$2" "$own"
    if [ $replaced = yes ] || [ ! -s $system/ca-certificates.crt ] || [ -n "$(ls /etc/ca-certificates/update.d 2> /dev/null)" ]; then
        update-ca-certificates
        return
    fi
    hash=$(openssl x509 -noout -hash -in "$own")
    number=0
    while [ -e "$system/$hash.$number" ]; do number=$((number + 1)); done
    { cat $system/ca-certificates.crt && openssl x509 -in "$own"; } > $system/ca-certificates.crt.new
    chmod 644 $system/ca-certificates.crt.new
    mv $system/ca-certificates.crt.new $system/ca-certificates.crt
    ln -sfn "$1.pem" "$system/$hash.$number"
    ln -sfn "$own" "$system/$1.pem"
}

trust lab-registry "$LAB_STEP/ca.crt"

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
