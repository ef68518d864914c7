# A hook of mmdebstrap: $1 is its root folder, the rest are packages; each is downloaded into /debs/0, /debs/1, …
# A kernel may be several packages, below one that has nothing in it: those that it depends on come with it.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
root=$1
shift

# Parts of a kernel, of one release, that a package depends on.
parts() {
    apt-cache depends --important "$1" | sed -n 's/^ *Depends: \(linux-\(image\|binary\|modules\|base\)-[0-9][^ ]*\)$/\1/p'
}

number=0
for package in "$@"; do
    mkdir -p "$root/debs/$number"
    cd "$root/debs/$number"
    case $package in
    linux-image-*)
        new=$package
        all=
        while [ -n "$new" ]; do
            all="$all $new"
            new=$(for one in $new; do parts "$one"; done | sort -u | grep -vxF "$(printf '%s\n' $all)") || new=
        done
        apt-get -qq download $all
        ;;
    *)
        apt-get -qq download "$package"
        ;;
    esac
    number=$((number + 1))
done
