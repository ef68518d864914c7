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
[ -s secret ] || (umask 077 && openssl rand -hex 16 > secret)

# configuration NAME PORT FOLDER: of one registry.
configuration() {
    install -d -o docker-registry -g docker-registry "$3"
    cat > "$1.yml" << END
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: $3}
  delete: {enabled: true}
http:
  addr: :$2
  secret: $(cat secret)
  headers: {X-Content-Type-Options: [nosniff]}
  tls:
    certificate: $folder/registry.crt
    key: $folder/registry.key
END
    chown root:docker-registry "$1.yml"
    chmod 640 "$1.yml"
}

configuration config "$LAB_OPT_PORT" /var/lib/docker-registry
systemctl enable docker-registry.service
systemctl restart docker-registry.service

# What is pulled through this one is kept here: the nodes fetch it once.
if [ -n "$LAB_OPT_MIRROR_OF" ]; then
    configuration mirror 5001 /var/lib/docker-registry-mirror
    echo "proxy: {remoteurl: \"$LAB_OPT_MIRROR_OF\"}" >> mirror.yml
    cat > /etc/systemd/system/lab-registry-mirror.service << END
[Unit]
Description=Mirror of $LAB_OPT_MIRROR_OF
Wants=network-online.target
After=network-online.target
# It ends when it can't reach what it mirrors, at boot for example.
StartLimitIntervalSec=0

[Service]
User=docker-registry
ExecStart=/usr/bin/docker-registry serve $folder/mirror.yml
Restart=on-failure
RestartSec=2

[Install]
WantedBy=multi-user.target
END
    systemctl daemon-reload
    systemctl enable lab-registry-mirror.service
    systemctl restart lab-registry-mirror.service
elif [ -e /etc/systemd/system/lab-registry-mirror.service ]; then
    systemctl disable --now lab-registry-mirror.service
    rm /etc/systemd/system/lab-registry-mirror.service
fi
cat ca.crt > "$LAB_STEP/ca.crt"
