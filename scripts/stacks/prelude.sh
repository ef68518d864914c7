# What every script of a stack begins with: functions to get software with. What can't be fetched is told with where from
# and what to do. Their variables are their own: a script may have others of these names.

# apt COMMAND…: apt-get, patient with the network and with whoever else installs something.
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 \
        -o APT::Update::Error-Mode=any "$@"
}

# packages NAME…: installs those that are not installed yet, without what they only recommend. NAME=VERSION is that version.
packages() {
    local package missing=
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null)" = installed ] ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    dpkg --configure -a # an installation that was cut short is finished first
    # shellcheck disable=SC2086 # one word a package
    if ! { { [ "${lists:-}" = new ] || apt update; } && apt install --fix-broken --no-install-recommends $missing; }; then
        echo "cannot install$missing from $(apt-get indextargets --format '$(SITE)' | sort -u | tr '\n' ' ')" >&2
        echo "look whether this machine reaches them, then run \`lab up\` again; without a network: \`lab up --offline BUNDLE\`" >&2
        return 1
    fi
    lists=new # as long as this script runs, and knows no other repository
    apt clean
}

# download URL FILE: fetches a file whose content somebody else checks.
download() {
    rm -f "$2" # apt goes on with what is there, whatever that is
    if ! /usr/lib/apt/apt-helper -o Acquire::Retries=5 download-file "$1" "$2"; then
        echo "cannot fetch $1" >&2
        echo "look whether this machine reaches it, then run \`lab up\` again; without a network: \`lab up --offline BUNDLE\`" >&2
        return 1
    fi
}

# repository NAME URL SUITE COMPONENTS KEY_URL FINGERPRINT: a repository of packages beside Debian's. Its key is trusted by
# its fingerprint, not by where it came from: a file with any other primary key is refused. Without a fingerprint, KEY_URL
# is a file of this node's, which is trusted as it is.
repository() {
    local key found
    packages ca-certificates gpg
    install -d -m 755 /etc/apt/keyrings
    key=/etc/apt/keyrings/$1.asc
    if [ -n "${6:-}" ]; then download "$5" "$key.new"; else cp "$5" "$key.new"; fi
    found=$(gpg --batch --with-colons --show-keys "$key.new" |
        awk -F: '$1 == "pub" { wanted = 1 } $1 == "fpr" && wanted { print $10; wanted = 0 }')
    if [ -z "$found" ] || [ "$found" != "${6:-$found}" ]; then
        rm -f "$key.new"
        echo "$5 is not the key of $1: its fingerprint is '$found', not ${6:-that of a key}" >&2
        return 1
    fi
    chmod 644 "$key.new"
    mv "$key.new" "$key"
    {
        echo "Types: deb"
        echo "URIs: $2"
        echo "Suites: $3"
        [ -z "$4" ] || echo "Components: $4"
        echo "Architectures: $(dpkg --print-architecture)"
        echo "Signed-By: $key"
    } > "/etc/apt/sources.list.d/$1.sources"
    lists=old
}

# again TRIES COMMAND…: runs a command that may be turned away, until it succeeds.
again() {
    local tries=$1
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
    done
}

# password FILE USER: makes a password, once, in a file of that user's, and gives it in $LAB_STEP under the file's name.
password() {
    if [ ! -s "$1" ]; then
        (umask 077 && tr -dc A-Za-z0-9 < /dev/urandom | head -c 20 > "$1.new")
        echo >> "$1.new"
        chown "$2:" "$1.new"
        mv "$1.new" "$1"
    fi
    (umask 077 && cat "$1" > "$LAB_STEP/${1##*/}")
}

