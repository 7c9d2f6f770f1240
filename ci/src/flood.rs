//! What a flood of connections on the ports of a running job costs it: the time of a step, beside that under the same flood
//! of a listener that has nothing to do with the job. The two take turns, so that a drift of the machine hits both.
#![forbid(unsafe_code)]

use crate::chaos::{now_ms, wait_until_running};
use crate::intrude::listening;
use crate::job::{Job, Plan, over};
use crate::random::Random;
use crate::{Count, Verdict, call};
use carole::runtime::{self, typed};
use carole::types::ReduceOp;
use clap::Args;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// How long in all.
    #[arg(long, default_value_t = 100)]
    seconds: u64,
    /// Connections a second.
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// shm, tcp, or tls, which is TCP with encryption.
    #[arg(long, default_value = "tcp")]
    transport: String,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    /// The end has come when this file is there.
    #[arg(long)]
    until: PathBuf,
}

/// One listener is flooded for so long before it is the other's turn.
const TURN: Duration = Duration::from_millis(1000);
/// The start of a turn, which belongs to the one before as well, does not count.
const SETTLE_MS: f64 = 200.0;
/// How often rank 0 says how far it is.
const REPORT_MS: f64 = 50.0;
const ELEMENTS: usize = 64 << 10;

/// A time, in milliseconds, and the steps that were done by then.
type Mark = (f64, f64);

pub fn run(settings: &Settings) -> Verdict {
    let turns = (settings.seconds * 1000 / TURN.as_millis() as u64).max(2);
    let folder = tempfile::tempdir().map_err(|e| format!("no temporary directory: {e}"))?;
    let until = folder.path().join("end");
    let plan = Plan {
        args: ["flood", "--until", &until.to_string_lossy()].map(str::to_owned).to_vec(),
        size: settings.ranks,
        hosts: 1,
        places: Vec::new(),
        knobs: over(&settings.transport),
        limit: 3 * TURN * turns as u32 + Duration::from_secs(120),
    };
    let job = plan.start()?;
    wait_until_running(&job, settings.ranks)?;
    let ports: Vec<SocketAddr> = listening(&job, settings.ranks)?.into_iter().collect();
    let unrelated = unrelated().map_err(|e| format!("no listener beside the job: {e}"))?;
    let mut random = Random::new(&[settings.seed]);
    let mut spans = Vec::new();
    let mut worked = Duration::ZERO;
    let mut count = Count::default();
    for turn in 0..turns {
        let targets = if turn % 2 == 0 { &[unrelated][..] } else { &ports };
        let (begin, before) = (now_ms(), porters(&job, settings.ranks));
        count.passed += flood(targets, settings.rate, &mut random);
        spans.push((begin + SETTLE_MS, now_ms()));
        if turn % 2 == 1 {
            worked += porters(&job, settings.ranks).saturating_sub(before);
        }
    }
    std::fs::write(&until, "").map_err(|e| format!("the job cannot be told to end: {e}"))?;
    let marks = end(job)?;
    let flooded: f64 = spans.iter().skip(1).step_by(2).map(|(from, to)| to - from + SETTLE_MS).sum();
    println!(
        "flood: {} connections, {} a second, to the {} ports of a job of {} ranks over {} and to an unrelated listener, in \
         turn; to answer them the job's porters took {:.2} % of a processor's time for each rank",
        count.passed,
        settings.rate,
        ports.len(),
        settings.ranks,
        settings.transport,
        worked.as_secs_f64() * 1e5 / flooded / f64::from(settings.ranks),
    );
    let steps: Vec<Option<f64>> = spans.iter().map(|span| step_ms(&marks, *span)).collect();
    let cost = |pair: &[Option<f64>]| Some((pair[1]? / pair[0]? - 1.0) * 100.0);
    let mut costs: Vec<f64> = steps.chunks_exact(2).filter_map(cost).collect();
    costs.sort_by(f64::total_cmp);
    if costs.is_empty() {
        println!("flood: the job went on, but too slowly for its steps to be timed");
        return Ok(count);
    }
    let at = |share: f64| costs[((costs.len() - 1) as f64 * share).round() as usize];
    println!(
        "flood: a step (256 KiB) takes {:.1} % longer in the former (median of {} pairs; a quarter below {:.1} %, a quarter \
         above {:.1} %)",
        at(0.5),
        costs.len(),
        at(0.25),
        at(0.75)
    );
    Ok(count)
}

/// The processor time that the ranks' threads have taken which answer connections.
fn porters(job: &Job, ranks: u32) -> Duration {
    let threads = |rank| {
        let tasks = format!("/proc/{}/task", job.pid(rank).as_raw_nonzero());
        std::fs::read_dir(tasks).into_iter().flatten().flatten().map(|entry| entry.path())
    };
    let porter = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "carole-porter")
    };
    let took = |task: PathBuf| -> Option<u64> {
        let stat = std::fs::read_to_string(task.join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse().ok()
    };
    Duration::from_nanos((0..ranks).flat_map(threads).filter(porter).filter_map(took).sum())
}

/// A listener that takes every connection and closes it.
fn unrelated() -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || listener.incoming().for_each(drop));
    Ok(address)
}

/// Connections with a little garbage, spread evenly over one turn; how many were made.
fn flood(targets: &[SocketAddr], rate: u64, random: &mut Random) -> u64 {
    let begin = Instant::now();
    let mut made = 0;
    for number in 0.. {
        let due = Duration::from_micros(number * 1_000_000 / rate.max(1));
        // Where connections take longer than they should there are fewer.
        if due.max(begin.elapsed()) >= TURN {
            break;
        }
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        let target = targets[number as usize % targets.len()];
        if let Ok(mut stream) = TcpStream::connect_timeout(&target, Duration::from_secs(1)) {
            let garbage: [u8; 64] = std::array::from_fn(|_| random.next() as u8);
            // Whoever closes sooner is what we hope for.
            let _ = stream.write_all(&garbage);
            made += 1;
        }
    }
    made
}

/// What rank 0 has told, when all have ended well.
fn end(job: Job) -> Result<Vec<Mark>, String> {
    let ended = job.finish()?;
    for (rank, status) in ended.status.iter().enumerate() {
        if !status.success() {
            return Err(format!("rank {rank} was disturbed: {status}, {:?}", ended.lines[rank].last()));
        }
    }
    let mark = |line: &String| {
        let (at, steps) = line.split_once(' ')?;
        Some((at.parse().ok()?, steps.parse().ok()?))
    };
    ended.lines[0].iter().map(|line| mark(line).ok_or_else(|| format!("rank 0: {line}"))).collect()
}

/// How long a step took between two moments, if rank 0 has told of any.
fn step_ms(marks: &[Mark], (from, to): (f64, f64)) -> Option<f64> {
    let inside: Vec<&Mark> = marks.iter().filter(|(at, _)| (from..=to).contains(at)).collect();
    let (first, last) = (inside.first()?, inside.last()?);
    (last.1 > first.1).then(|| (last.0 - first.0) / (last.1 - first.1))
}

/// One rank: sums, one after another, until rank 0 has seen that it is time.
pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let words = |e: carole::error::Error| e.to_string();
    runtime::init(&runtime::Options::default()).map_err(words)?;
    let leads = runtime::world().map_err(words)?.rank == 0;
    call::barrier().map_err(words)?;
    println!("running");
    let (mut steps, mut told, mut ends) = (0u64, 0.0, false);
    let mut values = vec![0f32; ELEMENTS];
    loop {
        values.fill(0.0);
        values[0] = f32::from(ends);
        typed::allreduce("step", &mut values, ReduceOp::Sum).map_err(words)?;
        steps += 1;
        if leads && now_ms() - told >= REPORT_MS {
            told = now_ms();
            println!("{told:.3} {steps}");
            ends = settings.until.exists();
        }
        if values[0] > 0.0 {
            break;
        }
    }
    call::barrier().map_err(words)?;
    runtime::shutdown().map_err(words)
}
