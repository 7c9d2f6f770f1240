//! A training that ends with a number: least squares on data of which every rank has a part.
#![forbid(unsafe_code)]

use crate::random::Random;
use carole::runtime::{self, Options, typed};
use carole::types::ReduceOp;
use clap::Args;

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long, default_value_t = 60)]
    pub steps: u32,
}

const WEIGHTS: usize = 1000;
const ROWS: usize = 32;

/// Trains, and prints a word when the first step is done, then the bits of the weights' sum and whether the loss fell.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&Options::default()).map_err(fail)?;
    let world = runtime::world().map_err(fail)?;
    let (rank, size) = (world.rank, world.size);
    let mut random = Random::new(&[u64::from(rank), 7]);
    let mut unit = || (random.next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let rows: Vec<Vec<f32>> = (0..ROWS).map(|_| (0..WEIGHTS).map(|_| unit()).collect()).collect();
    // What is to be learned: all weights are one.
    let targets: Vec<f32> = rows.iter().map(|row| row.iter().sum()).collect();
    let mut weights = vec![0f32; WEIGHTS];
    let (mut first, mut last) = (0f32, 0f32);
    for step in 0..settings.steps {
        let mut gradient = vec![0f32; WEIGHTS];
        let mut loss = [0f32];
        for (row, target) in rows.iter().zip(&targets) {
            let error: f32 = row.iter().zip(&weights).map(|(x, w)| x * w).sum::<f32>() - target;
            loss[0] += error * error / ROWS as f32;
            gradient.iter_mut().zip(row).for_each(|(g, x)| *g += error * x);
        }
        typed::allreduce("gradient", &mut gradient, ReduceOp::Average).map_err(fail)?;
        typed::allreduce("loss", &mut loss, ReduceOp::Average).map_err(fail)?;
        weights.iter_mut().zip(&gradient).for_each(|(w, g)| *w -= 0.005 * g);
        if step == 0 {
            println!("all have joined");
        }
        (first, last) = (if step == 0 { loss[0] } else { first }, loss[0]);
    }
    if last.is_nan() || last > first / 2.0 {
        return Err(format!("the loss went from {first} to {last}"));
    }
    let bits = weights.iter().fold(0u64, |sum, w| sum.rotate_left(5) ^ u64::from(w.to_bits()));
    println!("trained {size} {bits:016x}");
    runtime::shutdown().map_err(fail)
}
