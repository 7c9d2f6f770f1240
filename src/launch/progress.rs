//! How far the start of a job has come: said when it takes long, and who is waited for.
#![forbid(unsafe_code)]

use crate::rendezvous::server::Arrivals;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// From the first arrival to the first word about those that are missing; each further one takes twice as long.
const PATIENCE: Duration = Duration::from_secs(4);
/// Ranks that are named.
const NAMED: usize = 8;

/// Watches the ranks arrive at the rendezvous. A program that never asks for the others is not waited for.
#[derive(Default)]
pub struct Progress {
    watched: Option<Watched>,
}

struct Watched {
    arrivals: Arrivals,
    size: usize,
    started: Instant,
    first: Option<Instant>,
    patience: Duration,
    look_at: Instant,
    verbose: bool,
}

impl Progress {
    /// Of a job of `size` ranks that starts now. `verbose`: the arrival of all is worth a word.
    pub fn new(arrivals: Arrivals, size: usize, verbose: bool) -> Progress {
        let now = Instant::now();
        let (patience, look_at) = (PATIENCE, now + LOOK);
        Progress {
            watched: Some(Watched { arrivals, size, started: now, first: None, patience, look_at, verbose }),
        }
    }

    /// When to look again.
    pub fn deadline(&self) -> Option<Instant> {
        self.watched.as_ref().map(|watched| watched.look_at)
    }

    /// What is to be said now, if anything; `place` names a rank.
    pub fn words(&mut self, now: Instant, place: impl Fn(usize) -> String) -> Option<String> {
        let watched = self.watched.as_mut().filter(|watched| watched.look_at <= now)?;
        watched.look_at = now + LOOK;
        let there = watched.arrivals.list();
        let since = now.duration_since(watched.started);
        if watched.arrivals.complete() {
            let words = format!("all {} ranks connected after {:.1} s", watched.size, since.as_secs_f64());
            let told = watched.verbose || watched.patience > PATIENCE;
            self.watched = None;
            return told.then_some(words);
        }
        if there.is_empty() {
            return None;
        }
        let first = *watched.first.get_or_insert(now);
        if now < first + watched.patience {
            return None;
        }
        watched.patience *= 2;
        let missing: Vec<usize> =
            (0..watched.size).filter(|&rank| there.binary_search(&(rank as u32)).is_err()).collect();
        let mut named: Vec<String> = missing.iter().take(NAMED).map(|&rank| place(rank)).collect();
        if missing.len() > NAMED {
            named.push(format!("{} more", missing.len() - NAMED));
        }
        Some(format!(
            "{} of {} ranks connected; waiting since {} s for {}",
            there.len(),
            watched.size,
            since.as_secs(),
            named.join(", ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_missing_are_named_at_longer_and_longer_intervals() {
        let arrivals = Arrivals::default();
        let mut progress = Progress::new(arrivals.clone(), 12, false);
        let start = Instant::now();
        let mut words =
            |s: f64| progress.words(start + Duration::from_secs_f64(s), |rank| format!("rank {rank}"));
        assert_eq!(words(30.0), None, "nobody has come, so perhaps nobody will");
        arrivals.insert(0);
        arrivals.insert(2);
        assert_eq!(words(31.0), None);
        let told = words(36.0).unwrap();
        assert!(told.starts_with("2 of 12 ranks connected; waiting since 36 s for rank 1, rank 3"), "{told}");
        assert!(told.ends_with("rank 9, 2 more"), "{told}");
        assert_eq!(words(38.0), None);
        assert!(words(40.0).is_some());
        arrivals.finish();
        assert!(words(41.0).unwrap().starts_with("all 12 ranks connected"));
        assert_eq!(words(60.0), None);
    }
}
