//! One tensor of more than 2^31 elements, summed in place by two ranks.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::job::Plan;
use crate::{Count, Verdict};
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Elements of one byte each.
    #[arg(long, default_value_t = (1 << 31) + 5)]
    elements: u64,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long)]
    elements: u64,
}

const RANKS: u32 = 2;

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    // The tensors, as much again for scratch, and room for everyone else.
    let needed = settings.elements * u64::from(RANKS) * 2 + (2 << 30);
    for transport in ["shm", "tcp"] {
        let free = available();
        if free < needed {
            println!(
                "huge: {transport} skipped: {} MiB of memory are available, {} MiB are needed",
                free >> 20,
                needed >> 20
            );
            count.skipped += 1;
            continue;
        }
        let plan = Plan {
            args: vec!["huge".to_owned(), "--elements".to_owned(), settings.elements.to_string()],
            size: RANKS,
            hosts: 1,
            places: Vec::new(),
            knobs: vec![("CAROLE_TRANSPORT", transport.to_owned())],
            limit: Duration::from_secs(900),
        };
        let begin = Instant::now();
        let lines = plan.run()?;
        if lines.iter().any(|lines| lines.last().map(String::as_str) != Some("none wrong")) {
            return Err(format!("{transport}: {lines:?}"));
        }
        println!(
            "huge: {} elements on {RANKS} ranks, {transport}: none wrong, {:.1} s",
            settings.elements,
            begin.elapsed().as_secs_f64()
        );
        count.passed += 1;
    }
    Ok(count)
}

/// Bytes that the kernel could give.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// What a rank gives at a place: no period of a power of two, so that a part that lands 2^31 too low shows.
fn given(rank: u32, at: u64) -> u8 {
    ((at % 251) as u8).wrapping_mul(3).wrapping_add(rank as u8)
}

pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&runtime::Options::default()).map_err(fail)?;
    let world = runtime::world().map_err(fail)?;
    let input: Vec<u8> = (0..settings.elements).map(|at| given(world.rank, at)).collect();
    let request = Request {
        name: Some("huge"),
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        ..Request::default()
    };
    let tensor = Tensor { dtype: DType::U8, shape: vec![settings.elements], input, place: Target::InPlace };
    let inputs = Operation::submit(&request, vec![tensor]).map_err(fail)?.wait_in_place().map_err(fail)?;
    let expected = |at: u64| (0..world.size).fold(0u8, |sum, rank| sum.wrapping_add(given(rank, at)));
    let wrong = inputs[0].iter().zip(0..).filter(|&(&got, at)| got != expected(at)).count();
    match wrong {
        0 => println!("none wrong"),
        _ => println!("{wrong} wrong"),
    }
    call::barrier().map_err(fail)?;
    runtime::shutdown().map_err(fail)
}
