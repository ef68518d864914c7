# The node trusts the master's registry: what asks by the system's certificates, Docker, and containerd.
set -eu
registry=$LAB_MASTER:$LAB_OPT_PORT
install -m 644 "$LAB_STEP/ca.crt" /usr/local/share/ca-certificates/lab-registry.crt
update-ca-certificates
for folder in "/etc/docker/certs.d/$registry" "/etc/containerd/certs.d/$registry"; do
    install -D -m 644 "$LAB_STEP/ca.crt" "$folder/ca.crt"
done
cat > "/etc/containerd/certs.d/$registry/hosts.toml" << END
server = "https://$registry"

[host."https://$registry"]
ca = "/etc/containerd/certs.d/$registry/ca.crt"
END
