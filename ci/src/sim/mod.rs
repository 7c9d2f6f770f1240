//! The simulator: N whole engines in one thread, virtual time, a seed, faults, checkers after every step.
//! A seed is a bug report: the same seed and number of ranks replay the same cluster.

mod buffer;
mod check;
mod cluster;
mod judge;
mod node;
mod program;
mod reform;
mod sabotage;
mod submit;
#[cfg(test)]
mod tests;

use clap::Args;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// What to simulate.
#[derive(Args, Debug, Clone)]
pub struct SimArgs {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// Ranks; 0 takes 1 to 9, sometimes up to 33, from the seed.
    #[arg(long, default_value_t = 0)]
    pub ranks: u32,
    /// Prints what happens.
    #[arg(long)]
    pub verbose: bool,
}

/// What a number of seeds came to.
#[derive(Default, Debug)]
pub struct Tally {
    /// Clusters simulated.
    pub clusters: u64,
    /// Operations that ended, over all ranks.
    pub operations: u64,
    /// Clusters with a fault.
    pub faults: u64,
    /// Operations that some live ranks had finished when the epoch broke, and others not.
    pub split: u64,
    /// Of those, how many where completion is uniform: none, unless a rank that is blamed lives.
    pub uniform_split: u64,
    /// Clusters in which completion is uniform and a fault happened.
    pub uniform: u64,
    /// Clusters in which an epoch followed a fault, with the survivors or with all.
    pub reformed: u64,
    /// Seeds that found something.
    pub failed: u64,
}

/// Takes one seed after another, until there are none or ten have failed.
fn work(args: &SimArgs, next: &AtomicU64, total: &Mutex<Tally>) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= args.seed + args.seeds {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| examine(args, seed)));
        let mut tally = total.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match outcome {
            Ok(Ok(report)) => {
                tally.clusters += 1;
                tally.operations += report.operations;
                tally.faults += u64::from(report.faulty);
                tally.split += report.split;
                tally.uniform_split += report.uniform_split;
                if report.uniform_split > 0 {
                    println!(
                        "sim: seed {seed}: {} operations are not settled alike on a rank that is blamed and lives",
                        report.uniform_split
                    );
                }
                tally.uniform += u64::from(report.uniform && report.faulty);
                tally.reformed += u64::from(report.reformed);
                continue;
            }
            Ok(Err(found)) => found,
            Err(panic) => panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_else(|| "a panic".into()),
        };
        tally.failed += 1;
        eprintln!(
            "seed {seed}: {found}\n  replay: cargo run --release -p ci -- sim --seed {seed} --ranks {} --verbose",
            args.ranks
        );
        if tally.failed == 10 {
            next.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }
}

/// Simulates one seed, some of them twice: the same seed must give the same course of events.
fn examine(args: &SimArgs, seed: u64) -> Result<cluster::Report, String> {
    let order = cluster::Order { seed, ranks: args.ranks, verbose: args.verbose, sabotage: None };
    let report = cluster::simulate(order)?;
    if seed.is_multiple_of(32) && cluster::simulate(cluster::Order { verbose: false, ..order })? != report {
        return Err("the same seed gave two courses of events".into());
    }
    Ok(report)
}

/// Simulates, several seeds at a time; the result is the exit code.
pub fn run(args: &SimArgs) -> i32 {
    let start = Instant::now();
    let next = AtomicU64::new(args.seed);
    let total = Mutex::new(Tally::default());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(args.seeds);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work(args, &next, &total));
        }
    });
    let tally = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = tally.failed;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "sim: {} clusters ({} with faults) from seed {}: {} operations ended, {:.0} clusters a minute; {} failed",
        tally.clusters,
        tally.faults,
        args.seed,
        tally.operations,
        tally.clusters as f64 / seconds * 60.0,
        failed
    );
    println!(
        "sim: operations finished on some live ranks only when an epoch broke: {}; of those {} in the {} clusters with \
         a fault and uniform completion",
        tally.split, tally.uniform_split, tally.uniform
    );
    println!("sim: epochs that followed a fault: {}", tally.reformed);
    i32::from(failed > 0)
}
