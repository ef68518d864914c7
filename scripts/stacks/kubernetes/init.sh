# The control plane, by the phases of `kubeadm init`: each can be done again, so this goes on where it was cut off. The API
# server starts with its store alone; the controllers, which ask it without end, when it has what workers join by.
set -eu
export KUBECONFIG=/etc/kubernetes/admin.conf
version=$(cat /usr/local/share/lab/kubernetes/version)
minor=${version#v1.}
minor=${minor%%.*}
work=/etc/kubernetes/lab
mkdir -p -m 700 "$work/patches"

# Workers join by it, now and whenever one is added: it holds as long as the lab, inside which it is known.
[ -s "$work/token" ] || (umask 077 && tr -dc a-z0-9 < /dev/urandom | head -c 22 | sed 's/^....../&./' > "$work/token")
token=$(cat "$work/token")

api=v1beta4
[ "$minor" -ge 31 ] || api=v1beta3
[ "$minor" -ge 22 ] || api=v1beta2
patches= # where kubeadm takes them from its configuration, it takes no flag for them
[ "$minor" -ge 22 ] || patches="--experimental-patches $work/patches"
socket=unix:///run/containerd/containerd.sock
[ "$minor" -ge 24 ] || socket=${socket#unix://} # earlier ones have no scheme in front of the path
allocate=true
[ "$LAB_OPT_NETWORK" != bridge ] || allocate=false # nodes know their pods' addresses
slow=no
driver=systemd
weight=100
if [ "$LAB_PATIENCE" -gt 1 ]; then
    slow=yes
    driver=cgroupfs
    weight=2
fi

only_slow() {
    if [ $slow = yes ]; then printf '%s\n' "$@"; fi
}

# arguments NAME=VALUE…: of a part of the control plane, as the configuration's version wants them.
arguments() {
    [ $# -gt 0 ] || return 0
    echo "  extraArgs:"
    for pair; do
        case $api in
            v1beta4) printf '  - {name: "%s", value: "%s"}\n' "${pair%%=*}" "${pair#*=}" ;;
            *) printf '    %s: "%s"\n' "${pair%%=*}" "${pair#*=}" ;;
        esac
    done
}

(umask 077 && cat > "$work/config.yaml") << END
apiVersion: kubeadm.k8s.io/$api
kind: InitConfiguration
bootstrapTokens:
- token: $token
  ttl: "0s"
  usages: [signing, authentication]
  groups: ["system:bootstrappers:kubeadm:default-node-token"]
localAPIEndpoint:
  advertiseAddress: $LAB_IP
nodeRegistration:
  name: $LAB_NODE
  criSocket: $socket
  taints: [] # a lab is small: its master carries pods, too
$([ -n "$patches" ] || printf 'patches: {directory: %s}' "$work/patches")
---
apiVersion: kubeadm.k8s.io/$api
kind: ClusterConfiguration
clusterName: $LAB_NAME
kubernetesVersion: $version
controlPlaneEndpoint: "$LAB_IP:6443"
networking:
  podSubnet: $LAB_OPT_POD_NETWORK
  serviceSubnet: 10.96.0.0/16
apiServer:
  certSANs: ["127.0.0.1", localhost, $LAB_NODE]
$(arguments $(only_slow enable-priority-and-fairness=false profiling=false))
controllerManager:
$(arguments allocate-node-cidrs=$allocate leader-elect=false $(only_slow node-monitor-period=20s node-monitor-grace-period=300s))
scheduler:
$(arguments leader-elect=false)
$([ $api = v1beta4 ] || only_slow 'featureGates:' '  PublicKeysECDSA: true')
$([ $api != v1beta4 ] || only_slow 'encryptionAlgorithm: ECDSA-P256')
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: $driver
$(only_slow 'nodeStatusUpdateFrequency: 10s' 'nodeStatusReportFrequency: 30s' 'runtimeRequestTimeout: 15m')
---
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: $LAB_OPT_POD_NETWORK
conntrack:
  maxPerCore: 0
END

cat > /usr/local/sbin/lab-control-plane << 'END'
#!/bin/sh
# Written by lab: the start of the API server.
#   starts                      how often it was started on this node so far
#   wait SECONDS STARTS WEIGHT  waits until it serves; STARTS is what `starts` said before
#   hold, release WEIGHT        at boot: what asks it without end is held until it serves, or for half an hour
# While it is waited for, all that is no container has the CPU weight WEIGHT; 100 is the kernel's own.
set -eu
most=5 # so often it may end before it serves

# newest PART: folder and number of the last log of a part of the control plane. Each start has one, numbered from 0.
newest() {
    for pod in /var/log/pods/kube-system_"$1"-*/"$1"; do
        last=-1
        for log in "$pod"/*.log; do
            number=${log##*/}
            number=${number%.log}
            case $number in *[!0-9]*) continue ;; esac
            [ "$number" -le "$last" ] || last=$number
        done
        [ "$last" -lt 0 ] || echo "$pod $last"
    done
}

starts() {
    newest kube-apiserver | {
        sum=0
        while read -r _ last; do sum=$((sum + last + 1)); done
        echo $sum
    }
}

# Containers are in a group beside these two. The kubelet, the runtime and the journal are in the first, what runs over
# SSH in either.
weigh() {
    for slice in system.slice user.slice; do
        systemctl set-property --runtime $slice CPUWeight="$1" || true
    done
}

# words PART COUNT: the last errors of a part's log, else its last lines.
words() {
    cut -c 1-300 > "$work/log"
    grep -E '^[EF][0-9]{4} |^panic: |^[Ee]rror: |"level":"(error|dpanic|panic|fatal)"| [EC] \| ' "$work/log" \
        > "$work/errors" || cat "$work/log" > "$work/errors"
    [ -s "$work/errors" ] || echo "there is no log of it: it was not started" > "$work/errors"
    tail -n "$2" "$work/errors" | sed "s,^,$1: ,"
}

# gives_up WHY: with the last words of all parts, the most telling last.
gives_up() {
    ctr --namespace k8s.io containers ls || true
    journalctl -u kubelet -n 200 --no-pager -o cat | words kubelet 2
    for part in etcd kube-apiserver; do
        newest $part | while read -r pod last; do
            # The last start that has ended, and the last one; without the time and the stream before each line.
            cat "$pod/$((last - 1)).log" "$pod/$last.log" 2> /dev/null | sed 's/^[^ ]* std[a-z]* [FP] //'
        done | words $part 3
    done
    echo "the API server $1; last seen: $seen"
    exit 1
}

# serves SECONDS STARTS: waits until it does, and says every half a minute what it waits for.
serves() {
    begin=$(date +%s)
    while true; do
        : > "$work/said"
        # One process that asks again and again: its start costs more than the question.
        tls=$(curl -sSk --http1.1 -H 'Connection: close' --fail-with-body --max-time 30 --retry 99 --retry-delay 2 \
            --retry-max-time 27 --retry-all-errors --retry-connrefused -o "$work/said" -w '%{time_appconnect}' \
            https://127.0.0.1:6443/readyz 2> "$work/error") || true
        took=$(($(date +%s) - begin))
        started=$(($(starts) - $2))
        told="$took s"
        case $started in
            0) ;;
            1) told="$told, started once" ;;
            *) told="$told, started $started times" ;;
        esac
        case $tls in
            0.000000) ;; # it did not come to it
            *.??????) told="$told, a TLS handshake takes ${tls%????} s" ;;
        esac
        if [ "$(cat "$work/said")" = ok ]; then
            echo "the API server serves: $told"
            return
        fi
        missing=
        while read -r check _; do
            case $check in "[-]"*) missing="$missing ${check#???}" ;; esac
        done < "$work/said"
        seen=$(tail -n 1 "$work/error")
        [ -z "$missing" ] || seen="not done yet:$missing"
        echo "waiting for the API server: $told; last seen: $seen"
        [ $started -le $most ] || gives_up "has ended $((started - 1)) times in $took s"
        [ $took -lt "$1" ] || gives_up "does not serve within $1 s"
        sleep 1 # for the case that curl gave up at once
    done
}

case $1 in
    starts) starts ;;
    wait)
        weight=$4
        work=$(mktemp -d)
        trap 'rm -rf "$work"; [ "$weight" = 100 ] || weigh 100' EXIT
        trap 'exit 1' HUP INT PIPE TERM
        [ "$weight" = 100 ] || weigh "$weight"
        serves "$2" "$3"
        ;;
    hold)
        cd /etc/kubernetes
        mkdir -p lab/later
        for name in kube-controller-manager kube-scheduler; do
            [ ! -e "manifests/$name.yaml" ] || mv "manifests/$name.yaml" lab/later/
        done
        ;;
    release)
        cd /etc/kubernetes
        [ ! -e manifests/kube-apiserver.yaml ] || "$0" wait 1800 "$("$0" starts)" "$2" || true
        for manifest in lab/later/*.yaml; do
            [ ! -e "$manifest" ] || mv "$manifest" manifests/
        done
        ;;
esac
END
chmod 755 /usr/local/sbin/lab-control-plane

rm -f "$work/patches/"*
if [ $slow = yes ]; then
    # Nobody is killed for being slow, and Go's collector runs less often.
    for name in kube-apiserver kube-controller-manager kube-scheduler etcd; do
        cat > "$work/patches/$name+strategic.yaml" << END
spec:
  containers:
  - name: $name
    env:
    - {name: GOGC, value: "400"}
    livenessProbe: {periodSeconds: 60, timeoutSeconds: 60, failureThreshold: 60}
    startupProbe: {periodSeconds: 20, timeoutSeconds: 60, failureThreshold: 120}
END
    done
    # An API server ends if its store does not answer: that has as much of the processors as itself, not half.
    echo '    resources: {requests: {cpu: 250m}}' >> "$work/patches/etcd+strategic.yaml"
    echo '    readinessProbe: {periodSeconds: 20, timeoutSeconds: 60, failureThreshold: 60}' \
        >> "$work/patches/kube-apiserver+strategic.yaml"

    # At boot, too, the API server starts with its store alone.
    cat > /etc/systemd/system/lab-control-plane.service << END
[Unit]
Description=The controllers of Kubernetes, when its API server serves
Before=kubelet.service

[Service]
Type=exec
ExecStartPre=/usr/local/sbin/lab-control-plane hold
ExecStart=/usr/local/sbin/lab-control-plane release $weight

[Install]
WantedBy=multi-user.target
END
    systemctl enable lab-control-plane.service
fi

# without PHASES: `kubeadm init` but for these. What it says to whoever runs it by hand is told only if it fails.
without() {
    phases=preflight,$1,wait-control-plane,kubelet-finalize
    # shellcheck disable=SC2086 # two words or none
    if ! kubeadm init --config "$work/config.yaml" $patches --skip-phases "$phases" > "$work/said"; then
        cat "$work/said"
        return 1
    fi
}

# answers STARTS: waits until the API server has no more to do before it serves.
answers() {
    /usr/local/sbin/lab-control-plane wait $((300 * LAB_PATIENCE)) "$1" $weight
}

# asks COMMAND…: what asks a busy API server may be turned away: then again, when it answers.
asks() {
    for left in 4 3 2 1 0; do
        if "$@"; then return; fi
        [ $left = 0 ] && exit 1
        answers "$(/usr/local/sbin/lab-control-plane starts)"
    done
}

starts=$(/usr/local/sbin/lab-control-plane starts)
base=certs,kubeconfig,kubelet-start,control-plane/apiserver,etcd
configuration=upload-config,mark-control-plane,bootstrap-token
others=control-plane/controller-manager,control-plane/scheduler,addon
echo "certificates, kubelet, etcd, API server"
without "$configuration,$others"
answers "$starts"
echo "configuration, token"
asks without "$base,$others"
echo "controllers, scheduler, DNS, proxy"
asks without "$base,$configuration"
# The pods' network, where it consists of pods itself. Some of it can be understood only when the rest is known.
[ "$LAB_OPT_NETWORK" = bridge ] ||
    asks kubectl apply --server-side -f /usr/local/share/lab/kubernetes/network.yaml

authority=$(openssl x509 -pubkey -noout -in /etc/kubernetes/pki/ca.crt | openssl pkey -pubin -outform der | sha256sum)
umask 077
printf 'token=%s\nauthority=sha256:%s\napi=%s\n' "$token" "${authority%% *}" "$api" > "$LAB_STEP/join"
cat /etc/kubernetes/admin.conf > "$LAB_STEP/kubeconfig"
# For whoever looks around on the master.
mkdir -p /root/.kube
cat /etc/kubernetes/admin.conf > /root/.kube/config
