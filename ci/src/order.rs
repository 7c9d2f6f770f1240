//! Many tensors, submitted in another random order on each rank and in each step: no mismatch, no hang.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::job::Plan;
use crate::random::{Random, mix};
use crate::{Count, Verdict};
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 4)]
    ranks: u32,
    #[arg(long, default_value_t = 1000)]
    tensors: u64,
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Of the orders.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long)]
    tensors: u64,
    #[arg(long)]
    steps: u64,
    #[arg(long)]
    seed: u64,
}

pub fn run(settings: &Settings) -> Verdict {
    let begin = Instant::now();
    let numbers = [("--tensors", settings.tensors), ("--steps", settings.steps), ("--seed", settings.seed)];
    let mut args = vec!["order".to_owned()];
    args.extend(numbers.iter().flat_map(|(name, value)| [(*name).to_owned(), value.to_string()]));
    let plan = Plan {
        args,
        size: settings.ranks,
        hosts: 1,
        places: Vec::new(),
        knobs: Vec::new(),
        limit: Duration::from_secs(120 + 10 * settings.steps),
    };
    let expected = format!("done {}", settings.tensors * settings.steps);
    for (rank, lines) in plan.run()?.iter().enumerate() {
        if lines.last() != Some(&expected) {
            return Err(format!("rank {rank}: {lines:?}"));
        }
    }
    println!(
        "order: {} tensors in {} orders on {} ranks, {} steps, {:.1} s, none wrong",
        settings.tensors,
        u64::from(settings.ranks) * settings.steps,
        settings.ranks,
        settings.steps,
        begin.elapsed().as_secs_f64()
    );
    Ok(Count { passed: settings.steps, skipped: 0 })
}

/// One rank: each step submits all tensors, then waits for all, in another order again.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&runtime::Options::default()).map_err(fail)?;
    let world = runtime::world().map_err(fail)?;
    let mut order: Vec<u64> = (0..settings.tensors).collect();
    for step in 0..settings.steps {
        let mut random = Random::new(&[settings.seed, step, u64::from(world.rank)]);
        random.shuffle(&mut order);
        let mut flying = Vec::with_capacity(order.len());
        for &tensor in &order {
            let name = format!("gradient.{tensor}");
            let request = Request {
                name: Some(&name),
                collective: Collective::Allreduce,
                op: ReduceOp::Sum,
                ..Request::default()
            };
            let input = given(tensor, step, world.rank).flat_map(|value| value.to_le_bytes()).collect();
            let shape = vec![elements(tensor)];
            let tensors = vec![Tensor { dtype: DType::I32, shape, input, place: Target::InPlace }];
            flying.push((tensor, Operation::submit(&request, tensors).map_err(fail)?));
        }
        random.shuffle(&mut flying);
        for (tensor, operation) in flying {
            let got = operation.wait().map_err(fail)?;
            let mut expected = vec![0i32; elements(tensor) as usize];
            for rank in 0..world.size {
                for (sum, value) in expected.iter_mut().zip(given(tensor, step, rank)) {
                    *sum = sum.wrapping_add(value);
                }
            }
            let expected: Vec<u8> = expected.iter().flat_map(|value| value.to_le_bytes()).collect();
            if got.outputs[0] != expected {
                return Err(format!("tensor {tensor} is wrong in step {step}"));
            }
        }
    }
    println!("done {}", settings.tensors * settings.steps);
    call::barrier().map_err(fail)?;
    runtime::shutdown().map_err(fail)
}

fn elements(tensor: u64) -> u64 {
    mix(tensor) % 200
}

fn given(tensor: u64, step: u64, rank: u32) -> impl Iterator<Item = i32> {
    (0..elements(tensor)).map(move |i| mix(tensor << 40 ^ step << 20 ^ u64::from(rank) << 52 ^ i) as i32)
}
