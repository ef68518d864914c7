# Starts the daemon; when it answers is for the step's `ready` to see.
set -eu
modprobe -a overlay br_netfilter

# mirror_in FILE: lets a daemon's settings name the labfile's mirror, or none any more. What else is set stays.
mirror_in() {
    # Without jq there has never been a mirror.
    command -v jq > /dev/null || return 0
    mkdir -p "${1%/*}"
    [ -s "$1" ] || echo '{}' > "$1"
    jq --arg mirror "$LAB_OPT_MIRROR" 'del(."registry-mirrors") + if $mirror == "" then {} else {"registry-mirrors": [$mirror]} end' \
        "$1" > "$1.new"
    if cmp -s "$1" "$1.new"; then rm "$1.new"; else mv "$1.new" "$1"; fi
}

# newer SETTINGS PID_FILE: whether a daemon has started before its settings were written.
newer() { [ -e "$1" ] && [ -n "$(find "$1" -newer "$2" 2> /dev/null)" ]; }

user=lab
if [ "$LAB_OPT_ROOTLESS" = no ]; then
    if [ -e /var/lib/systemd/linger/$user ]; then # it was rootless before
        rm -f /etc/systemd/system/multi-user.target.wants/user@*.service
        loginctl disable-linger $user
        systemctl stop "user@$(id -u $user).service"
        docker context use default
    fi
    mirror_in /etc/docker/daemon.json
    # It is, unless it was rootless before; asked again, systemd would read all its units again.
    [ -e /etc/systemd/system/multi-user.target.wants/docker.service ] || systemctl enable docker.service
    if newer /etc/docker/daemon.json /run/docker.pid; then systemctl stop docker.service; fi
    systemctl start docker.service
    exit
fi

# The daemon of an ordinary user: https://docs.docker.com/engine/security/rootless/. It is there without a login.
systemctl disable --now docker.service docker.socket
id $user > /dev/null 2>&1 || useradd --create-home --shell /bin/bash $user
for file in /etc/subuid /etc/subgid; do # numbers for the users in its containers
    grep -q "^$user:" $file 2> /dev/null || echo "$user:100000:65536" >> $file
done
echo ip_tables > /etc/modules-load.d/docker-rootless.conf
modprobe ip_tables
id=$(id -u $user)
loginctl enable-linger $user
# Lingering is logind's affair, which starts in a node when somebody asks for it: at boot nobody does.
systemctl add-wants multi-user.target "user@$id.service"
systemctl start "user@$id.service"

# In the daemon's own network the node's name would mean that network: what this file says of it comes first.
sed -i "/ $LAB_NODE\$/d" /etc/hosts
echo "$LAB_IP $LAB_NODE" >> /etc/hosts

settings=/home/$user/.config/docker
mkdir -p /etc/docker/certs.d
mkdir -p $settings
ln -sfn /etc/docker/certs.d $settings/certs.d # registries that the node trusts
mirror_in $settings/daemon.json
chown -R $user: /home/$user/.config
as_user() {
    runuser -u $user -- env HOME=/home/$user PATH=/usr/sbin:/usr/bin XDG_RUNTIME_DIR="/run/user/$id" \
        DBUS_SESSION_BUS_ADDRESS="unix:path=/run/user/$id/bus" "$@"
}
as_user systemctl --user reset-failed # what has failed several times may be tried again
as_user dockerd-rootless-setuptool.sh install --force
if newer $settings/daemon.json "/run/user/$id/docker.pid"; then
    as_user systemctl --user restart docker.service
fi

# root's `docker` means this daemon, too.
docker context inspect rootless > /dev/null 2>&1 ||
    docker context create rootless --docker "host=unix:///run/user/$id/docker.sock"
docker context use rootless
