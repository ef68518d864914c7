//! User and group ids that an ordinary user may give to what runs in a user namespace: /etc/subuid and /etc/subgid
//! (subuid(5)).

use std::process::Command;

/// Ids that a whole system takes: as many users and groups as Debian's packages may make.
pub const COUNT: u32 = 65536;

/// What this user is called in those files: by name or by number. The name is not taken from the environment, where a
/// job of cron's or of a CI system has none.
pub fn names() -> Vec<String> {
    let login = Command::new("id").arg("-un").output().map(|output| output.stdout).unwrap_or_default();
    let login = String::from_utf8_lossy(&login).trim().to_owned();
    vec![login, rustix::process::getuid().as_raw().to_string()]
}

/// The first id of a range of at least [`COUNT`] of them that `table` gives to one of `names`.
pub fn first(table: &str, names: &[String]) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, first, length) = (fields.next()?, fields.next()?, fields.next()?);
        let enough = length.trim().parse::<u32>().ok()? >= COUNT;
        (enough && !name.is_empty() && names.iter().any(|own| own == name)).then(|| first.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_or_number() {
        let table = "other:100000:65536\n4711:200000:1000\n4711:300000:65536\nme:400000:65536\n";
        let first = |name: &str| first(table, &[String::new(), name.into()]);
        assert_eq!(first("4711"), Some(300_000));
        assert_eq!(first("me"), Some(400_000));
        assert_eq!(first("4712"), None);
        assert_eq!(super::first("4711:x:65536\nnonsense", &["4711".into()]), None);
    }

    #[test]
    fn this_user_has_a_name_and_a_number() {
        let [name, number] = names().try_into().unwrap();
        assert!(!name.is_empty() && number.parse::<u32>().is_ok(), "{name} {number}");
    }
}
