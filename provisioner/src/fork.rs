//! Forks: labs that are copies of a lab's snapshot and run beside it and beside each other. Inside, all of them are the
//! same, names and addresses included; outside, fork N of `demo` is the lab `demo-N`, with ports of its own.

use crate::labfile::topology::Topology;

/// Forks are numbered from 1.
pub const NUMBERS: std::ops::RangeInclusive<u32> = 1..=400;
/// First of the ports of this machine that are for the lab itself, which is number 0; those of its forks follow.
const FIRST_PORT: u32 = 20_000;
/// Ports for each.
const PORTS: u32 = 100;
/// Of these, how many are for forwards; the others are for SSH, a node each.
const FORWARDS: u32 = 80;

/// Name of a lab's fork.
pub fn name(lab: &str, number: u32) -> String {
    format!("{lab}-{number}")
}

/// Port of this machine where whoever has a key gets into a node, the lab's `index`th; `None` beyond the twentieth.
pub fn ssh_port(number: u32, index: usize) -> Option<u16> {
    let offset = u32::try_from(index).ok()?.checked_add(FORWARDS).filter(|offset| *offset < PORTS)?;
    u16::try_from(FIRST_PORT + PORTS * number + offset).ok()
}

/// Makes a lab's topology that of its fork: another name, and ports 20000 + 100·N and on for its forwards, in their order;
/// those beyond the eightieth are left out.
pub fn adapt(topology: &mut Topology, number: u32) {
    topology.name = name(&topology.name, number);
    let first = FIRST_PORT + PORTS * number;
    let mut ports = (first..first + FORWARDS).filter_map(|port| u16::try_from(port).ok());
    for node in &mut topology.nodes {
        node.forwards.retain_mut(|forward| match ports.next() {
            Some(port) => {
                forward.host_port = port;
                true
            }
            None => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_predictable_and_never_meet() {
        let text = "name = \"demo\"\n[node.a]\nforward = [\"8080:80\", \"8443:443\"]\n[node.b]\nforward = [\"9000-9002:9000-9002\"]\n";
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lab.toml");
        std::fs::write(&file, text).unwrap();
        let topology = crate::labfile::load(&file).unwrap();
        let ports = |number| {
            let mut fork = topology.clone();
            adapt(&mut fork, number);
            assert_eq!(fork.name, format!("demo-{number}"));
            let forwards = fork.nodes.iter().flat_map(|node| &node.forwards);
            forwards.map(|forward| (forward.host_port, forward.guest_port)).collect::<Vec<_>>()
        };
        assert_eq!(ports(1), [(20100, 80), (20101, 443), (20102, 9000), (20103, 9001), (20104, 9002)]);
        assert_eq!(ports(400)[4], (60004, 9002));
        assert_eq!([ssh_port(0, 0), ssh_port(400, 19), ssh_port(1, 20)], [Some(20080), Some(60099), None]);
        assert_eq!(topology.nodes[0].mac, {
            let mut fork = topology.clone();
            adapt(&mut fork, 3);
            fork.nodes[0].mac.clone()
        });
    }
}
