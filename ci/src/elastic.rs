//! A training whose result does not depend on who takes part: workers come and go, and after so many steps the weights
//! are, to the bit, what one process alone would have computed.
#![forbid(unsafe_code)]

use crate::random::{Random, hash};
use carole::error::{Cause, Error};
use carole::runtime::{self, Options, typed};
use carole::types::{Rank, ReduceOp};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// What one worker runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    /// All end at the same step when there is this file.
    #[arg(long)]
    end: PathBuf,
}

/// Parts of the data, whoever works on them.
const SHARDS: u64 = 12;
const WEIGHTS: usize = 500;
/// What computing takes in a step.
const STEP: Duration = Duration::from_millis(5);
/// Steps in an epoch before it is told that it goes well.
const ENOUGH: u64 = 5;

struct State {
    /// Steps that were done; none where the state is to come from others.
    step: Option<u64>,
    weights: Vec<u64>,
}

impl State {
    fn new() -> State {
        State { step: None, weights: vec![1; WEIGHTS] }
    }

    /// What a part of the data adds in this step.
    fn gradient(&self, shard: u64, sum: &mut [u64]) {
        let mut random = Random::new(&[self.step.unwrap_or(0), shard]);
        for (sum, weight) in sum.iter_mut().zip(&self.weights) {
            *sum = sum.wrapping_add(weight.wrapping_mul(random.next() | 1));
        }
    }

    fn apply(&mut self, sum: &[u64]) {
        self.weights.iter_mut().zip(sum).for_each(|(weight, sum)| *weight = weight.wrapping_add(*sum));
        self.step = Some(self.step.unwrap_or(0) + 1);
    }

    fn hash(&self) -> u64 {
        let bytes: Vec<u8> = self.weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        hash(&bytes)
    }
}

/// The hash of the weights after so many steps, by one process alone.
pub fn expected(steps: u64) -> u64 {
    let mut state = State::new();
    for _ in 0..steps {
        let mut sum = vec![0; WEIGHTS];
        (0..SHARDS).for_each(|shard| state.gradient(shard, &mut sum));
        state.apply(&sum);
    }
    state.hash()
}

/// Trains until there is the file, and says in each epoch, and at the end, how far it has come.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: Error| error.to_string();
    runtime::init(&Options::default()).map_err(fail)?;
    let mut state = State::new();
    loop {
        match train(settings, &mut state) {
            Ok(true) => break,
            // Others wait to be let in, or some are to leave; or the epoch is broken.
            Ok(false) | Err(Error::Broken(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
        match runtime::reform() {
            Ok(_) => {}
            Err(Error::Broken(broken)) if matches!(broken.cause, Cause::Excluded { .. }) => {
                println!("left");
                return Ok(());
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    println!("trained {} {:016x}", state.step.unwrap_or(0), state.hash());
    runtime::shutdown().map_err(fail)
}

/// One epoch; whether the training has ended.
fn train(settings: &RankSettings, state: &mut State) -> Result<bool, Error> {
    let world = runtime::world()?;
    let steps = typed::allgather("steps", &[state.step.map_or(0, |step| step + 1)])?;
    let best = steps.iter().copied().max().unwrap_or(0);
    let root = steps.iter().position(|steps| *steps == best).unwrap_or(0);
    typed::broadcast("weights", &mut state.weights, Rank(root as u32))?;
    state.step = Some(best.saturating_sub(1));
    let host = std::env::var("HOROVOD_HOSTNAME").unwrap_or_default();
    for done in 0.. {
        let news = runtime::news()?;
        let mut wish = [u32::from(settings.end.exists()), u32::from(news.added || news.removed)];
        typed::allreduce("wish", &mut wish, ReduceOp::Max)?;
        if wish[0] > 0 || wish[1] > 0 {
            return Ok(wish[0] > 0);
        }
        let mut sum = vec![0u64; WEIGHTS];
        let mine = (0..SHARDS).filter(|shard| shard % u64::from(world.size) == u64::from(world.rank));
        mine.for_each(|shard| state.gradient(shard, &mut sum));
        std::thread::sleep(STEP);
        typed::allreduce("gradient", &mut sum, ReduceOp::Sum)?;
        state.apply(&sum);
        if done == ENOUGH {
            println!("epoch {} of {} on {host}", runtime::epoch()?, world.size);
        }
    }
    unreachable!("it ends by an order or an error")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_depends_on_the_steps_alone() {
        assert_eq!(expected(3), expected(3));
        assert_ne!(expected(3), expected(4));
    }
}
