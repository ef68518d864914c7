#!/bin/bash
# QEMU 10.0.2 (Debian, qemu-user) and OpenSSL 3.0 (Debian 12) on an emulated processor with AVX2, and on the same without it.
#
# A good guess: what has more vector instructions encrypts faster, also when it is emulated, or it makes no difference; and
# with AES-NI and SHA-NI there, AVX2 plays no part in AES and SHA.
# Seen: without AVX2 AES-128-GCM is 29 times as fast (9 and 260 MB/s), SHA-256 6 times, ChaCha20-Poly1305 3 times; AES-256-CTR
# is the same. With AVX2, SHA-NI makes no difference to SHA-256 (24 and 25 MB/s); without AVX2 it doubles it (67 and 142).
# A machine that QEMU emulates (`-accel tcg`) is translated by the same code: `-cpu MODEL,-avx2` makes TLS, SSH and digests
# several times faster there.
#
# Needs Debian 12 with bookworm-backports. Unpacks in a temporary folder, says OK if all is as told. Ratios only: half of what
# was seen.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -q download qemu-user/bookworm-backports openssl libssl3 > log 2>&1 || { cat log; exit 1; }
for package in *.deb; do dpkg -x "$package" root; done
library=$(dirname "$(find root -name libcrypto.so.3)")
openssl() { # MODEL ARGUMENTS…
    model=$1
    shift
    LD_LIBRARY_PATH=$library root/usr/bin/qemu-x86_64 -cpu "$model" root/usr/bin/openssl "$@" 2> /dev/null
}
root/usr/bin/qemu-x86_64 --version | head -n 1
openssl EPYC version
root/usr/bin/qemu-x86_64 --version | grep -q 'version 10\.0\.' || { echo "CHANGED: another QEMU"; exit 1; }
openssl EPYC version | grep -q '^OpenSSL 3\.0\.' || { echo "CHANGED: another OpenSSL"; exit 1; }
# speed MODEL ALGORITHM: kB/s with blocks of 64 KiB.
speed() { openssl "$1" speed -seconds 3 -bytes 65536 -evp "$2" | awk 'END { sub("k$", "", $NF); print int($NF) }'; }
changed=
# ratio ALGORITHM LEAST MOST: how many times as fast it is without AVX2, times 10.
ratio() {
    with=$(speed EPYC "$1")
    without=$(speed EPYC,-avx2 "$1")
    times=$((without * 10 / with))
    echo "$1: $with kB/s with AVX2, $without without: $((times / 10)).$((times % 10))"
    if [ $times -lt "$2" ] || [ $times -gt "$3" ]; then changed=yes; fi
}
ratio aes-128-gcm 100 9999
ratio sha256 25 9999
ratio chacha20-poly1305 15 9999
ratio aes-256-ctr 5 20
[ -z "$changed" ] || { echo "CHANGED"; exit 1; }
echo "OK"
