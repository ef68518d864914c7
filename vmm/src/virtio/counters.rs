//! Counters that a device's thread adds to and the control socket reads.

use std::sync::atomic::{AtomicU64, Ordering};

/// `N` numbers that only grow.
#[derive(Debug)]
pub struct Counters<const N: usize>([AtomicU64; N]);

impl<const N: usize> Default for Counters<N> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl<const N: usize> Counters<N> {
    /// All numbers as they are now; each is right by itself, they may be a moment apart.
    pub fn read(&self) -> [u64; N] {
        std::array::from_fn(|i| self.0.get(i).map_or(0, |number| number.load(Ordering::Relaxed)))
    }

    /// Adds to one number.
    pub(crate) fn add(&self, index: usize, amount: u64) {
        if let Some(number) = self.0.get(index) {
            number.fetch_add(amount, Ordering::Relaxed);
        }
    }
}
