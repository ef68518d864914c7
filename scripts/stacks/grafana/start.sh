# Grafana finds its settings, its data source and its dashboards as files; what is changed in them here comes back with
# the next run.
set -eu
folder=/etc/grafana
# Made once: Grafana takes it when it makes its database, and not again.
if [ ! -s $folder/admin-password ]; then
    (umask 077 && tr -dc A-Za-z0-9 < /dev/urandom | head -c 20 > $folder/admin-password.new)
    echo >> $folder/admin-password.new
    chown grafana: $folder/admin-password.new
    mv $folder/admin-password.new $folder/admin-password
fi
(umask 077 && cat $folder/admin-password > "$LAB_STEP/admin-password")

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
