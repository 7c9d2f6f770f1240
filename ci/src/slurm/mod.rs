//! Ranks under a real Slurm: started by `srun` and by `carolerun --slurm`, in allocations and batch jobs, on one node
//! and on two; ranks that fail, and what a user gets wrong.
#![forbid(unsafe_code)]

mod cluster;

use crate::ssh::{Ended, program};
use crate::{Count, Verdict, matrix};
use clap::Args;
use cluster::{CPUS, Cluster, NODES};
use std::time::Duration;

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Only the scenes whose names have these words.
    #[arg(long)]
    scene: Option<String>,
}

type Scene = fn(&Cluster) -> Result<u64, String>;

const SCENES: [(&str, Scene); 14] = [
    ("srun on one node", on_one_node),
    ("srun on two nodes", on_two_nodes),
    ("srun with PMI, and no home", over_pmi),
    ("carolerun --slurm", by_carolerun),
    ("in an allocation", in_an_allocation),
    ("two steps at once", two_steps),
    ("in a batch job", in_a_batch_job),
    ("a rank that fails before it has joined", fails_early),
    ("a rank that is killed", is_killed),
    ("a launcher that is told to end", is_ended),
    ("a job that is cancelled", is_cancelled),
    ("more ranks than there are processors", too_many),
    ("homes that are not shared", other_homes),
    ("no Slurm, and hosts that are Slurm's to choose", wrong_place),
];

/// What is over within this time did not wait for a limit.
const SOON_S: u64 = 10;

pub fn run(settings: &Settings) -> Verdict {
    if let Some(reason) = Cluster::missing() {
        println!("slurm: skipped: {reason}");
        return Ok(Count { passed: 0, skipped: 1 });
    }
    let cluster = match Cluster::new() {
        Ok(cluster) => cluster,
        Err(words) if words.starts_with("skipped") => {
            println!("slurm: {words}");
            return Ok(Count { passed: 0, skipped: 1 });
        }
        Err(words) => return Err(words),
    };
    let mut count = Count::default();
    let wanted = |name: &str| settings.scene.as_ref().is_none_or(|words| name.contains(words));
    for (name, scene) in SCENES.iter().filter(|(name, _)| wanted(name)) {
        let began = std::time::Instant::now();
        let told = |words: String| format!("{name}: {words}; again: ci slurm --scene '{name}'");
        count.passed += scene(&cluster).map_err(told)?;
        cluster.nothing_left(Duration::from_secs(SOON_S)).map_err(told)?;
        println!("{name}: as it should be ({:.1} s)", began.elapsed().as_secs_f64());
    }
    println!("slurm: {} results on all ranks and scenes, none wrong", count.passed);
    Ok(count)
}

/// `ci rank` with these words, for a shell.
fn rank(words: &str) -> Result<String, String> {
    Ok(format!("{} rank {words}", program("ci")?.display()))
}

/// What each rank wrote to standard output, under `srun --label`.
fn labelled(ended: &Ended, size: u32) -> Vec<Vec<String>> {
    let mut lines = vec![Vec::new(); size as usize];
    for line in ended.lines.values().flatten() {
        let parts = line.split_once(": ");
        let rank = parts.and_then(|(rank, text)| Some((rank.trim().parse::<usize>().ok()?, text)));
        if let Some((rank, text)) = rank.filter(|(rank, _)| *rank < lines.len()) {
            lines[rank].push(text.to_owned());
        }
    }
    lines
}

/// Runs a turn of the matrix behind these words, which label what ranks print, and judges it.
fn right(cluster: &Cluster, before: &[&str], size: u32, turn: u64, set: &str) -> Result<u64, String> {
    let script = format!("{set} exec {}", rank(&format!("matrix --seed 1 --turn {turn}"))?);
    let ended = cluster.run(&[before, &["sh", "-c", &script]].concat())?.well()?;
    if ended.errors.contains("warning") {
        return Err(ended.errors);
    }
    matrix::judge(&matrix::cases(size, 1, turn, false), &labelled(&ended, size))
}

/// So many ranks must have said that they have trained in a job of so many.
fn trained(ended: Ended, size: u32, ranks: usize) -> Result<Ended, String> {
    let ended = ended.well()?;
    let words = format!("trained {size} ");
    let all: Vec<&String> = ended.lines.values().flatten().filter(|line| line.contains(&words)).collect();
    match all.len() == ranks && all.windows(2).all(|pair| pair[0].ends_with(tail(pair[1]))) {
        true => Ok(ended),
        false => Err(format!(
            "not {ranks} ranks of {size} have trained alike: {:?}; {}",
            ended.lines, ended.errors
        )),
    }
}

fn tail(line: &str) -> &str {
    line.rsplit(' ').next().unwrap_or_default()
}

fn on_one_node(cluster: &Cluster) -> Result<u64, String> {
    let one = right(cluster, &["srun", "-n", "4", "--label"], 4, 0, "")?;
    Ok(one + right(cluster, &["srun", "-n", "1", "--label"], 1, 1, "")?)
}

/// The nodes are one machine, so what tells hosts apart is said.
const APART: &str = "CAROLE_HOST_ID=$SLURMD_NODENAME";

/// The ranks meet in a directory below the user's home, where rank 0 leaves a new secret.
fn on_two_nodes(cluster: &Cluster) -> Result<u64, String> {
    let even = ["srun", "-N", "2", "-n", "4", "--ntasks-per-node=2", "--label"];
    let uneven = ["srun", "-N", "2", "-n", "3", "--label"];
    let cyclic = ["srun", "-N", "2", "-n", "4", "--distribution=cyclic", "--label"];
    let mut passed = 0;
    for (turn, (before, size)) in [(&even[..], 4), (&uneven, 3), (&cyclic, 4)].into_iter().enumerate() {
        passed += right(cluster, before, size, turn as u64, APART)?;
    }
    Ok(passed)
}

/// Without a home that all nodes share, the ranks meet through srun's key-value space.
fn over_pmi(cluster: &Cluster) -> Result<u64, String> {
    let before = ["srun", "--mpi=pmi2", "-N", "2", "-n", "4", "--ntasks-per-node=2", "--label"];
    let two = right(cluster, &before, 4, 3, &format!("unset HOME; {APART}"))?;
    Ok(two + right(cluster, &["srun", "--mpi=pmi2", "-N", "1", "-n", "4", "--label"], 4, 4, "unset HOME;")?)
}

fn by_carolerun(cluster: &Cluster) -> Result<u64, String> {
    let one = ["carolerun", "--slurm", "-np", "4", "--mpi-args=--label"];
    let passed = right(cluster, &one, 4, 5, "")?;
    let two = [
        "carolerun",
        "--slurm",
        "-np",
        "4",
        "--algorithm",
        "ring",
        "--mpi-args=--label -N 2 --ntasks-per-node=2",
    ];
    let passed = passed + right(cluster, &two, 4, 6, APART)?;
    // Flags of knobs reach the ranks.
    let script = "echo $CAROLE_ALGORITHM $SLURM_PROCID";
    let ended = cluster
        .run(&["carolerun", "--slurm", "-np", "2", "--algorithm", "tree", "sh", "-c", script])?
        .well()?;
    let mut said: Vec<&String> = ended.lines.values().flatten().collect();
    said.sort();
    match said == ["tree 0", "tree 1"] {
        true => Ok(passed + 1),
        false => Err(format!("the ranks say {said:?}")),
    }
}

fn in_an_allocation(cluster: &Cluster) -> Result<u64, String> {
    let own = program("ci")?.display().to_string();
    let launcher = program("carolerun")?.display().to_string();
    let (own, launcher) = (own.as_str(), launcher.as_str());
    let task = [own, "rank", "train"];
    let within = |words: &[&str]| cluster.run(&[&["salloc", "-n", "4"], words, &task].concat());
    trained(within(&["srun"])?, 4, 4)?;
    trained(within(&[launcher, "--slurm", "-np", "4"])?, 4, 4)?;
    trained(within(&[launcher, "--slurm", "-np", "3"])?, 3, 3)?;
    // Carole's own launcher, and a program that is no task of a step, and so alone.
    trained(within(&[launcher, "-np", "4"])?, 4, 4)?;
    trained(within(&[])?, 1, 1)?;
    Ok(5)
}

/// Steps of one allocation on one node are jobs of their own.
fn two_steps(cluster: &Cluster) -> Result<u64, String> {
    let task = rank("train")?;
    let step = format!("srun --exact -n 2 {task} &");
    trained(cluster.run(&["salloc", "-n", "4", "sh", "-c", &format!("{step} {step} wait")])?, 2, 4)?;
    Ok(1)
}

fn in_a_batch_job(cluster: &Cluster) -> Result<u64, String> {
    let (task, launcher) = (rank("train")?, program("carolerun")?);
    let launcher = launcher.display();
    let script = format!(
        "#!/bin/sh\n#SBATCH --ntasks=4\n{task}\nsrun {task}\n{launcher} --slurm -np 2 {task}\n{launcher} -np 3 {task}\n"
    );
    let (file, out) = (cluster.write("batch.sh", &script)?, cluster.path("batch.out"));
    cluster.run(&["sbatch", "--wait", "--output", &out, &file])?.well()?;
    let text = std::fs::read_to_string(&out).map_err(|e| format!("{out}: {e}"))?;
    let of = |size: u32| text.lines().filter(|line| line.contains(&format!("trained {size} "))).count();
    match [of(1), of(4), of(2), of(3)] == [1, 4, 2, 3] {
        true => Ok(1),
        false => Err(text),
    }
}

/// Ranks that train for ever, as far as a test can see; a shell does something before.
fn endless(before: &str) -> Result<String, String> {
    Ok(format!("{before} exec {}", rank("train --steps 1000000000")?))
}

/// It must have failed soon, with these words on either output.
fn failed(ended: &Ended, words: &[&str]) -> Result<u64, String> {
    let said: Vec<&str> = ended.lines.values().flatten().map(String::as_str).collect();
    let said = format!("{}\n{}", said.join("\n"), ended.errors);
    let missing: Vec<&&str> = words.iter().filter(|word| !said.contains(**word)).collect();
    match ended.code != 0 && missing.is_empty() && ended.took < Duration::from_secs(SOON_S) {
        true => Ok(1),
        false => Err(format!("code {} after {:?}, without {missing:?}: {said}", ended.code, ended.took)),
    }
}

/// The others wait for it in vain; they are ended, and srun tells who failed and how.
fn fails_early(cluster: &Cluster) -> Result<u64, String> {
    let script = endless("[ $SLURM_PROCID = 2 ] && exit 7;")?;
    let ended = cluster.run(&["carolerun", "--slurm", "-np", "4", "sh", "-c", &script])?;
    failed(&ended, &["task 2: Exited with exit code 7"])
}

fn is_killed(cluster: &Cluster) -> Result<u64, String> {
    let script = endless("[ $SLURM_PROCID = 2 ] && (sleep 0.5; kill -KILL $$) &")?;
    let mut passed = 0;
    for before in [&["carolerun", "--slurm", "-np", "4"][..], &["srun", "-n", "4"]] {
        let ended = cluster.run(&[before, &["sh", "-c", &script]].concat())?;
        passed += failed(&ended, &["rank 2 has ended", "task 2: Killed"])?;
        if ended.code != 137 {
            return Err(format!("the code is {}, not 137", ended.code));
        }
    }
    Ok(passed)
}

fn is_ended(cluster: &Cluster) -> Result<u64, String> {
    let mut running = cluster.start(&["carolerun", "--slurm", "-np", "4", "sh", "-c", &endless("")?])?;
    (0..4).try_for_each(|_| running.wait_for("all have joined"))?;
    crate::hosts::network::output("kill", &["-TERM", &running.pid().to_string()])?;
    failed(&running.finish(Duration::from_secs(30))?, &[])
}

fn is_cancelled(cluster: &Cluster) -> Result<u64, String> {
    let script = endless(&format!("export {APART};"))?;
    let mut running = cluster.start(&["srun", "-J", "doomed", "-N", "2", "-n", "4", "sh", "-c", &script])?;
    (0..4).try_for_each(|_| running.wait_for("all have joined"))?;
    cluster.run(&["scancel", "--name", "doomed"])?.well()?;
    failed(&running.finish(Duration::from_secs(30))?, &[])
}

/// Slurm refuses, in an allocation and without one, where it does not rather let the job wait (`EnforcePartLimits`).
fn too_many(cluster: &Cluster) -> Result<u64, String> {
    let task = rank("train")?;
    let launcher = program("carolerun")?.display().to_string();
    let more = (NODES * CPUS + 1).to_string();
    let words = ["srun: error", "More processors requested than permitted"];
    let alone = cluster.run(&["carolerun", "--slurm", "-np", &more, "sh", "-c", &task])?;
    let within = cluster.run(&["salloc", "-n", "4", &launcher, "--slurm", "-np", "5", "sh", "-c", &task])?;
    Ok(failed(&alone, &words)? + failed(&within, &words)?)
}

fn other_homes(cluster: &Cluster) -> Result<u64, String> {
    let before = ["srun", "-N", "2", "-n", "2", "sh", "-c"];
    let task = rank("train")?;
    let apart = format!(
        "export {APART} HOME={}$SLURM_NODEID CAROLE_START_TIMEOUT_S=2; mkdir -p $HOME; exec {task}",
        cluster.path("home")
    );
    let words = ["rank 0 has not written it", "a file system that all of them see", "CAROLE_SECRET_FILE"];
    let passed = failed(&cluster.run(&[&before[..], &[&apart]].concat())?, &words)?;
    let none = format!("unset HOME; {APART} exec {task}");
    let ended = cluster.run(&[&before[..], &[&none]].concat())?;
    Ok(passed + failed(&ended, &["the 2 ranks (Slurm) are on several hosts", "CAROLE_RENDEZVOUS"])?)
}

fn wrong_place(cluster: &Cluster) -> Result<u64, String> {
    let mut command = cluster.command(&["carolerun", "--slurm", "-np", "2", "true"])?;
    command.env("PATH", cluster.path("home"));
    let ended = crate::ssh::start(command)?.finish(Duration::from_secs(30))?;
    let passed = failed(&ended, &["no program srun in PATH", "leave --slurm out"])?;
    let ended = cluster.run(&["carolerun", "--slurm", "-np", "2", "-H", "a:2", "true"])?;
    let passed = passed + failed(&ended, &["leave -H and --hostfile out"])?;
    let ended = cluster.run(&["carolerun", "--slurm", "true"])?;
    Ok(passed + failed(&ended, &["-np N is missing"])?)
}
