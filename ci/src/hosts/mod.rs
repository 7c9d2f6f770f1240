//! Several hosts on one machine: real processes in network namespaces that meet over a router. Results are
//! checked as in the matrix; then hosts die, packets vanish, and addresses mislead.
#![forbid(unsafe_code)]

pub mod network;

use crate::job::{Job, Plan};
use crate::{Count, Verdict, chaos, matrix};
use clap::Args;
use network::{Family, Network};
use rustix::process::Signal;
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Numbers of hosts of the jobs whose results are checked.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    hosts: Vec<u32>,
    /// Ranks on each.
    #[arg(long, default_value_t = 2)]
    per_host: u32,
    /// Of the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the scenes whose names have these words, and no results.
    #[arg(long)]
    scene: Option<String>,
}

pub fn run(settings: &Settings) -> Verdict {
    if let Some(reason) = Network::missing() {
        println!("hosts: skipped, {reason}");
        return Ok(Count { passed: 0, skipped: 1 });
    }
    let mut count = Count::default();
    for &hosts in settings.hosts.iter().filter(|_| settings.scene.is_none()) {
        let network = Network::new(hosts, Family::Both)?;
        for (turn, algorithm) in matrix::ALGORITHMS.into_iter().enumerate() {
            count.passed += results(settings, &network, algorithm, turn as u64)?;
        }
    }
    type Scene = fn(&Settings) -> Result<(), String>;
    let scenes: [(&str, Scene); 6] = [
        ("IPv6 alone", ipv6_alone),
        ("the same address on every host", decoys),
        ("an interface that does not exist", no_such_interface),
        ("no way between two hosts", no_way),
        ("a host dies", host_dies),
        ("packets vanish in one direction", packets_vanish),
    ];
    let wanted = |name: &str| settings.scene.as_ref().is_none_or(|words| name.contains(words));
    for (name, scene) in scenes.into_iter().filter(|(name, _)| wanted(name)) {
        scene(settings).map_err(|words| format!("{name}: {words}"))?;
        println!("hosts: {name}: as it should be");
        count.passed += 1;
    }
    println!("hosts: {} checks on {:?} hosts of {} ranks", count.passed, settings.hosts, settings.per_host);
    Ok(count)
}

/// A job that spans a network.
fn plan(settings: &Settings, network: &Network, args: &[&str]) -> Plan {
    let places = network.all();
    Plan {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        size: settings.per_host * places.len() as u32,
        hosts: places.len() as u32,
        places,
        knobs: Vec::new(),
        limit: Duration::from_secs(600),
    }
}

/// The cases of one turn of the matrix.
fn results(settings: &Settings, network: &Network, algorithm: &str, turn: u64) -> Result<u64, String> {
    let seed = settings.seed.to_string();
    let mut plan = plan(settings, network, &["matrix", "--seed", &seed, "--turn", &turn.to_string()]);
    plan.knobs.push(("CAROLE_ALGORITHM", algorithm.to_owned()));
    let lines = plan.run()?;
    matrix::judge(&matrix::cases(plan.size, settings.seed, turn, false), &lines)
        .map_err(|words| format!("{} hosts, {algorithm}: {words}", plan.hosts))
}

fn ipv6_alone(settings: &Settings) -> Result<(), String> {
    results(settings, &Network::new(2, Family::V6)?, "auto", 0).map(drop)
}

fn decoys(settings: &Settings) -> Result<(), String> {
    let network = Network::new(2, Family::Both)?;
    network.add_decoys()?;
    results(settings, &network, "auto", 1).map(drop)
}

/// Every rank ends with an error that has these words.
fn expect_refusal(plan: &Plan, words: &[&str]) -> Result<(), String> {
    let ended = plan.start()?.finish()?;
    for (rank, lines) in ended.lines.iter().enumerate() {
        let last = lines.last().map_or("no output", String::as_str);
        if ended.status[rank].success() || !words.iter().all(|word| last.contains(word)) {
            return Err(format!("rank {rank} ended with {}: {last}", ended.status[rank]));
        }
    }
    Ok(())
}

fn no_such_interface(settings: &Settings) -> Result<(), String> {
    let network = Network::new(2, Family::Both)?;
    let mut plan = plan(settings, &network, &["chaos", "--seed", "1"]);
    plan.knobs.push(("CAROLE_INTERFACES", "eth7".to_owned()));
    expect_refusal(&plan, &["CAROLE_INTERFACES", "eth7"])
}

fn no_way(settings: &Settings) -> Result<(), String> {
    let network = Network::new(2, Family::Both)?;
    network.drop_packets(0, 1)?;
    network.drop_packets(1, 0)?;
    let mut plan = plan(settings, &network, &["chaos", "--seed", "1"]);
    plan.knobs.push(("CAROLE_START_TIMEOUT_S", "4".to_owned()));
    expect_refusal(&plan, &["rank"])
}

/// A job of two hosts that runs, and the verdicts of the survivors of what `strike` does to it.
fn verdicts(
    settings: &Settings,
    survivors: impl Fn(u32) -> bool,
    strike: impl Fn(&Job, &Network) -> Result<(), String>,
) -> Result<Vec<(u32, f64, String)>, String> {
    let network = Network::new(2, Family::Both)?;
    let mut plan = plan(settings, &network, &["chaos", "--seed", &settings.seed.to_string()]);
    plan.knobs.push(chaos::silence());
    let job = plan.start()?;
    chaos::wait_until_running(&job, plan.size)?;
    let struck_at = chaos::now_ms();
    strike(&job, &network)?;
    let mut verdicts = chaos::collect(&job, (0..plan.size).filter(|&rank| survivors(rank)).collect())?;
    verdicts.iter_mut().for_each(|(_, at_ms, _)| *at_ms -= struck_at);
    Ok(verdicts)
}

/// Those of one side say the same, and it is about the other side.
fn agree(verdicts: &[(u32, f64, String)], culprits: std::ops::Range<u32>) -> Result<(), String> {
    let Some((_, _, first)) = verdicts.first() else { return Err("nobody survived".into()) };
    if let Some((rank, _, words)) = verdicts.iter().find(|(_, _, words)| words != first) {
        return Err(format!("rank {rank} says '{words}', but rank {} '{first}'", verdicts[0].0));
    }
    match culprits.clone().any(|rank| first.contains(&format!("rank {rank} "))) {
        true => Ok(()),
        false => Err(format!("one of the ranks {culprits:?} is at fault, but all say '{first}'")),
    }
}

fn report(what: &str, verdicts: &[(u32, f64, String)]) {
    let last = verdicts.iter().map(|verdict| verdict.1).fold(0.0, f64::max);
    println!("hosts: {what}: the last of {} survivors knew after {last:.0} ms", verdicts.len());
}

fn host_dies(settings: &Settings) -> Result<(), String> {
    let n = settings.per_host;
    let verdicts = verdicts(
        settings,
        |rank| rank < n,
        |job, _| (n..2 * n).try_for_each(|rank| job.signal(rank, Signal::KILL)),
    )?;
    report("a host dies", &verdicts);
    agree(&verdicts, n..2 * n)
}

fn packets_vanish(settings: &Settings) -> Result<(), String> {
    let n = settings.per_host;
    let verdicts = verdicts(settings, |_| true, |_, network| network.drop_packets(0, 1))?;
    report("packets vanish in one direction", &verdicts);
    // Which side is to blame takes a vote between them; each side must be of one mind.
    let (here, there): (Vec<_>, Vec<_>) = verdicts.into_iter().partition(|&(rank, _, _)| rank < n);
    agree(&here, 0..2 * n)?;
    agree(&there, 0..2 * n)
}
