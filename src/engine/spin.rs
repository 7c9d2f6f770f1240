//! How long a waiter looks again and again before it sleeps.
//!
//! Looking pays where the peer runs at the same time and answers soon. It is worse than useless where the peer
//! waits for this very processor, or comes much later. Nothing says beforehand which it is, so the waiter
//! learns: looks that end in sleep make the next ones shorter, looks that find something make them longer, and
//! now and then it looks for the whole time again, so that it finds out when things have changed.
#![forbid(unsafe_code)]

use std::time::Duration;

/// One wait in this many is given the whole time; fewer and fewer of them while that does not help.
const PROBE_EVERY: u32 = 32;
const PROBE_EVERY_MAX: u32 = 1024;

/// Over links that are polled a waiter looks for so many times the whole time.
const POLLED_SPINS: u64 = 4;

/// What has been learnt about waiting.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    whole_ns: u64,
    shortest_ns: u64,
    budget_ns: u64,
    waits: u32,
    probe_every: u32,
}

impl Spin {
    /// Nothing has been learnt: the whole time. Looks get no shorter than `shortest_ns`.
    #[must_use]
    pub fn new(whole_ns: u64, shortest_ns: u64) -> Spin {
        Spin { whole_ns, shortest_ns, budget_ns: whole_ns, waits: 0, probe_every: PROBE_EVERY }
    }

    /// How long to look this time.
    #[must_use]
    pub fn limit_ns(&self) -> u64 {
        if self.is_probe() { self.whole_ns } else { self.budget_ns }
    }

    /// The longest that is ever looked: for what is known to be on its way.
    #[must_use]
    pub fn whole_ns(&self) -> u64 {
        self.whole_ns
    }

    /// How long to look over links that are polled. Nothing ends a nap there, and with the kernel's slack the shortest
    /// takes 60 to 80 us: who looked for less time than the peer naps would nap then, too, and both would go on so for
    /// ever (measured over MPICH: 670 us for what takes 112).
    #[must_use]
    pub fn polled_ns(&self) -> u64 {
        POLLED_SPINS * self.whole_ns
    }

    fn is_probe(&self) -> bool {
        self.waits + 1 >= self.probe_every
    }

    /// Something came after this time of looking. Later than the limit counts as not at all: the processor was
    /// given away and came back too late.
    pub fn found(&mut self, after_ns: u64) {
        if after_ns > self.limit_ns() {
            return self.failed();
        }
        self.budget_ns =
            if self.is_probe() { self.whole_ns } else { (self.budget_ns * 2).min(self.whole_ns) };
        self.waits = 0;
        self.probe_every = PROBE_EVERY;
    }

    /// Nothing came: the waiter sleeps.
    pub fn failed(&mut self) {
        self.budget_ns = (self.budget_ns / 2).max(self.shortest_ns);
        if self.is_probe() {
            self.waits = 0;
            self.probe_every = (self.probe_every * 2).min(PROBE_EVERY_MAX);
        } else {
            self.waits += 1;
        }
    }
}

/// How long whoever drives sleeps where nothing wakes it: at first hardly at all, and longer and longer while nothing
/// moves.
#[derive(Clone, Copy, Debug)]
pub struct Naps {
    next: Duration,
}

impl Naps {
    const SHORTEST: Duration = Duration::from_micros(10);
    /// The longest, and so the most that a message can be late.
    pub const LONGEST: Duration = Duration::from_millis(1);

    /// Something has just moved.
    pub fn new() -> Naps {
        Naps { next: Naps::SHORTEST }
    }

    /// The length of this nap.
    pub fn take(&mut self) -> Duration {
        let nap = self.next;
        self.next = (nap * 2).min(Naps::LONGEST);
        nap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_never_answers_in_time_is_not_looked_at_for_long() {
        let mut spin = Spin::new(50_000, 3_000);
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
        let mut spin = Spin::new(50_000, 3_000);
        (0..1000).for_each(|_| spin.failed());
        // It answers after 20 us now: the next probe finds out.
        let waits = (0..)
            .take_while(|_| {
                let sees = spin.limit_ns() >= 20_000;
                if sees {
                    spin.found(20_000)
                } else {
                    spin.failed()
                }
                !sees
            })
            .count();
        assert!(waits < PROBE_EVERY_MAX as usize);
        assert_eq!(spin.limit_ns(), 50_000);
    }

    #[test]
    fn a_processor_that_comes_back_late_is_not_given_away_again() {
        let mut spin = Spin::new(50_000, 0);
        (0..20).for_each(|_| spin.found(4_000_000));
        assert_eq!(spin.limit_ns(), 0);
        // Until a probe finds that it comes back in time.
        (0..20).for_each(|_| if spin.limit_ns() > 0 { spin.found(1_000) } else { spin.failed() });
        assert_eq!(spin.limit_ns(), 50_000);
    }

    #[test]
    fn naps_grow_to_their_bound() {
        let mut naps = Naps::new();
        let all: Vec<Duration> = (0..20).map(|_| naps.take()).collect();
        assert!(all.is_sorted() && all[0] < Duration::from_micros(50) && all[19] == Naps::LONGEST);
    }

    #[test]
    fn no_time_stays_no_time() {
        let mut spin = Spin::new(0, 0);
        spin.failed();
        spin.found(0);
        assert_eq!(spin.limit_ns(), 0);
    }
}
