//! Messages to the user, on standard error: one line each, with the rank in front, at most a few per place in
//! the program and ten seconds. Nothing here ever waits, and a closed standard error is no error.
#![forbid(unsafe_code)]

use crate::config::{Config, LogLevel};
use std::fmt;
use std::io::Write;
use std::panic::Location;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Messages that one place may write within [`PERIOD_MS`].
const BURST: u32 = 10;
/// The period over which messages are counted, in milliseconds.
const PERIOD_MS: u64 = 10_000;
/// Places that are counted apart. Two places that share a slot share its allowance.
const SITES: usize = 512;
/// Bytes of one message; longer ones are cut.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The rank before it is known.
const NO_RANK: u32 = u32::MAX;

static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Warning as u8);
static TIMESTAMPS: AtomicBool = AtomicBool::new(false);
static RANK: AtomicU32 = AtomicU32::new(NO_RANK);
static ORIGIN: OnceLock<Instant> = OnceLock::new();
static ALLOWANCES: [Allowance; SITES] = [const { Allowance::new() }; SITES];

/// What one place has written in the current period.
struct Allowance {
    /// The beginning of the period, in milliseconds since the first message.
    since_ms: AtomicU64,
    /// Messages in the period, those that were left out included.
    count: AtomicU32,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Write it.
    Write,
    /// Write it, and say how many were left out before it.
    WriteAfter(u32),
    /// Leave it out.
    Drop,
}

/// Takes level and timestamps from the configuration, and the rank if it is known there.
pub fn configure(config: &Config) {
    set_level(config.log_level);
    TIMESTAMPS.store(config.log_timestamps, Relaxed);
    if let Some(rank) = config.rank {
        set_rank(rank);
    }
}

/// Messages below this level are dropped from now on.
pub fn set_level(level: LogLevel) {
    LEVEL.store(level as u8, Relaxed);
}

/// The rank that stands in front of each line from now on.
pub fn set_rank(rank: u32) {
    RANK.store(rank, Relaxed);
}

/// Whether messages of this level are written: for messages that are dear to make.
#[must_use]
pub fn enabled(level: LogLevel) -> bool {
    level as u8 >= LEVEL.load(Relaxed) && level != LogLevel::Off
}

/// Each message between ranks.
#[track_caller]
pub fn trace(message: fmt::Arguments<'_>) {
    write(LogLevel::Trace, message);
}

/// What helps to debug Carole itself.
#[track_caller]
pub fn debug(message: fmt::Arguments<'_>) {
    write(LogLevel::Debug, message);
}

/// What a user may want to know once.
#[track_caller]
pub fn info(message: fmt::Arguments<'_>) {
    write(LogLevel::Info, message);
}

/// What is probably wrong.
#[track_caller]
pub fn warn(message: fmt::Arguments<'_>) {
    write(LogLevel::Warning, message);
}

/// What failed.
#[track_caller]
pub fn error(message: fmt::Arguments<'_>) {
    write(LogLevel::Error, message);
}

#[track_caller]
fn write(level: LogLevel, message: fmt::Arguments<'_>) {
    if !enabled(level) {
        return;
    }
    let place = Location::caller();
    let origin = *ORIGIN.get_or_init(Instant::now);
    let now_ms = u64::try_from(origin.elapsed().as_millis()).unwrap_or(u64::MAX);
    let left_out = match ALLOWANCES[slot(place)].ask(now_ms) {
        Verdict::Write => 0,
        Verdict::WriteAfter(left_out) => left_out,
        Verdict::Drop => return,
    };
    let line = compose(level, message, left_out);
    // One write per line, so that lines of several threads and processes do not mix. When nobody reads
    // standard error there is nobody to tell.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Builds the line: time, rank, level, words.
fn compose(level: LogLevel, message: fmt::Arguments<'_>, left_out: u32) -> String {
    use fmt::Write as _;
    let mut line = String::new();
    // Writing to a String cannot fail.
    if TIMESTAMPS.load(Relaxed) {
        let _ = write!(line, "{} ", utc(SystemTime::now()));
    }
    match RANK.load(Relaxed) {
        NO_RANK => line.push_str("[carole] "),
        rank => {
            let _ = write!(line, "[carole {rank}] ");
        }
    }
    let _ = write!(line, "{level}: ");
    let head = line.len();
    let _ = line.write_fmt(message);
    // A message is one line, whatever a peer's words hold.
    let mut words: String =
        line[head..].chars().map(|c| if c.is_control() && c != '\t' { ' ' } else { c }).collect();
    if words.len() > MESSAGE_BYTES_MAX {
        let cut = (0..=MESSAGE_BYTES_MAX).rev().find(|at| words.is_char_boundary(*at)).unwrap_or(0);
        words.truncate(cut);
        words.push_str("...");
    }
    line.truncate(head);
    line.push_str(&words);
    if left_out > 0 {
        let _ = write!(line, " ({left_out} more like this were left out before)");
    }
    line.push('\n');
    line
}

/// `2026-11-21T09:40:12.123456Z`.
#[must_use]
pub fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, micros) = (since.as_secs(), since.subsec_micros());
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Days to a date, in eras of 400 years that begin on the first of March.
    let days = seconds / 86400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

fn slot(place: &Location<'_>) -> usize {
    // FNV-1a over file and line: the same place always has the same slot.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in place.file().bytes().chain(place.line().to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    (hash % SITES as u64) as usize
}

impl Allowance {
    const fn new() -> Allowance {
        Allowance { since_ms: AtomicU64::new(0), count: AtomicU32::new(0) }
    }

    /// Counts a message. Two threads at the edge of a period may write one message too many; no more.
    fn ask(&self, now_ms: u64) -> Verdict {
        let since_ms = self.since_ms.load(Relaxed);
        if now_ms.saturating_sub(since_ms) >= PERIOD_MS
            && self.since_ms.compare_exchange(since_ms, now_ms, Relaxed, Relaxed).is_ok()
        {
            let before = self.count.swap(1, Relaxed);
            let left_out = before.saturating_sub(BURST);
            return if left_out > 0 { Verdict::WriteAfter(left_out) } else { Verdict::Write };
        }
        let counted = self.count.fetch_update(Relaxed, Relaxed, |count| Some(count.saturating_add(1)));
        if counted.is_ok_and(|before| before < BURST) { Verdict::Write } else { Verdict::Drop }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_place_that_floods_is_cut_short_and_the_loss_is_told() {
        let allowance = Allowance::new();
        for _ in 0..BURST {
            assert_eq!(allowance.ask(5), Verdict::Write);
        }
        for _ in 0..7 {
            assert_eq!(allowance.ask(6), Verdict::Drop);
        }
        assert_eq!(allowance.ask(PERIOD_MS + 6), Verdict::WriteAfter(7));
        assert_eq!(allowance.ask(PERIOD_MS + 7), Verdict::Write);
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let line = compose(LogLevel::Error, format_args!("peer said\n\x1b[2J{}", "x".repeat(1 << 20)), 3);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with("(3 more like this were left out before)\n"));
        assert!(!line.contains('\x1b'));
        assert!(line.len() < MESSAGE_BYTES_MAX + 200);
    }

    #[test]
    fn dates_are_right() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(1_795_254_012), "2026-11-21T09:40:12.000000Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59.000000Z");
    }

    #[test]
    fn off_is_silent_and_is_no_level_of_messages() {
        assert!(!enabled(LogLevel::Off));
        assert!(LogLevel::Off > LogLevel::Fatal);
    }
}
