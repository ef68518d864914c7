# What Prometheus looks at: the lab's nodes, as the labfile has them, and the cluster, if it has one. It reads the nodes
# again when they change.
set -eu
every=15s
seldom=30s
if [ "$LAB_PATIENCE" -gt 1 ]; then
    # An emulated node takes seconds to gather what it is asked for, and an API server has much to tell.
    every=30s
    seldom=60s
fi
folder=/etc/prometheus
cluster=$folder/kubernetes
mkdir -p $folder/targets $folder/consoles $folder/console_libraries

separator=
{
    echo '['
    for entry in $LAB_NODES; do
        printf '%s  {"targets": ["%s:9100"], "labels": {"node": "%s"}}' "$separator" "${entry#*=}" "${entry%%=*}"
        separator=",
"
    done
    echo
    echo ']'
} > $folder/targets/nodes.json.new
mv $folder/targets/nodes.json.new $folder/targets/nodes.json

cat > $folder/prometheus.yml << END
global:
  scrape_interval: $every
  scrape_timeout: $every
  evaluation_interval: $every
  external_labels: {lab: $LAB_NAME}
alerting:
  alertmanagers:
  - static_configs: [{targets: ["127.0.0.1:9093"]}]
rule_files: [$folder/lab-rules.yml]
scrape_configs:
- job_name: prometheus
  static_configs: [{targets: ["127.0.0.1:9090"], labels: {node: $LAB_NODE}}]
- job_name: node
  file_sd_configs: [{files: [$folder/targets/nodes.json]}]
END
case " $LAB_STACKS " in
    *" kubernetes "*)
        # Kubelets have certificates that nobody signed, so those are not checked. Of histograms only sums and counts are
        # kept: their buckets are most of what an API server tells, and no page shows them.
        cat >> $folder/prometheus.yml << END

- job_name: apiserver
  scheme: https
  scrape_interval: $seldom
  scrape_timeout: $seldom
  authorization: &token {credentials_file: $cluster/token}
  tls_config: &checked {ca_file: $cluster/ca.crt}
  static_configs: [{targets: ["$LAB_IP:6443"], labels: {node: $LAB_NODE}}]
  metric_relabel_configs: &without_buckets
  - {source_labels: [__name__], regex: ".+_bucket", action: drop}

- job_name: kubelet
  scheme: https
  scrape_interval: $seldom
  scrape_timeout: $seldom
  authorization: *token
  tls_config: &unchecked {insecure_skip_verify: true}
  kubernetes_sd_configs: &nodes
  - {role: node, api_server: "https://$LAB_IP:6443", authorization: *token, tls_config: *checked}
  relabel_configs: &named
  - {source_labels: [__meta_kubernetes_node_name], target_label: node}
  metric_relabel_configs: *without_buckets

- job_name: cadvisor # what the kubelets know of containers
  scheme: https
  metrics_path: /metrics/cadvisor
  scrape_interval: $seldom
  scrape_timeout: $seldom
  authorization: *token
  tls_config: *unchecked
  kubernetes_sd_configs: *nodes
  relabel_configs: *named

# Pods that have the annotation prometheus.io/scrape: "true". prometheus.io/port and prometheus.io/path say where;
# otherwise it is every port that the pod declares, and /metrics.
- job_name: pods
  scrape_interval: $seldom
  scrape_timeout: $seldom
  kubernetes_sd_configs:
  - {role: pod, api_server: "https://$LAB_IP:6443", authorization: *token, tls_config: *checked}
  relabel_configs:
  - {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scrape], regex: "true", action: keep}
  - {source_labels: [__meta_kubernetes_pod_phase], regex: Running, action: keep}
  - {source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_path], regex: (.+), target_label: __metrics_path__}
  - source_labels: [__meta_kubernetes_pod_ip, __meta_kubernetes_pod_annotation_prometheus_io_port]
    regex: (.+);(.+)
    replacement: \$1:\$2
    target_label: __address__
  - {source_labels: [__meta_kubernetes_pod_node_name], target_label: node}
  - {source_labels: [__meta_kubernetes_namespace], target_label: namespace}
  - {source_labels: [__meta_kubernetes_pod_name], target_label: pod}
END
        ;;
esac

# What pages, dashboards and alerts are made of, and the pages: /consoles/nodes.html, cluster.html, containers.html.
install -m 644 "$LAB_STEP/rules.yml" $folder/lab-rules.yml
install -m 644 "$LAB_STEP/lab.lib" $folder/console_libraries/
install -m 644 "$LAB_STEP/nodes.html" "$LAB_STEP/cluster.html" "$LAB_STEP/containers.html" $folder/consoles/

cat > $folder/alertmanager.yml << 'END'
# Alerts are shown at port 9093, and sent to nobody until a receiver has an address here.
route: {receiver: nobody, group_by: [alertname], group_wait: 5s, group_interval: 1m, repeat_interval: 1h}
receivers: [{name: nobody}]
END

promtool check config $folder/prometheus.yml
echo "ARGS=\"--web.console.templates=$folder/consoles --web.console.libraries=$folder/console_libraries --storage.tsdb.retention.time=15d\"" \
    > /etc/default/prometheus
echo "ARGS=\"--config.file=$folder/alertmanager.yml --cluster.listen-address=\"" > /etc/default/prometheus-alertmanager
systemctl enable prometheus.service prometheus-alertmanager.service
systemctl restart prometheus.service prometheus-alertmanager.service
