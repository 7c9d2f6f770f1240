//! How long a waiter looks again and again before it sleeps.
//!
//! Looking pays where the peer runs at the same time and answers soon. It is worse than useless where the peer
//! waits for this very processor, or comes much later. Nothing says beforehand which it is, so the waiter
//! learns: looks that end in sleep make the next ones shorter, looks that find something make them longer, and
//! now and then it looks for the whole time again, so that it finds out when things have changed.
#![forbid(unsafe_code)]

/// Looks are never shorter than this part of the whole time.
const SHORTEST_PART: u64 = 16;
/// One wait in this many is given the whole time.
const PROBE_EVERY: u32 = 32;

/// What has been learnt about waiting.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    whole_ns: u64,
    budget_ns: u64,
    waits: u32,
}

impl Spin {
    /// Nothing has been learnt: the whole time.
    #[must_use]
    pub fn new(whole_ns: u64) -> Spin {
        Spin { whole_ns, budget_ns: whole_ns, waits: 0 }
    }

    /// How long to look this time.
    #[must_use]
    pub fn limit_ns(&self) -> u64 {
        if self.waits % PROBE_EVERY == PROBE_EVERY - 1 { self.whole_ns } else { self.budget_ns }
    }

    /// Something came within the time.
    pub fn found(&mut self) {
        let probed = self.limit_ns() > self.budget_ns;
        self.budget_ns = if probed { self.whole_ns } else { (self.budget_ns * 2).min(self.whole_ns) };
        self.waits = 0;
    }

    /// Nothing came: the waiter sleeps.
    pub fn failed(&mut self) {
        self.budget_ns = (self.budget_ns / 2).max(self.whole_ns / SHORTEST_PART);
        self.waits = self.waits.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_never_answers_in_time_is_not_looked_at_for_long() {
        let mut spin = Spin::new(50_000);
        assert_eq!(spin.limit_ns(), 50_000);
        let looked: u64 = (0..3200)
            .map(|_| {
                let limit = spin.limit_ns();
                spin.failed();
                limit
            })
            .sum();
        assert!(looked / 3200 < 6_000, "{} ns for each wait", looked / 3200);
    }

    #[test]
    fn a_peer_that_answers_in_time_again_is_found_out() {
        let mut spin = Spin::new(50_000);
        (0..1000).for_each(|_| spin.failed());
        // It answers after 20 us now: the next probe finds out.
        let waits = (0..)
            .take_while(|_| {
                let sees = spin.limit_ns() >= 20_000;
                if sees {
                    spin.found()
                } else {
                    spin.failed()
                }
                !sees
            })
            .count();
        assert!(waits < PROBE_EVERY as usize);
        assert_eq!(spin.limit_ns(), 50_000);
    }

    #[test]
    fn no_time_stays_no_time() {
        let mut spin = Spin::new(0);
        spin.failed();
        spin.found();
        assert_eq!(spin.limit_ns(), 0);
    }
}
