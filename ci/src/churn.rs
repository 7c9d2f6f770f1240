//! Ranks killed one after another while the others go on: they come together in a new epoch each time, without a
//! restart, and the sums are right again. When one is left the next job begins; for as long as is asked for.
#![forbid(unsafe_code)]

use crate::call::{self, Target, Tensor};
use crate::chaos::now_ms;
use crate::job::{Job, Plan};
use crate::random::Random;
use crate::{Count, Verdict};
use carole::error::Error;
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    #[arg(long, default_value_t = 5)]
    ranks: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Whoever has not come together after so long never will.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(settings: &Settings) -> Verdict {
    let mut random = Random::new(&[settings.seed, 0xC4012]);
    let begin = Instant::now();
    let mut delays: Vec<f64> = Vec::new();
    let mut jobs = 0u64;
    while begin.elapsed() < Duration::from_secs(settings.seconds) {
        let transport = ["shm", "tcp"][(jobs % 2) as usize];
        jobs += 1;
        let plan = Plan {
            args: vec!["churn".to_owned()],
            size: settings.ranks,
            hosts: 1,
            places: Vec::new(),
            knobs: vec![
                ("CAROLE_TRANSPORT", transport.to_owned()),
                ("CAROLE_UNIFORM", "1".to_owned()),
                crate::chaos::silence(),
            ],
            limit: Duration::from_secs(600),
        };
        let job = plan.start()?;
        let mut alive: Vec<u32> = (0..settings.ranks).collect();
        together(&job, &alive)?;
        while alive.len() > 1 {
            std::thread::sleep(Duration::from_millis(random.below(300)));
            let victim = alive.remove(random.below(alive.len() as u64) as usize);
            let struck = now_ms();
            job.signal(victim, Signal::KILL)?;
            let last = together(&job, &alive)
                .map_err(|words| format!("rank {victim} of {transport} job {jobs} was killed: {words}"))?;
            delays.push(last - struck);
        }
    }
    delays.sort_by(f64::total_cmp);
    println!(
        "churn: {} ranks killed in {jobs} jobs; each time the others summed in a new epoch, half of the times within \
         {:.0} ms, at the latest after {:.0} ms",
        delays.len(),
        delays.get(delays.len() / 2).copied().unwrap_or(0.0),
        delays.last().copied().unwrap_or(0.0)
    );
    Ok(Count { passed: delays.len() as u64, skipped: 0 })
}

/// Waits until all of these have summed in one epoch; when the last one had.
fn together(job: &Job, alive: &[u32]) -> Result<f64, String> {
    let until = Instant::now() + PATIENCE;
    let mut formed: Vec<(u32, f64, String)> = Vec::new();
    while formed.len() < alive.len() {
        let Some((rank, line)) = job.line(until) else {
            return Err(format!("of {alive:?} only {formed:?} have gone on"));
        };
        match line.strip_prefix("formed ").and_then(|rest| rest.split_once(' ')) {
            Some((at, words)) if alive.contains(&rank) => {
                formed.push((rank, at.parse().map_err(|_| line.clone())?, words.to_owned()));
            }
            // What the victim had said before.
            _ if !alive.contains(&rank) => {}
            _ => return Err(format!("rank {rank}: {line}")),
        }
    }
    let words = format!("of {}", alive.len());
    match formed.iter().find(|found| !found.2.starts_with(&words) || found.2 != formed[0].2) {
        Some(found) => Err(format!("{found:?} is not what {:?} and {words} say", formed[0])),
        None => Ok(formed.iter().map(|found| found.1).fold(0.0, f64::max)),
    }
}

/// One rank: sums, and goes on whenever the epoch breaks.
pub fn rank() -> Result<(), String> {
    runtime::init(&runtime::Options::default()).map_err(|error| error.to_string())?;
    loop {
        let world = runtime::world().map_err(|error| error.to_string())?;
        let mut done = 0;
        let error = loop {
            match sum(world.size) {
                Ok(()) if done == 0 => println!("formed {:.3} of {}", now_ms(), world.size),
                Ok(()) => {}
                Err(error) => break error,
            }
            done += 1;
        };
        match error {
            Error::Broken(_) => runtime::reform().map_err(|error| error.to_string())?,
            other => return Err(other.to_string()),
        };
    }
}

fn sum(size: u32) -> Result<(), Error> {
    let request = Request {
        name: Some("churn"),
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        ..Request::default()
    };
    let input = 1u32.to_le_bytes().repeat(5000);
    let tensor = Tensor { dtype: DType::U32, shape: vec![5000], input, place: Target::InPlace };
    let got = call::run(&request, vec![tensor])?;
    match got.outputs[0] == size.to_le_bytes().repeat(5000) {
        true => Ok(()),
        false => Err(Error::usage("a sum is wrong")),
    }
}
