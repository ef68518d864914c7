# A hook of mmdebstrap: $1 is its root folder, the rest are packages; each is downloaded into /debs/0, /debs/1, …
# A metapackage of the kernel has no kernel in it: it stands for the package that it depends on.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
root=$1
shift
number=0
for package in "$@"; do
    case $package in
    linux-image-*)
        kernel=$(apt-cache depends --important "$package" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
        package=${kernel:-$package}
        ;;
    esac
    mkdir -p "$root/debs/$number"
    cd "$root/debs/$number"
    apt-get -qq download "$package"
    number=$((number + 1))
done
