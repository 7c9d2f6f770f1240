//! What a process costs: threads and memory of each of two ranks, and memory of simulated engines.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::job::Plan;
use crate::{Count, Verdict, sim};
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// Sizes of the simulated clusters.
    #[arg(long, value_delimiter = ',', default_values_t = [64])]
    simulated: Vec<u32>,
    /// Simulates one cluster of this many engines in this process and says what it took.
    #[arg(long, hide = true)]
    engines: Option<u32>,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {}

const TENSORS: u64 = 1000;

pub fn run(settings: &Settings) -> Verdict {
    if let Some(engines) = settings.engines {
        return simulate(engines);
    }
    let mut count = Count::default();
    for transport in ["shm", "tcp"] {
        let plan = Plan {
            args: vec!["figures".to_owned()],
            size: settings.ranks,
            hosts: 1,
            places: Vec::new(),
            knobs: vec![("CAROLE_TRANSPORT", transport.to_owned())],
            limit: Duration::from_secs(600),
        };
        let lines = plan.run()?;
        let told = lines[0].last().ok_or("rank 0 said nothing")?;
        println!("figures: {} ranks, {transport}: {told}", settings.ranks);
        count.passed += 1;
    }
    for engines in &settings.simulated {
        let own = std::env::current_exe().map_err(|e| e.to_string())?;
        let mut command = Command::new(own);
        command.args(["figures", "--engines", &engines.to_string()]).stdin(Stdio::null());
        let output = command.output().map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = text.lines().find(|line| line.starts_with("figures: "));
        println!("{}", told.ok_or_else(|| format!("{engines} simulated engines: {text}"))?);
        count.passed += 1;
    }
    Ok(count)
}

/// One number of this process from the kernel: `VmHWM`, `VmRSS` (both in KiB), `Threads`.
fn of_this_process(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(0)
}

/// Whole engines with their links and programs, so an upper bound for one of them.
fn simulate(engines: u32) -> Verdict {
    let before = of_this_process("VmHWM");
    let args = sim::SimArgs { seed: 1, seeds: 1, ranks: engines, verbose: false };
    if sim::run(&args) != 0 {
        return Err(format!("the simulation of {engines} engines failed"));
    }
    let took = of_this_process("VmHWM").saturating_sub(before);
    println!(
        "figures: {engines} simulated engines: {} KiB at most for each, network and checkers included",
        took / u64::from(engines)
    );
    Ok(Count { passed: 1, skipped: 0 })
}

/// One rank: what init costs, and what a thousand small tensors cost on top.
pub fn rank(_: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    let bare = (of_this_process("Threads"), of_this_process("VmRSS"));
    runtime::init(&runtime::Options::default()).map_err(fail)?;
    call::barrier().map_err(fail)?;
    let ready = (of_this_process("Threads"), of_this_process("VmRSS"));
    for _ in 0..20 {
        let mut flying = Vec::new();
        for tensor in 0..TENSORS {
            let name = format!("figure.{tensor}");
            let request = Request {
                name: Some(&name),
                collective: Collective::Allreduce,
                op: ReduceOp::Sum,
                ..Request::default()
            };
            let tensors = vec![Tensor {
                dtype: DType::F32,
                shape: vec![64],
                input: vec![0; 256],
                place: Target::InPlace,
            }];
            flying.push(Operation::submit(&request, tensors).map_err(fail)?);
        }
        for operation in flying {
            operation.wait().map_err(fail)?;
        }
    }
    let busy = (of_this_process("Threads"), of_this_process("VmRSS"));
    println!(
        "threads {} before init, {} after; resident {} KiB before init, {} after, {} after 20 steps of {TENSORS} \
         tensors",
        bare.0, busy.0, bare.1, ready.1, busy.1
    );
    call::barrier().map_err(fail)?;
    runtime::shutdown().map_err(fail)
}
