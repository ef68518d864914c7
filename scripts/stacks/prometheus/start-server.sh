# What Prometheus looks at: the lab's nodes, as the labfile has them. It reads the targets again when they change.
set -eu
every=15s
if [ "$LAB_PATIENCE" -gt 1 ]; then
    every=30s # an emulated node takes seconds to gather what it is asked for
fi
folder=/etc/prometheus
mkdir -p $folder/targets $folder/consoles

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

cat > $folder/lab-rules.yml << 'END'
groups:
- name: nodes
  rules:
  - alert: NodeDown
    expr: up{job="node"} == 0
    for: 30s
    labels: {severity: critical}
    annotations: {summary: "{{ $labels.node }} cannot be asked for its metrics"}
  - alert: DiskFull
    expr: node_filesystem_avail_bytes{mountpoint="/"} / node_filesystem_size_bytes{mountpoint="/"} < 0.1
    for: 5m
    labels: {severity: warning}
    annotations: {summary: "less than a tenth of {{ $labels.node }}'s disk is free"}
  - alert: MemoryLow
    expr: node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes < 0.1
    for: 5m
    labels: {severity: warning}
    annotations: {summary: "less than a tenth of {{ $labels.node }}'s memory is available"}
END

cat > $folder/alertmanager.yml << 'END'
# Alerts are shown at port 9093, and sent to nobody until a receiver has an address here.
route: {receiver: nobody, group_by: [alertname], group_wait: 5s, group_interval: 1m, repeat_interval: 1h}
receivers: [{name: nobody}]
END

# A page of Prometheus' own, /consoles/nodes.html, where there is no Grafana.
cat > $folder/consoles/nodes.html << 'END'
<!DOCTYPE html>
<html>
<head><title>Nodes of the lab</title><meta charset="utf-8"><meta http-equiv="refresh" content="15">
<style>body { font-family: sans-serif } td, th { padding: 4px 12px; text-align: right } td:first-child { text-align: left }</style></head>
<body>
<h1>Nodes of the lab</h1>
<table>
<tr><th>node</th><th>up</th><th>processors in use</th><th>memory in use</th><th>disk in use</th><th>received a second</th><th>sent a second</th></tr>
{{ range query "up{job='node'}" | sortByLabel "node" }}{{ $node := .Labels.node }}
<tr>
<td>{{ $node }}</td>
<td>{{ if eq .Value 1.0 }}yes{{ else }}<b>no</b>{{ end }}</td>
<td>{{ with printf "1 - avg(rate(node_cpu_seconds_total{mode='idle',node='%s'}[5m]))" $node | query }}{{ . | first | value | humanizePercentage }}{{ end }}</td>
<td>{{ with printf "1 - node_memory_MemAvailable_bytes{node='%s'} / node_memory_MemTotal_bytes{node='%s'}" $node $node | query }}{{ . | first | value | humanizePercentage }}{{ end }}</td>
<td>{{ with printf "1 - node_filesystem_avail_bytes{mountpoint='/',node='%s'} / node_filesystem_size_bytes{mountpoint='/',node='%s'}" $node $node | query }}{{ . | first | value | humanizePercentage }}{{ end }}</td>
<td>{{ with printf "sum(rate(node_network_receive_bytes_total{device!='lo',node='%s'}[5m]))" $node | query }}{{ . | first | value | humanize1024 }}B{{ end }}</td>
<td>{{ with printf "sum(rate(node_network_transmit_bytes_total{device!='lo',node='%s'}[5m]))" $node | query }}{{ . | first | value | humanize1024 }}B{{ end }}</td>
</tr>
{{ end }}
</table>
</body>
</html>
END

promtool check config $folder/prometheus.yml
echo "ARGS=\"--web.console.templates=$folder/consoles --web.console.libraries=$folder/console_libraries --storage.tsdb.retention.time=15d\"" \
    > /etc/default/prometheus
echo "ARGS=\"--config.file=$folder/alertmanager.yml --cluster.listen-address=\"" > /etc/default/prometheus-alertmanager
systemctl enable prometheus.service prometheus-alertmanager.service
systemctl restart prometheus.service prometheus-alertmanager.service
