//! How a job starts and ends: from the launcher's start to the first barrier of real processes, messages and time of a
//! rendezvous of many simulated ranks, and jobs that are started and killed again and again.
#![forbid(unsafe_code)]

use crate::ssh;
use crate::{Count, Verdict};
use carole::rendezvous::channel::Traffic;
use carole::rendezvous::client::{Join, join};
use carole::rendezvous::secret::Secret;
use carole::rendezvous::server::{Bind, Server, ServerOptions};
use carole::runtime::{self, Options};
use carole::types::Epoch;
use clap::Args;
use std::collections::{BTreeMap, HashSet};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Real processes that are brought to a first barrier.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 32, 128])]
    ranks: Vec<u32>,
    /// Simulated ranks that register with one rendezvous, each a thread.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 1024])]
    simulated: Vec<u32>,
    /// Jobs that are started and killed.
    #[arg(long, default_value_t = 20)]
    cycles: u32,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    /// Afterwards, waits to be killed.
    #[arg(long)]
    stay: bool,
}

/// A rank proves itself, says its card and gets the table: these many messages and parts of them, however many ranks
/// there are.
const PARTS_MAX: f64 = 16.0;

pub fn run(settings: &Settings) -> Verdict {
    let mut count = Count::default();
    println!("| ranks | first barrier | processes alone |");
    println!("| --- | --- | --- |");
    for &ranks in &settings.ranks {
        let (barrier, alone) = (first_barrier(ranks, &[])?, first_barrier(ranks, &["true"])?);
        println!("| {ranks} | {} ms | {} ms |", barrier.as_millis(), alone.as_millis());
        count.passed += 1;
    }
    println!("\n| simulated ranks | rendezvous | messages of a rank | bytes of a rank |");
    println!("| --- | --- | --- | --- |");
    for &ranks in &settings.simulated {
        let (took, traffic) = simulate(ranks)?;
        let per_rank = |n: u64| n as f64 / f64::from(ranks);
        let (parts, bytes) = (per_rank(traffic.parts), per_rank(traffic.bytes));
        println!("| {ranks} | {} ms | {parts:.1} | {bytes:.0} |", took.as_millis());
        if !(1.0..=PARTS_MAX).contains(&parts) {
            return Err(format!("{ranks} ranks: {parts} messages for one of them"));
        }
        count.passed += 1;
    }
    count.passed += cycles(settings.cycles)?;
    Ok(count)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

fn launcher(ranks: u32) -> Result<Command, String> {
    let mut command = Command::new(ssh::program("carolerun")?);
    for (name, _) in std::env::vars_os().filter(|(name, _)| crate::job::is_knob(name)) {
        command.env_remove(name);
    }
    command.args(["--start-timeout", "120", "-np", &ranks.to_string()]);
    command.env("CAROLE_TIMEOUT_MS", "60000").stdin(Stdio::null());
    Ok(command)
}

/// From the launcher's start until the last rank has left the first barrier; or, with a command, until it has ended.
fn first_barrier(ranks: u32, instead: &[&str]) -> Result<Duration, String> {
    let mut command = launcher(ranks)?;
    match instead {
        [] => command.arg(ssh::program("ci")?).args(["rank", "startup"]),
        instead => command.args(instead),
    };
    let (start, start_ms) = (Instant::now(), now_ms());
    let output = command.output().map_err(|e| format!("carolerun does not start: {e}"))?;
    let took = start.elapsed();
    if !output.status.success() {
        return Err(format!("{ranks} ranks: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    if !instead.is_empty() {
        return Ok(took);
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let times: Vec<u64> =
        text.lines().filter_map(|line| line.split_once("passed ")?.1.parse().ok()).collect();
    match (times.len() == ranks as usize, times.iter().max()) {
        (true, Some(&last)) => Ok(Duration::from_millis(last.saturating_sub(start_ms))),
        _ => Err(format!("{} of {ranks} ranks have passed the barrier", times.len())),
    }
}

pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&Options::default()).map_err(fail)?;
    crate::call::barrier().map_err(fail)?;
    println!("passed {}", now_ms());
    if settings.stay {
        std::thread::sleep(Duration::from_secs(600));
    }
    runtime::shutdown().map_err(fail)
}

/// One rendezvous for many ranks, each a thread with a connection of its own: how long until all have the table, and what
/// has passed on their connections.
fn simulate(ranks: u32) -> Result<(Duration, Traffic), String> {
    let secret = Secret::mint().map_err(|e| e.to_string())?;
    let server = Server::start(ServerOptions {
        bind: Bind::Loopback(0),
        secret: secret.clone(),
        size: ranks,
        epoch: Epoch(0),
        once: false,
        start_timeout_ms: 120_000,
        publish: None,
        warn: Arc::new(|words: &str| eprintln!("{words}")),
    })
    .map_err(|e| e.to_string())?;
    let address = server.addresses()[0].to_string();
    let start = Instant::now();
    let results: Vec<Result<usize, String>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks)
            .map(|rank| {
                let (secret, address) = (secret.clone(), address.clone());
                let thread = std::thread::Builder::new().stack_size(256 << 10);
                thread.spawn_scoped(scope, move || {
                    let environment: BTreeMap<String, String> = [
                        ("CAROLE_RANK", rank.to_string()),
                        ("CAROLE_SIZE", ranks.to_string()),
                        ("CAROLE_RENDEZVOUS", format!("tcp://{address}")),
                    ]
                    .map(|(name, value)| (name.to_owned(), value))
                    .into();
                    let mut how =
                        Join::new(environment, Epoch(0), Arc::new(|words: &str| eprintln!("{words}")));
                    how.secret = Some(secret);
                    how.start_timeout_ms = 120_000;
                    join(&how).map(|joined| joined.table.cards.len()).map_err(|e| e.to_string())
                })
            })
            .collect();
        let join = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("a rank panicked".to_owned())),
            Err(e) => Err(format!("no thread: {e}")),
        };
        ranks.into_iter().map(join).collect()
    });
    let took = start.elapsed();
    for result in results {
        let cards = result?;
        if cards != ranks as usize {
            return Err(format!("a rank got a table of {cards}"));
        }
    }
    let arrivals = server.arrivals();
    // Its connections are closed and counted when it has ended.
    server.shutdown();
    Ok((took, arrivals.traffic()))
}

/// Jobs that are started, and of which the launcher is killed when all ranks run: nothing is left, at once or soon.
fn cycles(cycles: u32) -> Result<u64, String> {
    let start = Instant::now();
    for cycle in 0..cycles {
        let mark = format!("STARTUP_MARK={}-{cycle}", std::process::id());
        let (name, value) = mark.split_once('=').expect("it has one");
        let mut command = launcher(4)?;
        command.arg(ssh::program("ci")?).args(["rank", "startup", "--stay"]);
        command.env(name, value).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut job = command.spawn().map_err(|e| format!("carolerun does not start: {e}"))?;
        // Killed at every moment of the start, from its very beginning to well after it.
        std::thread::sleep(Duration::from_millis(u64::from(cycle % 20) * 10));
        let pid = rustix::process::Pid::from_child(&job);
        let victim = match cycle % 2 {
            0 => Some(pid),
            _ => marked(&mark)
                .into_iter()
                .find(|&p| p != pid.as_raw_nonzero().get())
                .and_then(rustix::process::Pid::from_raw),
        };
        rustix::process::kill_process(victim.unwrap_or(pid), rustix::process::Signal::KILL)
            .map_err(|e| format!("cycle {cycle}: no signal: {e}"))?;
        drop(job.stdout.take());
        job.wait().map_err(|e| e.to_string())?;
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let left = marked(&mark);
            if left.is_empty() {
                break;
            }
            if Instant::now() >= until {
                return Err(format!("cycle {cycle}: {left:?} are left"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!(
        "\n{cycles} jobs were started and killed in {:.1} s; 0 processes leaked",
        start.elapsed().as_secs_f64()
    );
    Ok(u64::from(cycles))
}

/// Processes that have this in their environment.
fn marked(mark: &str) -> HashSet<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    pids.filter(ours).collect()
}
