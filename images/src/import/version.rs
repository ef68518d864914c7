//! Which of two kernels is newer.

use std::cmp::Ordering;

/// Compare kernel releases (`6.1.0-9-amd64`, `6.12.48+deb13-cloud-amd64`): runs of digits as numbers, the rest as text.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
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
