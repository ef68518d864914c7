# Jenkins with its settings: who may log in, and the job `shop`.
set -eu
folder=/etc/jenkins
mkdir -p $folder
password $folder/admin-password jenkins
install -m 644 "$LAB_STEP/jenkins.yaml" $folder/jenkins.yaml

# The service waits until Jenkins says that it is up, which may take longer than systemd would wait.
mkdir -p /etc/systemd/system/jenkins.service.d
cat > /etc/systemd/system/jenkins.service.d/lab.conf << END
[Service]
TimeoutStartSec=infinity
Environment=CASC_JENKINS_CONFIG=$folder/jenkins.yaml
Environment=LAB_JENKINS_URL=http://$LAB_IP:8080/
Environment=KUBECONFIG=$folder/kubeconfig
Environment="JAVA_OPTS=-Djava.awt.headless=true -Xmx$LAB_OPT_HEAP -Djenkins.install.runSetupWizard=false -Dhudson.plugins.git.GitSCM.ALLOW_LOCAL_CHECKOUT=true"
END

# What a pipeline does as root is this one script, which is the labfile's and not the repository's.
cat > /etc/sudoers.d/lab-jenkins.new << 'END'
jenkins ALL=(root) NOPASSWD: /srv/pipeline/pipeline
END
chmod 440 /etc/sudoers.d/lab-jenkins.new
visudo -q -c -f /etc/sudoers.d/lab-jenkins.new
mv /etc/sudoers.d/lab-jenkins.new /etc/sudoers.d/lab-jenkins
# git refuses repositories of other users, these excepted: they are root's.
git config --system --replace-all safe.directory '/srv/git/*' '^/srv/git/'

systemctl daemon-reload
systemctl enable jenkins.service
systemctl restart --no-block jenkins.service # when it answers is for the step's `ready` to see
