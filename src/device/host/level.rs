//! Which vector instructions the kernels use. All levels give the same bits, so that processors may be
//! mixed in a job; the level is agreed at the start of an epoch all the same, so that timings are alike.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// A set of vector instructions for which the kernels were compiled.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Level {
    /// What every processor of this architecture has (x86-64: SSE2).
    Baseline = 0,
    /// AVX2 and F16C (x86-64-v3).
    Avx2 = 1,
    /// AVX-512 F, BW, DQ and VL, with AVX2 and F16C (x86-64-v4).
    Avx512 = 2,
}

impl Level {
    /// Every level, the plainest first.
    pub const ALL: &'static [Level] = &[Level::Baseline, Level::Avx2, Level::Avx512];

    /// The name that users write and read.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// The level that users write so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Level> {
        Level::ALL.iter().copied().find(|level| level.name() == name)
    }

    /// The code that crosses the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The level with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Level> {
        Level::ALL.get(usize::from(code)).copied()
    }

    /// Whether this processor has the instructions (and the operating system keeps their registers).
    #[must_use]
    pub fn is_available(self) -> bool {
        self <= available()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The best level that this processor has. The lower ones are available too.
#[must_use]
pub fn available() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx512) {
            (true, true) => return Level::Avx512,
            (true, false) => return Level::Avx2,
            _ => {}
        }
    }
    Level::Baseline
}

/// No level has been set: the first use takes the best one.
const UNSET: u8 = u8::MAX;

// A hint only: every level gives the same results, so no order with other memory is needed.
static LEVEL: AtomicU8 = AtomicU8::new(UNSET);

/// The level in use: the one set last, or else the best that this processor has.
#[must_use]
pub fn level() -> Level {
    match Level::from_code(LEVEL.load(Ordering::Relaxed)) {
        Some(level) => level,
        None => {
            let best = available();
            // A level that another thread sets meanwhile must not be undone.
            match LEVEL.compare_exchange(UNSET, best.code(), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => best,
                Err(set) => Level::from_code(set).unwrap_or(best),
            }
        }
    }
}

/// Uses this level from now on, in the whole process. Safe at any time: results do not depend on it.
pub fn set_level(level: Level) -> Result<()> {
    if !level.is_available() {
        return Err(Error::usage(format!(
            "this processor has no {level} instructions; the SIMD level may be at most {}",
            available()
        )));
    }
    LEVEL.store(level.code(), Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_are_one_to_one() {
        for &level in Level::ALL {
            assert_eq!(Level::from_name(level.name()), Some(level));
            assert_eq!(Level::from_code(level.code()), Some(level));
        }
        assert_eq!(Level::from_code(3), None);
        assert_eq!(Level::from_code(UNSET), None);
        assert_eq!(Level::from_name("sse9"), None);
    }

    #[test]
    fn only_what_the_processor_has_can_be_set() {
        for &level in Level::ALL {
            match set_level(level) {
                Ok(()) => assert!(level.is_available()),
                Err(error) => {
                    assert!(!level.is_available());
                    assert!(error.to_string().contains(level.name()));
                }
            }
        }
        set_level(available()).unwrap();
        assert_eq!(level(), available());
    }
}
