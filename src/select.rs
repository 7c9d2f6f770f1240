//! The choice of an algorithm: the cheapest that fits, with the reason. A pure function of what all members have
//! agreed on, so all choose alike.
#![forbid(unsafe_code)]

use crate::algorithm::{Algorithm, Query, TABLE, supports};
use crate::cost::{Prices, SIMULATED_SIZE_MAX, predict_ns};
use crate::limits::WINDOWS_MAX;
use std::fmt;
use std::fmt::Write;

/// The default for `window_bytes`: a ring of four then passes 1 MiB at a time, which stays in a core's cache.
pub const WINDOW_BYTES: u64 = 4 << 20;
/// A window is never cut below this: its messages would cost more than they overlap.
const WINDOW_BYTES_MIN: u64 = 256 << 10;

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The row of the table.
    pub algorithm: &'static Algorithm,
    /// Chunks in each window.
    pub chunks: u32,
    /// Windows.
    pub windows: u32,
    /// Why.
    pub reason: Reason,
}

/// Why an algorithm was chosen. Costs nothing until it is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reason {
    name: &'static str,
    ns: u64,
    fitting: u32,
    next: Option<(&'static str, u64)>,
    forced: Forced,
}

impl Reason {
    /// The price of what was chosen.
    #[must_use]
    pub fn ns(&self) -> u64 {
        self.ns
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Forced {
    No,
    Yes,
    Unknown,
    Elsewhere(&'static str),
    Unfit(&'static str, &'static str),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.forced {
            Forced::No => {}
            Forced::Yes => return write!(f, "{} was asked for: {}", self.name, Nanoseconds(self.ns)),
            Forced::Unknown => write!(f, "there is no algorithm of the name that was asked for; ")?,
            Forced::Elsewhere(name) => write!(f, "{name} was asked for but does not serve this; ")?,
            Forced::Unfit(name, why) => write!(f, "{name} was asked for but does not fit ({why}); ")?,
        }
        write!(f, "{} is ", self.name)?;
        match self.next {
            None => write!(f, "the only one that fits: {}", Nanoseconds(self.ns)),
            Some((next, ns)) => write!(
                f,
                "the cheapest of {} that fit: {}; next {next}: {}",
                self.fitting,
                Nanoseconds(self.ns),
                Nanoseconds(ns)
            ),
        }
    }
}

/// A time that people can read.
pub struct Nanoseconds(pub u64);

impl fmt::Display for Nanoseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ns @ 0..10_000 => write!(f, "{ns} ns"),
            ns @ 10_000..10_000_000 => write!(f, "{} us", ns / 1000),
            ns => write!(f, "{} ms", ns / 1_000_000),
        }
    }
}

/// Chooses for this query. `forced` is the knob `CAROLE_ALGORITHM`; where the algorithm it names does not
/// serve the query, the choice is made as if it were not set, and the reason says so. A window is at most
/// `window_bytes` large, as long as there are no more than [`WINDOWS_MAX`] of them.
///
/// # Panics
/// For operations that [`supports`] refuses: these are refused when they are submitted.
#[must_use]
pub fn select(query: &Query, prices: &Prices, forced: Option<&str>, window_bytes: u64) -> Choice {
    if let Err(reason) = supports(query.collective, query.op) {
        panic!("{} of {} has no algorithm: {reason}", query.op, query.collective);
    }
    let wanted = forced.map(|name| force(query, name));
    if let Some(Ok(row)) = wanted {
        return best([row].into_iter(), query, prices, window_bytes, Forced::Yes);
    }
    let forced = wanted.and_then(Result::err).unwrap_or(Forced::No);
    let fitting = rows(query).filter(|row| (row.fits)(query).is_ok());
    best(fitting, query, prices, window_bytes, forced)
}

/// How long the algorithm of this name would take, in as many windows as are best for it; `None` where it does not
/// fit.
#[must_use]
pub fn price_ns(query: &Query, prices: &Prices, name: &str) -> Option<u64> {
    let row = force(query, name).ok()?;
    Some(best_windows(row, query, prices, WINDOW_BYTES).1)
}

/// Every candidate with its price, or why it does not fit; then the choice.
#[must_use]
pub fn explain(query: &Query, prices: &Prices, forced: Option<&str>) -> String {
    let hosts = query.members_by_host().len();
    let mut text = String::new();
    let mut line = |line: fmt::Arguments<'_>| writeln!(text, "{line}").expect("strings take all");
    line(format_args!(
        "{} of {} bytes ({} of {}), {} members on {hosts} hosts{}{}",
        query.collective,
        query.bytes,
        query.op,
        query.dtype,
        query.size(),
        if query.strict { ", deterministic" } else { "" },
        if query.size() > SIMULATED_SIZE_MAX { ", priced by formula" } else { ", priced by simulation" },
    ));
    if let Err(reason) = supports(query.collective, query.op) {
        line(format_args!("no algorithm: {reason}"));
        return text;
    }
    for row in rows(query) {
        match (row.fits)(query) {
            Ok(()) => {
                let (windows, ns) = best_windows(row, query, prices, WINDOW_BYTES);
                let chunks = (row.chunks)(query);
                let price = Nanoseconds(ns);
                let name = row.name;
                line(format_args!("  {name:<14} {price:>8}  {windows} windows of {chunks} chunks"));
            }
            Err(reason) => line(format_args!("  {:<14} does not fit: {reason}", row.name)),
        }
    }
    let choice = select(query, prices, forced, WINDOW_BYTES);
    line(format_args!("chosen: {}", choice.reason));
    text
}

fn rows(query: &Query) -> impl Iterator<Item = &'static Algorithm> {
    let collective = query.collective;
    TABLE.iter().filter(move |row| row.collective == collective)
}

/// The row that the knob asks for, or why it cannot be.
fn force(query: &Query, name: &str) -> Result<&'static Algorithm, Forced> {
    let known = TABLE.iter().find(|row| row.name == name).ok_or(Forced::Unknown)?.name;
    let row = rows(query).find(|row| row.name == name).ok_or(Forced::Elsewhere(known))?;
    (row.fits)(query).map(|()| row).map_err(|why| Forced::Unfit(known, why))
}

/// The cheapest of these rows; the first among equals.
fn best(
    rows: impl Iterator<Item = &'static Algorithm>,
    query: &Query,
    prices: &Prices,
    window_bytes: u64,
    forced: Forced,
) -> Choice {
    let mut priced: Vec<(u64, u32, &'static Algorithm)> = rows
        .map(|row| {
            let (windows, ns) = best_windows(row, query, prices, window_bytes);
            (ns, windows, row)
        })
        .collect();
    priced.sort_by_key(|(ns, ..)| *ns);
    let &(ns, windows, algorithm) =
        priced.first().expect("every collective has an algorithm that always fits");
    let next = priced.get(1).map(|(ns, _, row)| (row.name, *ns));
    let reason = Reason { name: algorithm.name, ns, fitting: priced.len() as u32, next, forced };
    Choice { algorithm, chunks: (algorithm.chunks)(query), windows, reason }
}

/// Over TCP as few windows as cost at most this much more than the best number: each window is a chance to find the
/// peer asleep or the socket empty, which the price does not see.
const FEWER_WINDOWS: f64 = 1.03;

/// The number of windows with the lowest price, and that price.
fn best_windows(row: &Algorithm, query: &Query, prices: &Prices, window_bytes: u64) -> (u32, u64) {
    let price = |windows| (windows, predict_ns(query, row, windows, prices));
    if !row.windows || query.size() == 1 {
        return price(1);
    }
    let least = query.bytes.div_ceil(window_bytes.max(1)).clamp(1, u64::from(WINDOWS_MAX)) as u32;
    let most = (query.bytes / WINDOW_BYTES_MIN).clamp(u64::from(least), u64::from(WINDOWS_MAX)) as u32;
    let counts = std::iter::successors(Some(least), |w| Some(w * 2)).take_while(|w| *w <= most);
    let priced: Vec<(u32, u64)> = counts.map(price).collect();
    let best = *priced.iter().min_by_key(|(_, ns)| *ns).expect("at least the least");
    let over_tcp =
        prices.same_host.copy_ns_per_byte > 0.0 || query.hosts.iter().any(|h| *h != query.hosts[0]);
    if !over_tcp {
        return best;
    }
    let limit = (best.1 as f64 * FEWER_WINDOWS) as u64;
    priced.into_iter().find(|(_, ns)| *ns <= limit).expect("the best is within the limit")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Collective, DType, ReduceOp};
    use std::time::Instant;

    fn query(collective: Collective, hosts: Vec<u32>, bytes: u64) -> Query {
        Query {
            collective,
            op: ReduceOp::Sum,
            dtype: DType::F32,
            bytes,
            hosts: hosts.into(),
            root: 0,
            prescaled: false,
            strict: false,
        }
    }
    fn choose(query: &Query, forced: Option<&str>) -> Choice {
        select(query, &Prices::default(), forced, WINDOW_BYTES)
    }

    #[test]
    fn something_is_always_found() {
        for &collective in Collective::ALL {
            for &op in ReduceOp::ALL {
                if supports(collective, op).is_err() {
                    continue;
                }
                for &dtype in DType::ALL.iter().filter(|d| op.accepts(**d).is_ok()) {
                    for size in [1, 2, 3, 5, 8, 9, 33] {
                        for (bytes, strict) in [(0, false), (16, true), (1 << 30, false), (1 << 46, true)] {
                            for host in [|_| 0, |m| m, |m| m / 2, |m: u32| m % 3] {
                                let hosts = (0..size).map(host).collect();
                                let q = Query { op, dtype, strict, ..query(collective, hosts, bytes) };
                                let choice = choose(&q, None);
                                assert_eq!((choice.algorithm.fits)(&q), Ok(()));
                                assert!((1..=WINDOWS_MAX).contains(&choice.windows));
                                assert!(choice.windows == 1 || !q.is_blocked());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        assert!(supports(Collective::Join, ReduceOp::Sum).is_err());
        assert!(supports(Collective::Reducescatter, ReduceOp::Adasum).is_err());
        let q = Query { op: ReduceOp::Adasum, ..query(Collective::Reducescatter, vec![0, 0], 64) };
        assert!(explain(&q, &Prices::default(), None).contains("no algorithm"));
    }

    #[test]
    fn the_forced_algorithm_is_taken_where_it_fits() {
        let q = query(Collective::Allreduce, vec![0, 0, 1, 1], 1 << 20);
        for name in ["ring", "tree", "doubling", "direct", "hierarchical"] {
            let choice = choose(&q, Some(name));
            assert_eq!(choice.algorithm.name, name);
            assert!(choice.reason.to_string().starts_with(&format!("{name} was asked for")));
        }
    }

    #[test]
    fn a_forced_algorithm_that_does_not_fit_falls_back_and_says_so() {
        let told = |q: &Query, name| choose(q, Some(name)).reason.to_string();
        let one_host = query(Collective::Allreduce, vec![0; 4], 1 << 20);
        assert!(told(&one_host, "hierarchical").contains("does not fit (all members are on one host)"));
        let strict = Query { strict: true, ..one_host.clone() };
        assert!(told(&strict, "ring").contains("canonical"));
        let half = Query { dtype: DType::BF16, ..strict };
        assert_eq!(choose(&half, Some("doubling")).algorithm.name, "direct");
        let alltoall = query(Collective::Alltoall, vec![0; 4], 1 << 20);
        assert!(told(&alltoall, "ring").contains("ring was asked for but does not serve this; exchange is"));
        assert!(told(&one_host, "carrousel").contains("no algorithm of the name"));
    }

    #[test]
    fn the_choice_follows_sizes_as_it_should() {
        let name =
            |hosts: Vec<u32>, bytes| choose(&query(Collective::Allreduce, hosts, bytes), None).algorithm.name;
        assert_eq!(name(vec![0; 4], 64), "direct", "tiny: one step");
        let two_by_four = |_| (0..8).map(|m| m / 4).collect::<Vec<u32>>();
        assert_eq!(name(two_by_four(()), 64 << 20), "hierarchical", "the network is the bottleneck");
        let big = choose(&query(Collective::Allreduce, vec![0; 4], 256 << 20), None);
        assert!(big.windows > 1, "a big buffer is cut");
        assert_ne!(name((0..4096).collect(), 1 << 30), "direct", "4095 messages at once");
    }

    #[test]
    fn thousands_of_members_are_priced_without_building_their_schedules() {
        let begin = Instant::now();
        for &collective in Collective::ALL.iter().filter(|c| supports(**c, ReduceOp::Sum).is_ok()) {
            for bytes in [64, 1 << 20, 1 << 30] {
                let choice = choose(&query(collective, (0..4096).map(|m| m / 8).collect(), bytes), None);
                assert!(choice.reason.ns > 0);
            }
        }
        // No timing gate: building 4096 schedules even once would take far longer than anyone waits for a test.
        eprintln!("27 choices for 4096 members: {:?}", begin.elapsed());
    }

    #[test]
    fn explain_names_every_row() {
        let q = query(Collective::Allreduce, (0..8).map(|m| m / 4).collect(), 64 << 20);
        let text = explain(&q, &Prices::default(), Some("adasum"));
        for row in rows(&q) {
            assert!(text.contains(row.name), "{text}");
        }
        assert!(text.contains("Adasum alone") && text.contains("chosen:"), "{text}");
        eprintln!("{text}");
    }
}
