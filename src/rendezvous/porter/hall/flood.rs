//! When the doors are left alone for a moment: each refused connection costs a few system calls, and woken for one at a
//! time the porter would take several times as long over them.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// So many refusals a second are no flood, however long they go on.
const REFUSALS_PER_S: u32 = 100;
/// Nor are so many at once.
const REFUSALS_AT_ONCE: u32 = 16;
/// How long the doors are left alone in a flood: those that come meanwhile wait in the kernel's queue.
pub(super) const REST: Duration = Duration::from_millis(20);

/// Counts refusals (as a leaky bucket, which is kept as the time at which it will be empty).
#[derive(Debug, Default)]
pub(super) struct Refusals {
    empty_at: Option<Instant>,
}

impl Refusals {
    /// A connection was refused. Whether there are so many that the doors are to be left alone.
    pub(super) fn note(&mut self, now: Instant) -> bool {
        let one = Duration::from_secs(1) / REFUSALS_PER_S;
        let full = one * REFUSALS_AT_ONCE;
        let left = self.empty_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        // It holds twice what it takes, so that a flood is over soon after its last connection.
        let filled = (left + one).min(full * 2);
        self.empty_at = Some(now + filled);
        filled > full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_are_a_flood_and_few_again_and_again_are_not() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        let at_once = (0..REFUSALS_AT_ONCE + 1).map(|_| refusals.note(start)).collect::<Vec<bool>>();
        assert_eq!(at_once.iter().filter(|flood| **flood).count(), 1);
        assert!(at_once.last().is_some_and(|flood| *flood));
        let mut refusals = Refusals::default();
        let slowly = (0..1000).any(|n| refusals.note(start + Duration::from_millis(11 * n)));
        assert!(!slowly);
    }

    #[test]
    fn a_flood_is_one_from_soon_after_its_start_until_soon_after_its_end() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        // 500 a second, for a minute.
        let noted: Vec<bool> =
            (0..30_000).map(|n| refusals.note(start + Duration::from_millis(2 * n))).collect();
        assert!(noted[50..].iter().all(|flood| *flood));
        let later = start + Duration::from_secs(61);
        assert!(!refusals.note(later));
    }
}
