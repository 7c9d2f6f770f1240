//! `carole-perf explain`: which algorithm would be chosen, why, its steps and its price.
#![forbid(unsafe_code)]

use super::{parse_bytes, parse_dtype, parse_op, scale};
use crate::algorithm::{Query, supports};
use crate::cost::{Prices, SIMULATED_SIZE_MAX, Wire};
use crate::select::{WINDOW_BYTES, explain, select};
use crate::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::fmt::Write as _;
use std::path::PathBuf;

/// What to explain.
#[derive(Args, Debug)]
pub(super) struct Question {
    /// The collective.
    #[arg(value_parser = parse_collective)]
    collective: Collective,
    /// Ranks.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4096))]
    ranks: u32,
    /// Hosts, each with a run of ranks.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    hosts: u32,
    /// Bytes of the tensor (where each rank has a block: of all blocks); K, M and G multiply by 1024.
    #[arg(long, default_value = "64M", value_parser = parse_bytes)]
    bytes: u64,
    /// Element type.
    #[arg(long, default_value = "float32", value_parser = parse_dtype)]
    dtype: DType,
    /// How values are combined.
    #[arg(long, default_value = "sum", value_parser = parse_op)]
    op: ReduceOp,
    /// The root, for collectives that have one.
    #[arg(long, default_value_t = 0)]
    root: u32,
    /// As if CAROLE_ALGORITHM were set to this.
    #[arg(long)]
    algorithm: Option<String>,
    /// As if CAROLE_DETERMINISTIC were set.
    #[arg(long)]
    deterministic: bool,
    /// As if CAROLE_NETWORK_GBITS were set to this.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    gbits: u32,
    /// As if CAROLE_NETWORK_LATENCY_US were set to this.
    #[arg(long, default_value_t = 25)]
    latency_us: u32,
    /// Prints predicted times from 2 to 4096 ranks on networks of 10, 100 and 400 Gbit/s instead.
    #[arg(long)]
    scale: bool,
    /// Ranks on each host, for --scale.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    per_host: u32,
    /// With --scale: draws the table to this file, as SVG.
    #[arg(long, requires = "scale")]
    plot: Option<PathBuf>,
    /// The rank whose steps are printed.
    #[arg(long, default_value_t = 0)]
    rank: u32,
}

pub(super) fn run(question: &Question) -> Result<(), String> {
    print!("{}", answer(question)?);
    Ok(())
}

fn answer(question: &Question) -> Result<String, String> {
    let ranks = question.ranks;
    for (what, rank) in [("root", question.root), ("rank", question.rank)] {
        if rank >= ranks {
            return Err(format!("--{what} {rank} is not among {ranks} ranks"));
        }
    }
    if question.hosts > ranks {
        return Err(format!("{} hosts are more than {ranks} ranks", question.hosts));
    }
    if question.collective.reduces() {
        question.op.accepts(question.dtype)?;
    }
    supports(question.collective, question.op)
        .map_err(|why| format!("{} has no schedule: {why}", question.collective))?;
    let query = Query {
        collective: question.collective,
        op: if question.collective.reduces() { question.op } else { ReduceOp::Sum },
        dtype: question.dtype,
        bytes: question.bytes,
        hosts: (0..ranks).map(|rank| host_of(rank, question)).collect(),
        root: if question.collective.has_root() { question.root } else { 0 },
        prescaled: false,
        strict: question.deterministic,
    };
    if question.scale {
        return scale::table(&query, question.per_host, question.plot.as_deref());
    }
    let between_hosts = Wire::network(f64::from(question.gbits), f64::from(question.latency_us));
    let prices = Prices { between_hosts, ..Prices::default() };
    let forced = question.algorithm.as_deref();
    let mut text = explain(&query, &prices, forced);
    let choice = select(&query, &prices, forced, WINDOW_BYTES);
    let _ = writeln!(
        text,
        "prices (CAROLE_NETWORK_GBITS and CAROLE_NETWORK_LATENCY_US set them): within a host {:.1} us + {:.2} ns/byte, between hosts \
         {:.1} us + {:.2} ns/byte, reduction {:.2} ns/byte; priced by {}",
        prices.same_host.latency_ns / 1e3,
        prices.same_host.ns_per_byte,
        prices.between_hosts.latency_ns / 1e3,
        prices.between_hosts.ns_per_byte,
        prices.reduce_ns_per_byte,
        if ranks <= SIMULATED_SIZE_MAX { "simulation of all steps" } else { "formula" },
    );
    let _ = writeln!(
        text,
        "schedule of rank {}, run once for each of {} windows of {} chunks:",
        question.rank, choice.windows, choice.chunks
    );
    let _ = write!(text, "{}", choice.algorithm.schedule(question.rank, &query));
    Ok(text)
}

fn host_of(rank: u32, question: &Question) -> u32 {
    (u64::from(rank) * u64::from(question.hosts) / u64::from(question.ranks)) as u32
}

fn parse_collective(text: &str) -> Result<Collective, String> {
    let known = Collective::ALL.iter().filter(|c| supports(**c, ReduceOp::Sum).is_ok());
    known
        .clone()
        .find(|c| c.name() == text)
        .copied()
        .ok_or_else(|| super::one_of("collective that can be explained", text, known.map(|c| c.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(collective: Collective) -> Question {
        Question {
            collective,
            ranks: 8,
            hosts: 2,
            bytes: 64 << 20,
            dtype: DType::F32,
            op: ReduceOp::Sum,
            root: 0,
            algorithm: None,
            deterministic: false,
            gbits: 10,
            latency_us: 25,
            scale: false,
            per_host: 8,
            plot: None,
            rank: 0,
        }
    }

    #[test]
    fn every_collective_is_explained_with_choice_reason_and_steps() {
        for &collective in Collective::ALL.iter().filter(|c| supports(**c, ReduceOp::Sum).is_ok()) {
            let text = answer(&question(collective)).expect("valid");
            assert!(text.contains("chosen: ") && text.contains("schedule of rank 0"), "{text}");
            assert!(text.contains("send") || text.contains("recv"), "{text}");
        }
    }

    #[test]
    fn a_forced_algorithm_is_the_one_that_is_explained() {
        for name in ["ring", "direct"] {
            let forced = Question { algorithm: Some(name.to_owned()), ..question(Collective::Allreduce) };
            assert!(answer(&forced).expect("valid").contains(&format!("chosen: {name} was asked for")));
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        let wrong = [
            Question { root: 8, ..question(Collective::Broadcast) },
            Question { hosts: 9, ..question(Collective::Allreduce) },
            Question { op: ReduceOp::Adasum, ..question(Collective::Reducescatter) },
            Question { op: ReduceOp::Min, dtype: DType::C64, ..question(Collective::Allreduce) },
        ];
        for wrong in wrong {
            assert!(answer(&wrong).is_err(), "{wrong:?}");
        }
    }
}
