//! Every collective × operation × type × algorithm × transport × number of ranks, on real processes: wrong
//! elements are counted against the oracle, and results that must be equal on all ranks are compared by their
//! hashes through the ranks' standard output, not through Carole.
//!
//! A job is (ranks, transport, algorithm). By default it runs each (collective, operation, type) once, with a
//! size and a place that rotate from job to job, so that the jobs together cover all of them; with `--full`
//! it runs every size and place.
#![forbid(unsafe_code)]

mod case;
mod check;

use crate::job::{Plan, over};
use crate::{Count, Verdict};
use case::Case;
pub use case::cases;
use clap::Args;
use std::collections::BTreeMap;
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Every size and place in every job.
    #[arg(long)]
    full: bool,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3, 4, 5, 6, 7, 8])]
    ranks: Vec<u32>,
    /// Transports; tls is TCP with encryption.
    #[arg(long, value_delimiter = ',', default_values_t = ["shm".to_owned(), "tcp".to_owned()])]
    transports: Vec<String>,
    /// Algorithms.
    #[arg(long, value_delimiter = ',', default_values_t = ALGORITHMS.map(str::to_owned))]
    algorithms: Vec<String>,
    /// Of the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop at the first failing job.
    #[arg(long)]
    stop: bool,
}

/// What the knob takes; `auto` lets the runtime choose.
pub const ALGORITHMS: [&str; 6] = ["auto", "ring", "tree", "doubling", "direct", "hierarchical"];

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long)]
    full: bool,
    #[arg(long)]
    seed: u64,
    /// Which job this is: it decides sizes and places where not all are run.
    #[arg(long)]
    turn: u64,
}

/// Hosts that a job pretends to have. A hierarchy needs two; uneven ones occur with odd numbers of ranks.
pub fn hosts(algorithm: &str, transport: &str, ranks: u32) -> u32 {
    if algorithm == "hierarchical" && transport != "shm" && ranks > 2 { 2 } else { 1 }
}

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    let mut failures = Vec::new();
    let mut jobs = 0u64;
    for &ranks in &settings.ranks {
        for transport in &settings.transports {
            for algorithm in &settings.algorithms {
                jobs += 1;
                let job = run_job(settings, ranks, transport, algorithm, jobs);
                match job {
                    Ok(passed) => count.passed += passed,
                    Err(words) => {
                        eprintln!("{ranks} ranks, {transport}, {algorithm}: {words}");
                        failures.push(format!(
                            "--ranks {ranks} --transports {transport} --algorithms {algorithm}"
                        ));
                        if settings.stop {
                            break;
                        }
                    }
                }
            }
        }
    }
    println!("matrix: {jobs} jobs, {} results on all ranks, {} failing jobs", count.passed, failures.len());
    match failures.first() {
        None => Ok(count),
        Some(first) => Err(format!(
            "{} of {jobs} jobs; again: cargo run --release -p ci -- matrix{} --seed {} {first}",
            failures.len(),
            if settings.full { " --full" } else { "" },
            settings.seed
        )),
    }
}

fn run_job(
    settings: &Settings,
    ranks: u32,
    transport: &str,
    algorithm: &str,
    turn: u64,
) -> Result<u64, String> {
    let mut args = vec!["matrix".to_owned(), "--seed".to_owned(), settings.seed.to_string()];
    args.extend(["--turn".to_owned(), turn.to_string()]);
    args.extend(settings.full.then(|| "--full".to_owned()));
    let mut knobs = over(transport);
    knobs.push(("CAROLE_ALGORITHM", algorithm.to_owned()));
    let plan = Plan {
        args,
        size: ranks,
        hosts: hosts(algorithm, transport, ranks),
        knobs,
        places: Vec::new(),
        limit: Duration::from_secs(if settings.full { 1800 } else { 600 }),
    };
    let lines = plan.run()?;
    let known = cases(ranks, settings.seed, turn, settings.full);
    judge(&known, &lines)
}

/// Compares what the ranks printed: each case on each rank, no wrong element, equal hashes where results are equal.
pub fn judge(cases: &[Case], lines: &[Vec<String>]) -> Result<u64, String> {
    let mut hashes: BTreeMap<usize, Vec<(usize, String)>> = BTreeMap::new();
    for (rank, lines) in lines.iter().enumerate() {
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let &["case", index, wrong, hash] = words.as_slice() else {
                return Err(format!("rank {rank}: {line}"));
            };
            let index: usize = index.parse().map_err(|_| format!("rank {rank}: {line}"))?;
            if wrong != "0" {
                return Err(format!("rank {rank}: {wrong} wrong elements in {:?}", cases.get(index)));
            }
            hashes.entry(index).or_default().push((rank, hash.to_owned()));
        }
    }
    for (index, case) in cases.iter().enumerate() {
        let found = hashes.remove(&index).unwrap_or_default();
        if found.len() != lines.len() {
            return Err(format!("{} of {} ranks reported {case:?}", found.len(), lines.len()));
        }
        let mut equal = found.iter().map(|(_, hash)| hash).filter(|hash| *hash != "-");
        if let Some(first) = equal.next()
            && equal.any(|hash| hash != first)
        {
            return Err(format!("ranks hold different bits after {case:?}: {found:?}"));
        }
    }
    Ok(cases.len() as u64)
}

/// One rank: runs all cases in order, one line each.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    carole::runtime::init(&carole::runtime::Options::default()).map_err(fail)?;
    let world = carole::runtime::world().map_err(fail)?;
    let sets = check::Sets::make(world.size).map_err(fail)?;
    let list = cases(world.size, settings.seed, settings.turn, settings.full);
    for (index, case) in list.iter().enumerate() {
        let found =
            check::run(case, index, world.rank, &sets).map_err(|error| format!("{error} in {case:?}"))?;
        let hash = found.hash.map_or_else(|| "-".to_owned(), |hash| format!("{hash:016x}"));
        println!("case {index} {} {hash}", found.wrong);
    }
    // A rank that leaves early ends what the others still run with it.
    crate::call::barrier().map_err(fail)?;
    carole::runtime::shutdown().map_err(fail)
}
