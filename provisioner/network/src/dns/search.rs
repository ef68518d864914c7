//! Search domains: where a node looks for names besides the lab's own domain, which are those of the host (resolv.conf(5)),
//! and how DHCP tells them (RFC 3397).

use super::zone::wire_name;

/// Most of the host's that are passed on: with the lab's own, six are what every resolver can do.
const MAX: usize = 5;
/// Longest value of a DHCP option in bytes.
const OPTION: usize = 255;

/// The search domains of a resolv.conf(5): those of the last line that has some.
pub fn parse(text: &str) -> Vec<String> {
    let last = text.lines().rev().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let all = match words.next()? {
            "search" => usize::MAX,
            "domain" => 1,
            _ => return None,
        };
        Some(words.take(all).map(|word| word.trim_end_matches('.').to_ascii_lowercase()))
    });
    let mut domains: Vec<String> = Vec::new();
    for domain in last.into_iter().flatten() {
        if is_domain(&domain) && !domains.contains(&domain) && domains.len() < MAX {
            domains.push(domain);
        }
    }
    domains
}

/// The value of DHCP's option 119: `own`, and behind it as many of the others as there is room for.
pub fn option(own: &str, others: &[String]) -> Vec<u8> {
    let mut value = Vec::new();
    for domain in std::iter::once(own).chain(others.iter().map(String::as_str)) {
        let name = wire_name(domain);
        if value.len().saturating_add(name.len()) <= OPTION {
            value.extend(name);
        }
    }
    value
}

fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len()) && label.bytes().all(known)
    };
    text.len() <= 253 && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_line_counts_and_what_is_no_domain_does_not() {
        assert!(parse("nameserver 192.0.2.1\n# search no\n").is_empty());
        assert_eq!(parse("search a.example b\nnameserver 192.0.2.1\n"), ["a.example", "b"]);
        assert_eq!(parse("search a b\ndomain Corp.Example. c\n"), ["corp.example"]);
        assert_eq!(parse("domain a\nsearch . b b. $(c) d..e f/g b.c\n"), ["b", "b.c"]);
        assert_eq!(parse("search a b c d e f g"), ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn an_option_has_the_labs_own_first_and_whole_names() {
        let others = ["corp.example".to_owned()];
        assert_eq!(option("test.lab", &others), b"\x04test\x03lab\0\x04corp\x07example\0");
        let long = ["x".repeat(63).as_str(); 3].join(".");
        let value = option("test.lab", &[long.clone(), long, "corp.example".into()]);
        assert_eq!(value.len(), 10 + 193 + 14);
    }

    proptest! {
        #[test]
        fn random_lines_fit(text in "(search|domain)( [a-z.]{0,300}){0,9}") {
            let domains = parse(&text);
            prop_assert!(domains.len() <= MAX && option("test.lab", &domains).len() <= OPTION);
        }
    }
}
