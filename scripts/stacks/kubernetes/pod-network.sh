# Pods' addresses and the way between nodes: a bridge on each node, and a route to each other node's pods. A node with the
# address a.b.c.N has the pods X.Y.N.0/24, so nobody has to be asked. flannel and calico come with the step `init`.
set -eu
if [ "$LAB_OPT_NETWORK" != bridge ]; then
    # Until its pods have written theirs, there is no network: not that of the stack containerd either.
    rm -f /etc/cni/net.d/99-bridge.conflist
    exit
fi
first=${LAB_OPT_POD_NETWORK%.0.0/16}
if ! echo "$first" | grep -Eqx '[0-9]+\.[0-9]+'; then
    echo "pod_network = \"$LAB_OPT_POD_NETWORK\": with network = \"bridge\" it must be like 10.244.0.0/16" >&2
    exit 1
fi
pods_of() { echo "$first.${1##*.}.0/24"; }

seen=" "
for entry in $LAB_NODES; do
    number=${entry##*.}
    case $seen in
        *" $number "*)
            echo "two nodes have addresses that end in .$number: pods of a node are numbered by that; change one" >&2
            exit 1
            ;;
    esac
    seen="$seen$number "
done

mkdir -p /etc/cni/net.d
cat > /etc/cni/net.d/10-lab.conflist << END
{
  "cniVersion": "0.4.0",
  "name": "lab",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [[{ "subnet": "$(pods_of "$LAB_IP")" }]],
        "routes": [{ "dst": "0.0.0.0/0" }]
      }
    },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
END

# Run at each boot, too.
{
    echo '#!/bin/sh -e'
    echo '# Written by lab: ways to the pods of other nodes. What leaves the cluster has the address of its node.'
    for entry in $LAB_NODES; do
        ip=${entry#*=}
        [ "$ip" = "$LAB_IP" ] || echo "ip route replace $(pods_of "$ip") via $ip"
    done
    echo "rule=\"POSTROUTING -s $LAB_OPT_POD_NETWORK ! -d $LAB_OPT_POD_NETWORK -j MASQUERADE\""
    echo 'iptables -w -t nat -C $rule 2> /dev/null || iptables -w -t nat -A $rule'
    echo '# Where Docker was before Kubernetes, it forwards for its own containers alone.'
    echo "for rule in \"FORWARD -s $LAB_OPT_POD_NETWORK -j ACCEPT\" \"FORWARD -d $LAB_OPT_POD_NETWORK -j ACCEPT\"; do"
    echo '    iptables -w -C $rule 2> /dev/null || iptables -w -A $rule'
    echo 'done'
} > /usr/local/sbin/lab-pod-network
chmod 755 /usr/local/sbin/lab-pod-network
systemctl restart lab-pod-network.service
