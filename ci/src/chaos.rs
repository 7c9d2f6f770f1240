//! Ranks killed and stopped at random moments: every survivor ends its calls with the same `Broken` error that
//! names the culprit, having completed as many operations as all others (completion is uniform), and a stopped rank
//! that resumes finds itself fenced. Ranks killed while the others start or leave: nobody hangs. Also the job
//! that the intruders knock at: the same loop, but nobody dies.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::job::{Job, Plan, over};
use crate::random::Random;
use crate::{Count, Verdict};
use carole::error::Error;
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Ranks killed, one a job.
    #[arg(long, default_value_t = 6)]
    kills: u64,
    /// Ranks stopped, one a job.
    #[arg(long, default_value_t = 3)]
    stops: u64,
    /// Ranks killed while the others come together, one a job.
    #[arg(long, default_value_t = 2)]
    starts: u64,
    /// Ranks killed about when all leave, one a job.
    #[arg(long, default_value_t = 3)]
    teardowns: u64,
    #[arg(long, default_value_t = 4)]
    ranks: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Fail when a verdict takes longer than 0.5 s (killed) or 4 s (stopped); else it is only counted, since
    /// a busy machine makes everything late.
    #[arg(long)]
    punctual: bool,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long)]
    seed: u64,
    /// Ends in an orderly way after this long.
    #[arg(long, default_value_t = 120_000)]
    for_ms: u64,
    /// Which collective goes between the sums.
    #[arg(long, default_value = "allreduce")]
    collective: String,
    /// Files that this process may have open.
    #[arg(long)]
    descriptors: Option<u64>,
}

const COLLECTIVES: [(&str, Collective); 6] = [
    ("allreduce", Collective::Allreduce),
    ("broadcast", Collective::Broadcast),
    ("allgather", Collective::Allgather),
    ("alltoall", Collective::Alltoall),
    ("reducescatter", Collective::Reducescatter),
    ("barrier", Collective::Barrier),
];
/// Operations that are in flight together.
const TOGETHER: u64 = 4;

/// Whoever says nothing for so long will never say it.
const COLLECT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Blow {
    Kill,
    Stop,
}

impl Blow {
    fn limit_ms(self) -> f64 {
        if self == Blow::Kill { 500.0 } else { 4000.0 }
    }
}

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    for (blow, times) in [(Blow::Kill, settings.kills), (Blow::Stop, settings.stops)] {
        let mut delays = Vec::new();
        for turn in 0..times {
            let scene = Scene::new(settings, turn);
            let found = scene.strike(blow);
            delays.extend(found.map_err(|words| format!("{words}\n  ({scene:?})"))?);
            count.passed += 1;
        }
        let late = delays.iter().filter(|&&ms| ms > blow.limit_ms()).count();
        println!(
            "chaos: {times} ranks {}; {} survivors, all with the same error and as many operations done; half knew \
             after {:.0} ms, the last after {:.0} ms; {late} later than {:.0} ms",
            if blow == Blow::Kill { "killed" } else { "stopped" },
            delays.len(),
            median(&mut delays),
            delays.iter().copied().fold(0.0, f64::max),
            blow.limit_ms()
        );
        if settings.punctual && late > 0 {
            return Err(format!("{late} verdicts came late"));
        }
    }
    for (starts, times) in [(true, settings.starts), (false, settings.teardowns)] {
        let mut longest = 0f64;
        for turn in 0..times {
            let scene = Scene::new(settings, turn);
            longest =
                longest.max(scene.interrupt(starts).map_err(|words| format!("{words}\n  ({scene:?})"))?);
            count.passed += 1;
        }
        println!(
            "chaos: {times} ranks killed while the others {}; all ended, the last after {longest:.1} s",
            if starts { "came together" } else { "left" }
        );
    }
    Ok(count)
}

fn median(delays: &mut [f64]) -> f64 {
    delays.sort_by(f64::total_cmp);
    delays.get(delays.len() / 2).copied().unwrap_or(0.0)
}

/// One job that something happens to.
#[derive(Debug)]
struct Scene {
    ranks: u32,
    transport: &'static str,
    collective: &'static str,
    /// Whether completion is uniform because it is asked for, or as ever within a host.
    uniform: &'static str,
    seed: u64,
}

impl Scene {
    fn new(settings: &Settings, turn: u64) -> Scene {
        Scene {
            ranks: settings.ranks,
            transport: ["shm", "tcp", "shm", "tls"][(turn % 4) as usize],
            collective: COLLECTIVES[(turn % 6) as usize].0,
            uniform: ["auto", "1"][(turn / 4 % 2) as usize],
            seed: settings.seed.wrapping_mul(1000) + turn,
        }
    }

    fn plan(&self, more: &[&str]) -> Plan {
        let seed = self.seed.to_string();
        let args = ["chaos", "--collective", self.collective, "--seed", &seed];
        Plan {
            args: args.iter().chain(more).map(|&arg| arg.to_owned()).collect(),
            size: self.ranks,
            hosts: 1,
            places: Vec::new(),
            knobs: [over(self.transport), vec![("CAROLE_UNIFORM", self.uniform.to_owned()), silence()]]
                .concat(),
            limit: Duration::from_secs(180),
        }
    }

    /// A rank is killed while the others come together or leave: how many seconds until all had ended.
    fn interrupt(&self, starts: bool) -> Result<f64, String> {
        let mut random = Random::new(&[self.seed, 0xC4A06]);
        let victim = random.below(u64::from(self.ranks)) as u32;
        let mut plan = self.plan(&["--for-ms", "400"]);
        plan.knobs.push(("CAROLE_START_TIMEOUT_S", "5".to_owned()));
        plan.limit = Duration::from_secs(60);
        let job = plan.start()?;
        if !starts {
            wait_until_running(&job, self.ranks)?;
        }
        std::thread::sleep(Duration::from_millis(random.below(if starts { 100 } else { 800 })));
        let struck = Instant::now();
        // It may have ended in good order already.
        let _ = job.signal(victim, Signal::KILL);
        job.finish()?;
        Ok(struck.elapsed().as_secs_f64())
    }

    /// One job, one blow: how many milliseconds each survivor took to know.
    fn strike(&self, blow: Blow) -> Result<Vec<f64>, String> {
        strike(&self.plan(&[]), blow, self.seed)
    }
}

fn strike(plan: &Plan, blow: Blow, seed: u64) -> Result<Vec<f64>, String> {
    let ranks = plan.size;
    let mut random = Random::new(&[seed, 0xC4A05]);
    let victim = random.below(u64::from(ranks)) as u32;
    let job = plan.start()?;
    wait_until_running(&job, ranks)?;
    std::thread::sleep(Duration::from_millis(random.below(500)));
    let struck_at = now_ms();
    job.signal(victim, if blow == Blow::Kill { Signal::KILL } else { Signal::STOP })?;
    let verdicts = collect(&job, (0..ranks).filter(|&rank| rank != victim).collect())
        .map_err(|words| format!("rank {victim} was struck: {words}"))?;
    let mut delays = Vec::new();
    for (rank, at_ms, words) in &verdicts {
        if *words != verdicts[0].2 {
            return Err(format!(
                "rank {rank} says '{words}', but rank {} '{}'",
                verdicts[0].0, verdicts[0].2
            ));
        }
        if !words.contains(&format!("rank {victim}")) {
            return Err(format!("rank {victim} was struck, but rank {rank} says '{words}'"));
        }
        delays.push(at_ms - struck_at);
    }
    if blow == Blow::Stop {
        revive(&job, victim)?;
    }
    Ok(delays)
}

/// What is silent for so long is given up: the default, which the figures are about.
pub fn silence() -> (&'static str, String) {
    ("CAROLE_TIMEOUT_MS", "3000".to_owned())
}

pub fn wait_until_running(job: &Job, ranks: u32) -> Result<(), String> {
    let until = Instant::now() + Duration::from_secs(120);
    let mut running = 0;
    while running < ranks {
        match job.line(until) {
            Some((_, line)) if line == "running" => running += 1,
            Some((rank, line)) => return Err(format!("rank {rank} before the blow: {line}")),
            None => return Err(format!("only {running} of {ranks} ranks came up")),
        }
    }
    Ok(())
}

/// What each survivor reports: rank, when, words.
pub fn collect(job: &Job, survivors: Vec<u32>) -> Result<Vec<(u32, f64, String)>, String> {
    let until = Instant::now() + COLLECT;
    let mut verdicts: Vec<(u32, f64, String)> = Vec::new();
    while verdicts.len() < survivors.len() {
        let Some((rank, line)) = job.line(until) else {
            let told: Vec<u32> = verdicts.iter().map(|verdict| verdict.0).collect();
            return Err(format!("after {COLLECT:?} only ranks {told:?} of {survivors:?} know"));
        };
        match line.strip_prefix("broken ").and_then(|rest| rest.split_once(' ')) {
            Some((at, words)) if survivors.contains(&rank) => {
                let at = at.parse().map_err(|_| format!("rank {rank}: {line}"))?;
                verdicts.push((rank, at, words.to_owned()));
            }
            _ => return Err(format!("rank {rank} after the blow: {line}")),
        }
    }
    Ok(verdicts)
}

/// The stopped rank goes on, and must learn that the others went on without it.
fn revive(job: &Job, victim: u32) -> Result<(), String> {
    job.signal(victim, Signal::CONT)?;
    let until = Instant::now() + COLLECT;
    loop {
        match job.line(until) {
            Some((rank, line)) if rank == victim => {
                let fenced = line.starts_with("broken ");
                return if fenced { Ok(()) } else { Err(format!("rank {victim}, resumed: {line}")) };
            }
            Some(_) => {}
            None => return Err(format!("rank {victim} was resumed and does not find itself fenced")),
        }
    }
}

pub fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs_f64() * 1e3
}

/// One rank: sums of all sizes until something breaks or the time is over.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    if let Some(most) = settings.descriptors {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(Resource::Nofile, limit).map_err(|error| error.to_string())?;
    }
    runtime::init(&runtime::Options::default()).map_err(|error| error.to_string())?;
    let between = COLLECTIVES.iter().find(|(name, _)| *name == settings.collective);
    let between = between.ok_or("a collective that is not in the list")?.1;
    let mut done = 0;
    let begin = Instant::now();
    // All ranks must run equally many, so the seed decides sizes and one of them decides the end.
    let mut random = Random::new(&[settings.seed]);
    call::barrier().map_err(|error| error.to_string())?;
    println!("running");
    for step in 0u64.. {
        let elements = 1 << random.below(18);
        let end = begin.elapsed() >= Duration::from_millis(settings.for_ms);
        let outcome = together(between, 1 + random.below(2000), &mut done)
            .and_then(|()| one_sum(elements, end, step).inspect(|_| done += 1));
        match outcome {
            Ok(false) => {}
            Ok(true) => break,
            Err(error @ Error::Broken(_)) => {
                println!("broken {:.3} after {done} operations: {error}", now_ms());
                // The group is gone; so that the parent sees all survivors' words, none is waited for.
                return runtime::shutdown().map_err(|error| error.to_string());
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    println!("finished");
    call::barrier().map_err(|error| error.to_string())?;
    runtime::shutdown().map_err(|error| error.to_string())
}

/// Some operations in flight together; counts those that are complete, also when the epoch breaks.
fn together(collective: Collective, rows: u64, done: &mut u64) -> Result<(), Error> {
    let rows = rows * u64::from(runtime::world()?.size);
    let names: Vec<String> = (0..TOGETHER).map(|i| format!("together.{i}.{rows}")).collect();
    let mut operations = Vec::new();
    for name in &names {
        let request = Request { name: Some(name), collective, op: ReduceOp::Sum, ..Request::default() };
        let input = vec![1; 8 * rows as usize];
        let tensor = Tensor { dtype: DType::I64, shape: vec![rows], input, place: Target::Engine };
        let tensors = if collective == Collective::Barrier { Vec::new() } else { vec![tensor] };
        operations.push(Operation::submit(&request, tensors));
    }
    let mut outcome = Ok(());
    for operation in operations {
        match operation.and_then(Operation::wait) {
            Ok(_) => *done += 1,
            Err(error) => outcome = Err(error),
        }
    }
    outcome
}

/// One sum; whether some rank wants to end.
fn one_sum(elements: u64, end: bool, step: u64) -> Result<bool, Error> {
    let mut values = vec![1.0f32; elements as usize];
    values[0] = f32::from(u8::from(end));
    let name = format!("chaos.{elements}");
    let request = Request {
        name: Some(&name),
        collective: Collective::Allreduce,
        op: ReduceOp::Sum,
        ..Request::default()
    };
    let input = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = Tensor { dtype: DType::F32, shape: vec![elements], input, place: Target::InPlace };
    let got = call::run(&request, vec![tensor])?;
    let sum = |i: usize| f32::from_le_bytes(got.outputs[0][4 * i..4 * i + 4].try_into().expect("4 bytes"));
    let ranks = runtime::world()?.size as f32;
    if (1..elements as usize).any(|i| sum(i) != ranks) {
        return Err(Error::usage(format!("step {step} is wrong")));
    }
    Ok(sum(0) > 0.0)
}
