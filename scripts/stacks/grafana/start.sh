# Grafana finds its settings, its data source and its dashboards as files; what is changed in them here comes back with
# the next run.
set -eu
folder=/etc/grafana
# Made once: Grafana takes it when it makes its database, and not again.
password $folder/admin-password grafana

install -m 640 -g grafana "$LAB_STEP/grafana.ini" $folder/grafana.ini
install -D -m 644 "$LAB_STEP/dashboards.yaml" $folder/provisioning/dashboards/lab.yaml
mkdir -p $folder/dashboards $folder/provisioning/datasources
install -m 644 "$LAB_STEP/nodes.json" "$LAB_STEP/cluster.json" "$LAB_STEP/containers.json" $folder/dashboards/
cat > $folder/provisioning/datasources/lab.yaml << END
apiVersion: 1
datasources:
- name: Prometheus
  uid: lab
  type: prometheus
  access: proxy
  url: "$LAB_OPT_PROMETHEUS"
  isDefault: true
END

systemctl daemon-reload
systemctl enable grafana-server.service
systemctl restart grafana-server.service
