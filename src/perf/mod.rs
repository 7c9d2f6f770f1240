//! `carole-perf`: times and checks every collective, and explains the choice of an algorithm.
//!
//! - `carole-perf allreduce -np 2 --min 4 --max 256M` starts its own ranks through the launcher, unless it
//!   already runs inside a job, and prints one row per size: time, bandwidth, wrong elements.
//! - `carole-perf explain allreduce --ranks 8 --hosts 2 --bytes 64M` needs no cluster; with `--scale` it prints the
//!   predicted time up to 4096 ranks on networks of 10, 100 and 400 Gbit/s, and with `--plot FILE.svg` draws it.
//!
//! Times are per call; each iteration counts as long as its slowest rank took. *Algorithm bandwidth* is the
//! size divided by the time. *Bus bandwidth* multiplies it by the share of the size that must cross a rank's
//! link, so that it can be held against the hardware whatever the number of ranks; the factors are those of
//! nccl-tests: allreduce 2(n-1)/n; allgather, reducescatter, alltoall, gather and scatter (n-1)/n; broadcast,
//! reduce and sendrecv 1.

mod calls;
mod explain;
mod measure;
mod pattern;
mod plot;
mod report;
mod scale;
mod start;

use crate::config;
use crate::types::{Collective, DType, ReduceOp};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Times and checks every collective; explains the choice of an algorithm.
#[derive(Parser, Debug)]
#[command(name = "carole-perf", version, about)]
struct Command {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand, Debug)]
enum Task {
    /// Every rank gets the reduction of all inputs.
    Allreduce(Settings),
    /// Every rank gets all inputs.
    Allgather(Settings),
    /// Every rank gets the root's tensor.
    Broadcast(Settings),
    /// Every rank gets its part of the reduction.
    Reducescatter(Settings),
    /// Every rank gives a part to each.
    Alltoall(Settings),
    /// The root gets the reduction.
    Reduce(Settings),
    /// The root gets all inputs.
    Gather(Settings),
    /// Every rank gets its part of the root's tensor.
    Scatter(Settings),
    /// No rank leaves before all have entered.
    Barrier(Settings),
    /// Every rank sends to the next and receives from the previous one.
    Sendrecv(Settings),
    /// Prints the algorithm that would be chosen, the reason, the schedule and its price. Needs no cluster.
    Explain(explain::Question),
}

/// What to measure.
#[derive(Args, Clone, Debug)]
pub(crate) struct Settings {
    /// Processes to start (also -np). Not used inside a job.
    #[arg(long, visible_alias = "np", default_value_t = 2)]
    ranks: u32,
    /// The smallest size in bytes; K, M and G multiply by 1024.
    #[arg(long, default_value = "4", value_parser = parse_bytes)]
    min: u64,
    /// The largest size in bytes.
    #[arg(long, default_value = "64M", value_parser = parse_bytes)]
    max: u64,
    /// Each size is this many times the one before.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(2..))]
    factor: u64,
    /// Element type.
    #[arg(long, default_value = "float32", value_parser = parse_dtype)]
    dtype: DType,
    /// How values are combined.
    #[arg(long, default_value = "sum", value_parser = parse_op)]
    op: ReduceOp,
    /// The root, for collectives that have one.
    #[arg(long, default_value_t = 0)]
    root: u32,
    /// Forces a transport (CAROLE_TRANSPORT).
    #[arg(long)]
    transport: Option<String>,
    /// Forces an algorithm (CAROLE_ALGORITHM).
    #[arg(long)]
    algorithm: Option<String>,
    /// Timed calls for each size; by default fewer for larger sizes.
    #[arg(long)]
    iterations: Option<u32>,
    /// Calls before the timed ones.
    #[arg(long, default_value_t = 5)]
    warmup: u32,
    /// The output takes the place of the input (allreduce, broadcast, reduce).
    #[arg(long)]
    in_place: bool,
    /// Plans each operation once and starts it many times.
    #[arg(long)]
    persistent: bool,
    /// The tensors lie in memory that the ranks of a host share.
    #[arg(long)]
    shared: bool,
    /// Writes the rows to this file as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Runs the tool with these arguments, the program's own name first; returns its exit code: 0 when all went
/// well, 1 when an element was wrong or a call failed, 2 for bad arguments.
#[must_use]
pub fn main(args: Vec<OsString>) -> i32 {
    let args: Vec<OsString> =
        args.into_iter().map(|arg| if arg == "-np" { OsString::from("--ranks") } else { arg }).collect();
    let command = match Command::try_parse_from(&args) {
        Ok(command) => command,
        Err(error) => {
            // A closed standard output is no reason to fail here.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let (kind, settings) = match command.task {
        Task::Explain(question) => return finish(explain::run(&question)),
        Task::Allreduce(s) => (measure::Kind::Collective(Collective::Allreduce), s),
        Task::Allgather(s) => (measure::Kind::Collective(Collective::Allgather), s),
        Task::Broadcast(s) => (measure::Kind::Collective(Collective::Broadcast), s),
        Task::Reducescatter(s) => (measure::Kind::Collective(Collective::Reducescatter), s),
        Task::Alltoall(s) => (measure::Kind::Collective(Collective::Alltoall), s),
        Task::Reduce(s) => (measure::Kind::Collective(Collective::Reduce), s),
        Task::Gather(s) => (measure::Kind::Collective(Collective::Gather), s),
        Task::Scatter(s) => (measure::Kind::Collective(Collective::Scatter), s),
        Task::Barrier(s) => (measure::Kind::Collective(Collective::Barrier), s),
        Task::Sendrecv(s) => (measure::Kind::Sendrecv, s),
    };
    if let Err(words) = kind.accepts(&settings) {
        eprintln!("carole-perf: {words}");
        return 2;
    }
    if start::inside_a_job() {
        return finish(measure::run(kind, &settings));
    }
    start::ranks(&args, settings.ranks)
}

fn finish(result: Result<(), String>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(words) => {
            eprintln!("carole-perf: {words}");
            1
        }
    }
}

fn parse_dtype(text: &str) -> Result<DType, String> {
    DType::from_name(text).ok_or_else(|| one_of("element type", text, DType::ALL.iter().map(|d| d.name())))
}

fn parse_op(text: &str) -> Result<ReduceOp, String> {
    ReduceOp::from_name(text)
        .ok_or_else(|| one_of("reduce operation", text, ReduceOp::ALL.iter().map(|op| op.name())))
}

fn one_of(what: &str, text: &str, names: impl Iterator<Item = &'static str>) -> String {
    format!("'{text}' is no {what}; take one of {}", names.collect::<Vec<_>>().join(", "))
}

/// A size that a tensor can have: "64M" and the like.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let bytes = config::parse_bytes(text)?;
    if bytes > crate::limits::TENSOR_BYTES_MAX {
        return Err(format!("'{text}' is more than a tensor can have ({})", crate::limits::TENSOR_BYTES_MAX));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("4"), Ok(4));
        assert_eq!(parse_bytes("64K"), Ok(64 << 10));
        assert_eq!(parse_bytes("256M"), Ok(256 << 20));
        assert_eq!(parse_bytes("1g"), Ok(1 << 30));
        for wrong in ["", "M", "4X", "-1", "99999999999G", "18446744073709551616"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn wrong_arguments_end_with_2_and_start_nothing() {
        for wrong in [
            vec!["carole-perf"],
            vec!["carole-perf", "allreduce", "--dtype", "float33"],
            vec!["carole-perf", "allreduce", "--dtype", "complex64", "--op", "min"],
            vec!["carole-perf", "allreduce", "--min", "8K", "--max", "4K"],
            vec!["carole-perf", "alltoall", "--in-place"],
            vec!["carole-perf", "allreduce", "--ranks", "0"],
            vec!["carole-perf", "broadcast", "-np", "2", "--root", "2"],
        ] {
            assert_eq!(main(wrong.iter().map(OsString::from).collect()), 2, "{wrong:?}");
        }
    }
}
