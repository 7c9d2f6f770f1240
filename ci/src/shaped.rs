//! Algorithms over hosts that are namespaces, on links whose rate is set with `tc`: how long each takes when it is
//! forced, which the prices choose, and what that choice costs against the best (its regret). With
//! `--checksums` instead: what checksums cost on such a link.
#![forbid(unsafe_code)]

use crate::call::{self, Operation, Target, Tensor};
use crate::hosts::network::{Family, Network};
use crate::job::Plan;
use crate::{Count, Verdict};
use carole::runtime::{self, Request};
use carole::types::{Collective, DType, ReduceOp};
use clap::Args;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Numbers of hosts.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    hosts: Vec<u32>,
    /// Numbers of ranks on each host.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    per_host: Vec<u32>,
    /// What each host's link carries in each direction, in Mbit/s.
    #[arg(long, default_value_t = 1000)]
    mbits: u32,
    /// Sizes of the allreduce, in bytes.
    #[arg(long, value_delimiter = ',', default_values_t = [1 << 10, 64 << 10, 1 << 20, 8 << 20])]
    bytes: Vec<u64>,
    /// How often everything is measured; medians are compared.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Measures the cost of checksums on one link instead.
    #[arg(long)]
    checksums: bool,
}

/// What one rank runs.
#[derive(Args, Clone)]
pub struct RankSettings {
    #[arg(long, value_delimiter = ',')]
    bytes: Vec<u64>,
}

const ALGORITHMS: [&str; 5] = ["ring", "doubling", "tree", "direct", "hierarchical"];
/// A small message between two of these hosts, with the wake of the receiver.
const LATENCY_US: u32 = 20;

/// Nanoseconds by (bytes, algorithm), one for each round.
type Times = BTreeMap<(u64, String), Vec<u64>>;

pub fn run(settings: &Settings) -> Verdict {
    if let Some(reason) = Network::missing() {
        println!("shaped: skipped, {reason}");
        return Ok(Count { passed: 0, skipped: 1 });
    }
    if settings.checksums {
        return checksums(settings);
    }
    let mut regrets: Vec<(f64, String)> = Vec::new();
    let mut gains = String::new();
    println!("| hosts | ranks | bytes | {} | chosen | regret |", ALGORITHMS.join(" | "));
    println!("|{}", " --- |".repeat(ALGORITHMS.len() + 5));
    for &hosts in &settings.hosts {
        for &per_host in &settings.per_host {
            let network = Network::new(hosts, Family::Both)?;
            network.shape(settings.mbits)?;
            let (times, chosen) = shape_of(settings, &network, hosts * per_host)?;
            for &bytes in &settings.bytes {
                let median = |name: &str| times.get(&(bytes, name.to_owned())).map(|all| median(all.clone()));
                let best = ALGORITHMS.iter().filter_map(|name| median(name)).min().ok_or("nothing fits")?;
                let choice = &chosen[&bytes];
                let took = median(choice).ok_or_else(|| format!("{choice} was chosen and not measured"))?;
                let regret = took as f64 / best as f64 - 1.0;
                regrets.push((regret, format!("{hosts} hosts x {per_host}, {bytes} bytes, {choice}")));
                let cells: Vec<String> =
                    ALGORITHMS.iter().map(|name| median(name).map_or("-".into(), microseconds)).collect();
                println!(
                    "| {hosts} | {} | {bytes} | {} | {choice} | {:.0} % |",
                    hosts * per_host,
                    cells.join(" | "),
                    regret * 100.0
                );
                if let (Some(flat), Some(hierarchical)) = (median("ring"), median("hierarchical")) {
                    let gain = flat as f64 / hierarchical as f64;
                    let crossing = |ranks: u32| 2.0 * f64::from(ranks - 1) / f64::from(ranks) * bytes as f64;
                    // A ring of all ranks crosses each host's link with so many more bytes, and cannot do better.
                    let bound = crossing(hosts * per_host) / crossing(hosts);
                    let limit_ns = crossing(hosts) * 8000.0 / f64::from(settings.mbits);
                    let _ = writeln!(
                        gains,
                        "hierarchical against a flat ring, {hosts} hosts x {per_host}, {bytes} bytes: {gain:.2} x (by bytes \
                         on the link at most {bound:.2} x); {:.0} % of the link's limit",
                        limit_ns / hierarchical as f64 * 100.0
                    );
                }
            }
        }
    }
    print!("{gains}");
    regrets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (middle, (worst, place)) = (regrets[regrets.len() / 2].0, regrets.last().ok_or("nothing measured")?);
    println!(
        "shaped: {} choices at {} Mbit/s: regret {:.0} % in the median, {:.0} % at worst ({place})",
        regrets.len(),
        settings.mbits,
        middle * 100.0,
        worst * 100.0
    );
    Ok(Count { passed: regrets.len() as u64, skipped: 0 })
}

/// All algorithms on one number of hosts and ranks, and what is chosen for each size.
fn shape_of(
    settings: &Settings,
    network: &Network,
    size: u32,
) -> Result<(Times, BTreeMap<u64, String>), String> {
    let mut times = Times::new();
    let mut chosen = BTreeMap::new();
    for round in 0..settings.rounds {
        for algorithm in ALGORITHMS.into_iter().chain((round == 0).then_some("auto")) {
            for (bytes, ns, used) in job(settings, network, size, algorithm, &[])? {
                if algorithm == "auto" {
                    chosen.insert(bytes, used);
                } else if used == algorithm {
                    times.entry((bytes, used)).or_default().push(ns);
                }
            }
        }
    }
    Ok((times, chosen))
}

/// One job: for each size what its slowest rank took in the median, and by which algorithm.
fn job(
    settings: &Settings,
    network: &Network,
    size: u32,
    algorithm: &str,
    knobs: &[(&'static str, String)],
) -> Result<Vec<(u64, u64, String)>, String> {
    let sizes: Vec<String> = settings.bytes.iter().map(u64::to_string).collect();
    let mut plan = Plan {
        args: vec!["shaped".into(), "--bytes".into(), sizes.join(",")],
        size,
        hosts: network.all().len() as u32,
        places: network.all(),
        knobs: vec![
            ("CAROLE_ALGORITHM", algorithm.to_owned()),
            ("CAROLE_NETWORK_GBITS", (settings.mbits / 1000).max(1).to_string()),
            ("CAROLE_NETWORK_LATENCY_US", LATENCY_US.to_string()),
            // A machine that is busy with many namespaces is not a peer that is dead.
            ("CAROLE_TIMEOUT_MS", "20000".to_owned()),
        ],
        limit: Duration::from_secs(300),
    };
    plan.knobs.extend(knobs.iter().cloned());
    let lines = plan.run()?;
    let mut found: Vec<(u64, u64, String)> = Vec::new();
    for line in lines.iter().flatten() {
        let [bytes, ns, used] = line.split(' ').collect::<Vec<_>>()[..] else {
            return Err(format!("a rank says '{line}'"));
        };
        let (bytes, ns) = (bytes.parse().map_err(|_| line.clone())?, ns.parse().map_err(|_| line.clone())?);
        match found.iter_mut().find(|row| row.0 == bytes) {
            Some(row) => row.1 = row.1.max(ns),
            None => found.push((bytes, ns, used.to_owned())),
        }
    }
    Ok(found)
}

/// One rank per host, two hosts, one ring over TCP: once as two hosts, with checksums, once as if they were one host,
/// without; in turn.
fn checksums(settings: &Settings) -> Verdict {
    let network = Network::new(2, Family::Both)?;
    network.shape(settings.mbits)?;
    let settings = Settings { bytes: vec![64 << 20], ..settings.clone() };
    let tcp = ("CAROLE_TRANSPORT", "tcp".to_owned());
    // The same windows on both, though prices differ between hosts and within one.
    let window = ("CAROLE_WINDOW_BYTES", (1 << 20).to_string());
    let with = [tcp.clone(), window.clone()];
    let without = [tcp, window, ("CAROLE_HOST_ID", "one".to_owned())];
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        on.push(job(&settings, &network, 2, "ring", &with)?[0].1);
        off.push(job(&settings, &network, 2, "ring", &without)?[0].1);
        println!(
            "round {round}: 64 MiB with checksums {}, without {}",
            microseconds(*on.last().expect("just pushed")),
            microseconds(*off.last().expect("just pushed"))
        );
    }
    let cost = median(on) as f64 / median(off) as f64 - 1.0;
    println!("shaped: at {} Mbit/s checksums cost {:.1} %", settings.mbits, cost * 100.0);
    Ok(Count { passed: 1, skipped: 0 })
}

fn median(mut list: Vec<u64>) -> u64 {
    list.sort_unstable();
    list[list.len() / 2]
}

fn microseconds(ns: u64) -> String {
    format!("{} us", ns / 1000)
}

pub fn rank(settings: &RankSettings) -> Result<(), String> {
    let fail = |error: carole::error::Error| error.to_string();
    runtime::init(&runtime::Options::default()).map_err(fail)?;
    for &bytes in &settings.bytes {
        let iterations = match bytes {
            0..=0x1_0000 => 30,
            0x1_0001..=0x10_0000 => 10,
            _ => 5,
        };
        let mut times = Vec::new();
        let mut input = vec![0u8; bytes as usize];
        for i in 0..iterations + 2 {
            call::barrier().map_err(fail)?;
            let start = Instant::now();
            let request = Request {
                name: Some("shaped"),
                collective: Collective::Allreduce,
                op: ReduceOp::Sum,
                ..Request::default()
            };
            let tensor = Tensor { dtype: DType::F32, shape: vec![bytes / 4], input, place: Target::InPlace };
            let outputs =
                Operation::submit(&request, vec![tensor]).map_err(fail)?.wait_in_place().map_err(fail)?;
            if i >= 2 {
                times.push(start.elapsed().as_nanos() as u64);
            }
            input = outputs.into_iter().next().expect("one tensor");
        }
        let used = runtime::last_algorithm().map_err(fail)?.unwrap_or("-");
        println!("{bytes} {} {used}", median(times));
    }
    call::barrier().map_err(fail)?;
    runtime::shutdown().map_err(fail)
}
