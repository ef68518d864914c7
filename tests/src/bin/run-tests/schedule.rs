//! Which test comes next: what is essential has its place before what is not, and of what fits the shortest is first.

/// Least factor: a machine that boots a node quickly has no quicker downloads.
const LEAST_FACTOR: f64 = 0.5;
/// What booting a tiny node counts beside tests that have run, in seconds where the factor is 1.
const BOOT_WEIGHT_S: f64 = 60.0;
/// `lab up` of a tiny node in the emulated host where the factor is 1, in seconds (docs/benchmarks.md).
pub const BOOT_S: f64 = 7.3;

/// How slow this machine is.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    took_s: f64,
    expected_s: f64,
}

impl Speed {
    /// By what `lab up` of a tiny node took, in seconds.
    pub fn of_boot(seconds: f64) -> Self {
        Self { took_s: BOOT_WEIGHT_S * seconds / BOOT_S, expected_s: BOOT_WEIGHT_S }
    }

    /// Learns from a test that has run.
    pub fn learn(&mut self, took_s: f64, expected_s: f64) {
        self.took_s += took_s;
        self.expected_s += expected_s;
    }

    /// How many times as long as on the machine of the table all takes.
    pub fn factor(self) -> f64 {
        (self.took_s / self.expected_s).max(LEAST_FACTOR)
    }
}

/// A test that has not run yet.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// What it needs here, in seconds.
    pub needs_s: f64,
    /// Whether it comes before all that is not.
    pub essential: bool,
}

/// Index of the test that comes next, of those in the order in which they have their place; `None` if none fits into
/// the time that is left, in seconds.
pub fn next(candidates: &[Candidate], left_s: f64) -> Option<usize> {
    let mut by_place: Vec<_> = candidates.iter().enumerate().collect();
    by_place.sort_by_key(|(_, test)| !test.essential);
    let mut free_s = left_s;
    let mut fit: Vec<_> = by_place
        .into_iter()
        .filter(|(_, test)| {
            let fits = test.needs_s <= free_s;
            if fits {
                free_s -= test.needs_s;
            }
            fits
        })
        .collect();
    fit.sort_by(|(_, a), (_, b)| b.essential.cmp(&a.essential).then(a.needs_s.total_cmp(&b.needs_s)));
    fit.first().map(|(index, _)| *index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(needs_s: f64, essential: bool) -> Candidate {
        Candidate { needs_s, essential }
    }

    /// The order in which tests run, by index, if each takes what it needs.
    fn order(tests: &[Candidate], mut left_s: f64) -> Vec<usize> {
        let mut left: Vec<usize> = (0..tests.len()).collect();
        let mut order = Vec::new();
        loop {
            let candidates: Vec<_> = left.iter().map(|index| tests[*index]).collect();
            let Some(at) = next(&candidates, left_s) else { return order };
            let index = left.remove(at);
            left_s -= tests[index].needs_s;
            order.push(index);
        }
    }

    #[test]
    fn the_shortest_is_first_and_the_essential_before_others() {
        let tests =
            [test(50.0, true), test(10.0, true), test(5.0, false), test(1.0, false), test(10.0, true)];
        assert_eq!(order(&tests, 1000.0), [1, 4, 0, 3, 2]);
    }

    #[test]
    fn an_essential_test_has_its_place_before_short_ones_that_are_not() {
        let tests = [test(1.0, false), test(2.0, false), test(100.0, true), test(3.0, true)];
        assert_eq!(order(&tests, 104.5), [3, 2, 0]);
        // It does not fit itself: then what does.
        assert_eq!(order(&tests, 90.0), [3, 0, 1]);
    }

    #[test]
    fn of_two_that_do_not_fit_both_the_first_of_the_table_does() {
        let tests = [test(60.0, true), test(50.0, true), test(30.0, true)];
        assert_eq!(order(&tests, 100.0), [2, 0]);
        assert_eq!(order(&tests, 20.0), [0; 0]);
    }

    #[test]
    fn a_factor_is_learnt() {
        let mut speed = Speed::of_boot(2.0 * BOOT_S);
        assert_eq!(speed.factor(), 2.0);
        speed.learn(4.0 * BOOT_WEIGHT_S, BOOT_WEIGHT_S);
        assert_eq!(speed.factor(), 3.0);
        assert_eq!(Speed::of_boot(0.1).factor(), LEAST_FACTOR);
    }
}
