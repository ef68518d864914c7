//! MAC addresses of nodes: the same for the same lab and node on every machine.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use super::{diagnostic::visible, file::At, report::Report};

/// A MAC address made from names: 52:54:00 and three bytes of their hash, unlike all that are `taken`.
pub fn made(lab: &str, node: &str, taken: &HashSet<String>) -> String {
    let mut round = 0u32;
    loop {
        let mut hash = Sha256::new();
        hash.update(lab.as_bytes());
        hash.update([0]);
        hash.update(node.as_bytes());
        if round > 0 {
            hash.update(round.to_le_bytes());
        }
        let digest = hash.finalize();
        let mac = match digest.as_slice() {
            [a, b, c, ..] => format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"),
            _ => format!("52:54:00:00:00:{:02x}", round & 0xff),
        };
        if !taken.contains(&mac) {
            return mac;
        }
        round = round.wrapping_add(1);
    }
}

/// The MAC address at a key, in lower case; what isn't one is reported.
pub fn given(text: &At<String>, key: &str, report: &mut Report<'_>) -> Option<String> {
    let octets: Vec<Option<u8>> = text
        .get()
        .split(':')
        .map(|octet| {
            u8::from_str_radix(octet, 16).ok().filter(|_| octet.len() == 2 && !octet.starts_with('+'))
        })
        .collect();
    let shown = visible(text.get());
    let (message, help) = match octets.as_slice() {
        [Some(first), Some(_), Some(_), Some(_), Some(_), Some(_)] if first & 1 == 0 => {
            if octets.iter().any(|octet| *octet != Some(0)) {
                return Some(text.get().to_ascii_lowercase());
            }
            (format!("`{shown}` is nobody's address"), "leave it out, and one is made")
        }
        [Some(_), Some(_), Some(_), Some(_), Some(_), Some(_)] => (
            format!("`{shown}` is a group's address"),
            "the first number of a card's address is even, such as 52",
        ),
        _ => (
            format!("`{shown}` is not a MAC address"),
            "write six pairs of hexadecimal digits: \"52:54:00:12:34:56\"",
        ),
    };
    report.error(Some(text.span()), key, message, help);
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collisions_are_resolved() {
        let mut taken = HashSet::new();
        let first = made("lab", "node", &taken);
        assert_eq!(first, made("lab", "node", &taken));
        assert!(first.starts_with("52:54:00:"));
        taken.insert(first.clone());
        let second = made("lab", "node", &taken);
        assert_ne!(first, second);
        assert_ne!(first, made("lab2", "node", &HashSet::new()));
    }
}
