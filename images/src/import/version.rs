//! Which of two kernels is the better one.

use std::cmp::Ordering;

/// Compare kernel releases by which a distribution would rather boot: those of special use and release candidates are
/// less than all others, newer ones are greater.
pub(super) fn rank(a: &str, b: &str) -> Ordering {
    is_special(b).cmp(&is_special(a)).then_with(|| compare(a, b))
}

/// Whether a release is one of special use: `0-rescue-ID`, `6.1.0+debug`, `6.1.0.old`, `6.12.0-0.rc6.51.fc42`.
fn is_special(release: &str) -> bool {
    release.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| match word.strip_prefix("rc") {
        Some(number) => number.bytes().all(|byte| byte.is_ascii_digit()),
        None => matches!(word, "rescue" | "debug" | "old" | "bak" | "kdump"),
    })
}

/// Compare kernel releases (`6.1.0-9-amd64`, `6.12.48+deb13-cloud-amd64`): runs of digits as numbers, the rest as text.
fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() && !b.is_empty() {
        let ((run_a, rest_a), (run_b, rest_b)) = (run(a), run(b));
        let order = match (number(run_a), number(run_b)) {
            (Some(x), Some(y)) => (x.len(), x).cmp(&(y.len(), y)),
            _ => run_a.cmp(run_b),
        };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    a.len().cmp(&b.len())
}

/// Split off the first run of digits, or of what is none.
fn run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
    text.split_at(end)
}

/// A number without leading zeros, of any length.
fn number(run: &str) -> Option<&str> {
    run.starts_with(|c: char| c.is_ascii_digit()).then(|| run.trim_start_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_special_use_is_less_than_what_is_not() {
        let special = [
            "0-rescue-0123456789abcdef",
            "6.99.0+debug",
            "6.99.0-1-debug",
            "6.99.0-31-generic.old",
            "6.99.0-0.rc6.51.fc42.x86_64",
            "6.99-rc1",
            "6.99~rc1-amd64",
        ];
        for release in special {
            assert_eq!(rank(release, "6.1.0-9-amd64"), Ordering::Less, "{release}");
        }
        assert_eq!(rank("6.1-rc2", "6.1-rc1"), Ordering::Greater);
        assert_eq!(rank("6.13.1-arch1-1", "6.1.0-9-amd64"), Ordering::Greater);
        assert_eq!(rank("6.2.0-orchard", "6.1.0-9-amd64"), Ordering::Greater);
    }

    #[test]
    fn the_newer_kernel_is_the_greater() {
        let sorted = [
            "5.15.0-91-generic",
            "6.1.0-9-amd64",
            "6.1.0-10-amd64",
            "6.8.0-31-generic",
            "6.12.5-cloud-amd64",
            "6.12.48+deb13-cloud-amd64",
            "6.12.48+deb14-cloud-amd64",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("6.1", "6.1"), Ordering::Equal);
        assert_eq!(compare("6.1", "6.1.1"), Ordering::Less);
        assert_eq!(compare("99999999999999999999999", "100000000000000000000000"), Ordering::Less);
    }
}
