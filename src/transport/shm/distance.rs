//! How far away the peer's core is: does it share this core's third-level cache?
//!
//! Where it does not, a line that the peer's cache holds is best overwritten past the caches; where it does, that
//! would send everything through memory. Virtual processors move between the two within seconds, so it is measured
//! all the time, with what has to be done anyway: the first look at an index that the peer has changed fetches
//! its line from the peer's cache. Only speed depends on the outcome.

use std::sync::atomic::{AtomicU64, Ordering};

/// What such a look takes at least when the line comes from another third-level cache, in ticks of the time stamp
/// counter (2 to 4 for each nanosecond). Measured on AMD Zen 4 at 2.6: about 100 near, 500 far.
const FAR_TICKS: u64 = 200;
/// Longer looks have been interrupted, and tell nothing.
const INTERRUPTED_TICKS: u64 = 3000;
/// So many looks in a row change the mind, at most.
const SCORE_MAX: i32 = 16;

/// What the looks have told.
#[derive(Default)]
pub struct Distance {
    /// Above 0: far.
    score: i32,
}

impl Distance {
    /// Whether the peer's core seems to share no cache with this one.
    pub fn is_far(&self) -> bool {
        self.score > 0
    }

    /// Looks at an index that the peer writes and that was `known` when it was last looked at.
    pub fn look(&mut self, index: &AtomicU64, known: u64) {
        let begin = ticks();
        let changed = index.load(Ordering::Acquire) != known;
        let took = ticks().wrapping_sub(begin);
        if changed {
            self.learn(took);
        }
    }

    fn learn(&mut self, ticks: u64) {
        if ticks < INTERRUPTED_TICKS {
            let step = if ticks >= FAR_TICKS { 1 } else { -1 };
            self.score = (self.score + step).clamp(-SCORE_MAX, SCORE_MAX);
        }
    }
}

/// The time stamp counter, read when everything before it is complete.
#[cfg(target_arch = "x86_64")]
fn ticks() -> u64 {
    // SAFETY: both instructions are part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// Other architectures have no streaming stores to choose.
#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_looks_do_not_change_the_mind_and_many_do() {
        let mut distance = Distance::default();
        assert!(!distance.is_far());
        (0..100).for_each(|_| distance.learn(90));
        (0..10).for_each(|_| distance.learn(500));
        (0..100).for_each(|_| distance.learn(1 << 20));
        assert!(!distance.is_far());
        (0..10).for_each(|_| distance.learn(500));
        assert!(distance.is_far());
        (0..40).for_each(|_| distance.learn(90));
        assert!(!distance.is_far());
    }

    #[test]
    fn an_index_that_has_not_changed_tells_nothing() {
        let (mut distance, index) = (Distance::default(), AtomicU64::new(7));
        (0..100).for_each(|_| distance.look(&index, 7));
        assert_eq!(distance.score, 0);
    }
}
