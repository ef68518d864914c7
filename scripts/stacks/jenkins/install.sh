# Jenkins from its own repository (https://www.jenkins.io/doc/book/installing/linux/) and its plugins, by Jenkins' own
# plugin manager. What a pipeline's builds need (kubectl, buildah, Docker) is for other stacks and the labfile's steps.
set -eu
repository jenkins https://pkg.jenkins.io/debian-stable binary/ "" \
    https://pkg.jenkins.io/debian-stable/jenkins.io-2026.key 5E386EADB55F01504CAE8BCF7198F4B714ABFC68
packages openjdk-21-jre-headless fontconfig git sudo curl
# Its package would start it, and what it makes at its first start is a node's own.
if [ ! -e /var/lib/jenkins/config.xml ]; then
    systemctl mask jenkins.service
fi
packages "jenkins=$LAB_OPT_VERSION"
systemctl unmask jenkins.service
systemctl disable jenkins.service # the step `start` starts it with its settings

manager=$(mktemp -d)
trap 'rm -rf "$manager"' EXIT
version=2.15.0
download "https://github.com/jenkinsci/plugin-installation-manager-tool/releases/download/$version/jenkins-plugin-manager-$version.jar" \
    "$manager/manager.jar"
if ! echo "a86853ec2e2933f37a4b471ba65099b61e03c87a80c2ef8fe2315eb135672d43  $manager/manager.jar" | sha256sum -c; then
    echo "the plugin manager $version is not the one that is known here" >&2
    exit 1
fi
# It checks what it fetches by the checksums of Jenkins' update centre, which it reads whole: Java's usual quarter of the
# memory may be too little for that. It empties the folder that it fetches to.
if ! again 3 env CACHE_DIR="$manager/cache" java -XX:MaxRAMPercentage=75 -jar "$manager/manager.jar" --war /usr/share/java/jenkins.war \
    --plugin-file "$LAB_STEP/plugins.txt" --latest=false --plugin-download-directory "$manager/plugins"; then
    echo "cannot fetch Jenkins' plugins from https://updates.jenkins.io" >&2
    echo "look whether this machine reaches it and where it leads, then run \`lab up\` again" >&2
    exit 1
fi
install -d -o jenkins -g jenkins /var/lib/jenkins/plugins
install -o jenkins -g jenkins -m 644 "$manager"/plugins/*.jpi /var/lib/jenkins/plugins/
