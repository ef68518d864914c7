//! A chain of two routers and a target behind this process's own network, all of them network namespaces of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "what is skipped is told")]

use std::{net::Ipv4Addr, process::Command};

/// The first router, as the host sees it. Nothing longer than 1300 bytes passes between it and the second.
pub const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The second router. It knows no way to [`NOWHERE`].
pub const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 6);
/// Who is behind both.
pub const TARGET: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// Nobody.
pub const NOWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

const INSIDE: &str = "LAB_NET_TEST_INSIDE";

/// What all of it needs.
const PROBE: &str = r#"
ip link add out type veth peer name in
echo "0 0" >/proc/sys/net/ipv4/ping_group_range
unshare -n true
"#;
/// A namespace lives as long as the process that sleeps in it, and the veth(4) pairs as long as their namespaces.
const SETUP: &str = r#"
mine=$(readlink /proc/$$/ns/net)
trap 'kill $first $second $target' EXIT
router() {
    unshare -n sleep 600 &
    eval "$1=$!"
    until [ "$(readlink /proc/$!/ns/net)" != "$mine" ] && [ "$(cat /proc/$!/comm)" = sleep ]; do sleep 0.01; done
}
at() { nsenter -t "$1" -n sh -ec "$2"; }
router first; router second; router target
echo "0 0" >/proc/sys/net/ipv4/ping_group_range
ip link set lo up
ip link add out type veth peer name in netns $first
ip addr add 192.0.2.1/30 dev out; ip link set out up
ip route add default via 192.0.2.2
at $first "ip addr add 192.0.2.2/30 dev in; ip link set in up
    ip link add out mtu 1300 type veth peer name in mtu 1300 netns $second
    ip addr add 192.0.2.5/30 dev out; ip link set out up; ip route add default via 192.0.2.6"
at $second "ip addr add 192.0.2.6/30 dev in; ip link set in up; ip route add 192.0.2.0/30 via 192.0.2.5
    ip link add out type veth peer name in netns $target
    ip addr add 192.0.2.9/30 dev out; ip link set out up; ip route add unreachable 203.0.113.0/24"
at $target "ip addr add 192.0.2.10/30 dev in; ip link set in up; ip link set lo up; ip route add default via 192.0.2.9"
for each in $first $second $target; do
    at $each "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/icmp_ratelimit"
done
"$1" --exact "$2" --nocapture
"#;

/// Whether the test of that name is inside such a network by now. If not, it has been run there, or skipped.
pub fn are_here(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let inside = |script: &str| {
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "sh", "-ec", script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .arg(test)
            .env(INSIDE, "1")
            .output()
    };
    let words = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    match inside(PROBE) {
        Err(e) => eprintln!("SKIPPED: {test}: unshare: {e}"),
        Ok(output) if !output.status.success() => {
            eprintln!("SKIPPED: {test}: no network namespaces here: {}", words(output.stderr));
        }
        Ok(_) => {
            let output = inside(SETUP).unwrap();
            let (out, err) = (words(output.stdout), words(output.stderr));
            assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
        }
    }
    false
}
