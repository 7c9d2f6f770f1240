//! The shared memory that one process may take, whatever for.
#![forbid(unsafe_code)]

use crate::error::Cause;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number of bytes (`CAROLE_MEMORY`) of which shares are taken and given back.
#[derive(Clone, Debug)]
pub struct Budget {
    max: u64,
    taken: Arc<AtomicU64>,
}

/// A part of a [`Budget`]; given back when dropped.
#[derive(Debug)]
pub struct Share {
    bytes: u64,
    taken: Arc<AtomicU64>,
}

impl Budget {
    /// Nothing of `max` bytes is taken.
    #[must_use]
    pub fn new(max: u64) -> Budget {
        Budget { max, taken: Arc::default() }
    }

    /// Whether `bytes` are free.
    #[must_use]
    pub fn has(&self, bytes: u64) -> bool {
        self.taken.load(Ordering::Relaxed).checked_add(bytes).is_some_and(|sum| sum <= self.max)
    }

    /// Takes `bytes`, or says what to do.
    pub fn take(&self, bytes: u64) -> Result<Share, Cause> {
        let more = |taken: u64| taken.checked_add(bytes).filter(|&sum| sum <= self.max);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Share { bytes, taken: self.taken.clone() }),
            Err(taken) => Err(Cause::System(format!(
                "shared memory exhausted: {taken} of the {} bytes that CAROLE_MEMORY allows are taken, and a link \
                 needs {bytes} more; raise CAROLE_MEMORY, or set CAROLE_TRANSPORT=tcp",
                self.max
            ))),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_never_exceed_the_budget_and_come_back() {
        let budget = Budget::new(100);
        let (a, b) = (budget.take(60).unwrap(), budget.take(40).unwrap());
        let words = budget.take(1).unwrap_err().to_string();
        assert!(words.contains("100 of the 100 bytes") && words.contains("CAROLE_MEMORY"), "{words}");
        drop(a);
        assert!(budget.take(61).is_err() && budget.take(u64::MAX).is_err());
        let c = budget.clone().take(60).unwrap();
        assert!(budget.take(1).is_err());
        drop((b, c));
        assert!(budget.take(100).is_ok());
    }
}
