//! Nodes: counts expanded, defaults filled in, roles and addresses given.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
};

use super::{
    diagnostic::visible,
    file::{At, File, NodeTable},
    forward::Taken,
    mac,
    names::{self, LABEL},
    network,
    report::Report,
    shape::join,
    size::{self, GIB, MIB, TIB},
    topology::{Network, Node},
};

/// Most nodes of a lab.
pub const MAX_NODES: usize = 250;
const IMAGE: &str = "debian-13";
/// Names that would mean something else.
const RESERVED: [&str; 3] = ["all", "localhost", "gateway"];

/// One node to be, and the table that it comes from.
struct Draft<'f> {
    name: String,
    key: &'f At<String>,
    path: String,
    table: &'f NodeTable,
    /// Which of its table's nodes it is, from 0.
    index: usize,
}

/// All nodes, in the order of the file. Where something was wrong, which is reported, a default stands in.
pub fn resolve(
    file: &File,
    lab: Option<&str>,
    network: Option<&Network>,
    report: &mut Report<'_>,
) -> Vec<Node> {
    let drafts = expand(file, report);
    let addresses = addresses(&drafts, network, report);
    let macs = macs(&drafts, lab.unwrap_or_default(), report);
    let roles = roles(&drafts, report);
    let mut taken = Taken::default();
    let mut nodes = Vec::new();
    for (((draft, ip), mac), role) in drafts.iter().zip(addresses).zip(macs).zip(roles) {
        let (table, key) = (draft.table, |name| join(&draft.path, name));
        let (image, image_key) = match &table.image {
            Some(image) => (Some(image), key("image")),
            None => (file.image.as_ref(), "image".to_owned()),
        };
        let memory = size::at(table.memory.as_ref(), GIB, 64 * MIB..=64 * GIB, &key("memory"), report);
        let mut node = Node {
            name: draft.name.clone(),
            role,
            image: image_name(image, &image_key, report),
            ip,
            mac,
            cpus: table.cpus.as_ref().map_or(1, |cpus| *cpus.get()),
            nested: table.nested.as_ref().is_some_and(|nested| *nested.get()),
            memory_mib: memory / MIB,
            disk_bytes: size::at(table.disk.as_ref(), 10 * GIB, 64 * MIB..=16 * TIB, &key("disk"), report),
            extra_disks_bytes: extra_disks(table, &key("disks"), report),
            forwards: Vec::new(),
        };
        if let Some(list) = &table.forward {
            taken.add(&mut node, draft.index, list.get(), &key("forward"), network, report);
        }
        nodes.push(node);
    }
    nodes
}

fn expand<'f>(file: &'f File, report: &mut Report<'_>) -> Vec<Draft<'f>> {
    let mut tables: Vec<(&At<String>, &NodeTable)> = file.node.iter().collect();
    tables.sort_by_key(|(key, _)| key.span().start);
    if tables.is_empty() && report.is_clean() {
        report.error(
            None,
            "node",
            "the lab has no nodes".to_owned(),
            "add one: a line `[node.master]` is enough",
        );
    }
    let mut drafts: Vec<Draft<'f>> = Vec::new();
    let mut owners: HashMap<String, &At<String>> = HashMap::new();
    for (key, table) in tables {
        let path = join("node", key.get());
        let count = table.count.as_ref().map_or(1, |count| usize::from(*count.get()));
        if count > 1 && !key.get().contains("{n}") {
            let message = format!("`{}` can't be the name of {count} nodes", visible(key.get()));
            let help = format!(
                "put {{n}} where the number goes: [{}]",
                join("node", &format!("{}{{n}}", visible(key.get())))
            );
            report.error(Some(key.span()), &path, message, help);
            continue;
        }
        if drafts.len().saturating_add(count) > MAX_NODES {
            let message = format!("the lab would have more than {MAX_NODES} nodes");
            report.error(Some(key.span()), &path, message, format!("{MAX_NODES} are possible"));
            break;
        }
        let names: Vec<String> =
            (1..=count).map(|number| key.get().replace("{n}", &number.to_string())).collect();
        if let Some(wrong) = names.iter().find(|name| !names::is_label(name)) {
            let message = format!("`{}` can't be a node's name", visible(wrong));
            report.error(Some(key.span()), &path, message, names::suggest(wrong, LABEL, 63));
            continue;
        }
        for (index, name) in names.into_iter().enumerate() {
            if RESERVED.contains(&name.as_str()) {
                let help = "call the node something else";
                report.error(
                    Some(key.span()),
                    &path,
                    format!("`{name}` can't be a node's name: it is reserved"),
                    help,
                );
            }
            if let Some(other) = owners.insert(name.clone(), key) {
                let message =
                    format!("there are two nodes `{name}`: the other is of [{}]", join("node", other.get()));
                report.error(Some(key.span()), &path, message, "rename one of them");
                continue;
            }
            drafts.push(Draft { name, key, path: path.clone(), table, index });
        }
    }
    drafts
}

/// Fixed addresses first, then the rest.
fn addresses(drafts: &[Draft<'_>], network: Option<&Network>, report: &mut Report<'_>) -> Vec<Ipv4Addr> {
    let Some(network) = network else { return vec![Ipv4Addr::UNSPECIFIED; drafts.len()] };
    let mut owners: HashMap<Ipv4Addr, &str> = HashMap::new();
    let mut fixed: Vec<Option<Ipv4Addr>> = Vec::new();
    // Of a table with a count, the first wrong address is told.
    let mut told: HashSet<usize> = HashSet::new();
    for draft in drafts {
        let key = join(&draft.path, "ip");
        let address = draft.table.ip.as_ref().and_then(|text| {
            let first = network::address(text, &key, report)?;
            let address =
                u32::try_from(draft.index).ok().and_then(|index| first.to_bits().checked_add(index));
            let address = Ipv4Addr::from_bits(address.unwrap_or(u32::MAX));
            let wrong = if let Some(why) = network.refusal(address) {
                Some((why, network.advice()))
            } else if address == network.gateway {
                let help = "take another, or give the gateway another in [network]";
                Some(("it is the gateway's".to_owned(), help.to_owned()))
            } else if let Some(other) = owners.insert(address, &draft.name) {
                let help = "give each node an address of its own, or leave `ip` out";
                Some((format!("`{other}` has it"), help.to_owned()))
            } else {
                None
            };
            if let Some((why, help)) = wrong
                && told.insert(text.span().start)
            {
                let message = format!("`{}` can't have {address}: {why}", draft.name);
                report.error(Some(text.span()), &key, message, help);
            }
            Some(address)
        });
        fixed.push(address);
    }
    let mut free = network.automatic().filter(|address| !owners.contains_key(address));
    let mut given = Vec::new();
    for (draft, fixed) in drafts.iter().zip(fixed) {
        let address = fixed.or_else(|| if draft.table.ip.is_none() { free.next() } else { None });
        if address.is_none() && draft.table.ip.is_none() && told.insert(draft.key.span().start) {
            let message =
                format!("no address is left for `{}` in {}/{}", draft.name, network.subnet, network.prefix);
            report.error(Some(draft.key.span()), &draft.path, message, "take a larger subnet in [network]");
        }
        given.push(address.unwrap_or(Ipv4Addr::UNSPECIFIED));
    }
    given
}

fn macs(drafts: &[Draft<'_>], lab: &str, report: &mut Report<'_>) -> Vec<String> {
    let mut taken = HashSet::new();
    let mut fixed: Vec<Option<String>> = Vec::new();
    let mut told: HashSet<usize> = HashSet::new();
    for draft in drafts {
        let key = join(&draft.path, "mac");
        let address = draft.table.mac.as_ref().and_then(|text| {
            let address = mac::given(text, &key, report)?;
            if !taken.insert(address.clone()) && told.insert(text.span().start) {
                let message = format!("`{}` can't have {address}: another node has it", draft.name);
                let help = "give each node one of its own, or leave `mac` out";
                report.error(Some(text.span()), &key, message, help);
            }
            Some(address)
        });
        fixed.push(address);
    }
    let mut given = Vec::new();
    for (draft, fixed) in drafts.iter().zip(fixed) {
        let address = fixed.unwrap_or_else(|| mac::made(lab, &draft.name, &taken));
        taken.insert(address.clone());
        given.push(address);
    }
    given
}

fn roles(drafts: &[Draft<'_>], report: &mut Report<'_>) -> Vec<String> {
    let named = |draft: &Draft<'_>| draft.table.role.as_ref().map(|role| role.get().clone());
    let mut master_needed = !drafts.iter().any(|draft| named(draft).as_deref() == Some("master"));
    let mut roles = Vec::new();
    for draft in drafts {
        if let Some(role) = &draft.table.role {
            let key = join(&draft.path, "role");
            if !names::is_label(role.get()) {
                let message = format!("`{}` can't be a role", visible(role.get()));
                report.error(Some(role.span()), &key, message, names::suggest(role.get(), LABEL, 63));
            } else if role.get() == "all" {
                let message = "`all` can't be a role: it means every node".to_owned();
                report.error(Some(role.span()), &key, message, "`master`, `worker`, or a word of your own");
            }
        }
        roles.push(named(draft).unwrap_or_else(|| {
            let role = if master_needed { "master" } else { "worker" };
            master_needed = false;
            role.to_owned()
        }));
    }
    roles
}

fn image_name(image: Option<&At<String>>, key: &str, report: &mut Report<'_>) -> String {
    let Some(image) = image else { return IMAGE.to_owned() };
    if !names::is_image(image.get()) {
        let message = format!("`{}` can't be an image's name", visible(image.get()));
        report.error(
            Some(image.span()),
            key,
            message,
            "`lab image ls` lists what there is, such as `debian-13`",
        );
    }
    image.get().clone()
}

fn extra_disks(table: &NodeTable, key: &str, report: &mut Report<'_>) -> Vec<u64> {
    let Some(list) = &table.disks else { return Vec::new() };
    let size =
        |(position, text)| size::at(Some(text), GIB, MIB..=16 * TIB, &format!("{key}[{position}]"), report);
    list.get().iter().enumerate().map(size).collect()
}
