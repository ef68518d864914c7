# The registry with a certificate of the lab's own, which is made once.
set -eu
folder=/etc/docker/registry
cd $folder
names="DNS:$LAB_NODE,DNS:localhost,IP:$LAB_IP,IP:127.0.0.1"
if [ "$(cat names 2> /dev/null)" != "$names" ] || [ ! -s registry.key ]; then
    umask 077
    openssl ecparam -name prime256v1 -genkey -noout -out ca.key
    openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=registry of the lab $LAB_NAME" -out ca.crt \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
    openssl ecparam -name prime256v1 -genkey -noout -out registry.key
    printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > extensions
    openssl req -new -key registry.key -subj "/CN=$LAB_NODE" |
        openssl x509 -req -CA ca.crt -CAkey ca.key -days 3650 -extfile extensions -out registry.crt
    # Nobody signs with it again: other names get another one.
    rm -f ca.key extensions
    chmod 644 ca.crt registry.crt
    chown root:docker-registry registry.key
    chmod 640 registry.key
    echo "$names" > names
fi
cat > config.yml << END
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /var/lib/docker-registry}
  delete: {enabled: true}
http:
  addr: :$LAB_OPT_PORT
  secret: $(cat secret 2> /dev/null || (umask 077 && openssl rand -hex 16 | tee secret))
  headers: {X-Content-Type-Options: [nosniff]}
  tls:
    certificate: $folder/registry.crt
    key: $folder/registry.key
END
chown root:docker-registry config.yml
chmod 640 config.yml
install -d -o docker-registry -g docker-registry /var/lib/docker-registry
systemctl enable docker-registry.service
systemctl restart docker-registry.service
cat ca.crt > "$LAB_STEP/ca.crt"
