//! `carolerun` over ssh: hosts that are namespaces with an sshd each. Jobs that succeed, hosts that fail, everything
//! that a user can get wrong, and what is left when something is killed: nothing.
#![forbid(unsafe_code)]

mod elastic;
mod failures;
mod refusals;
mod site;

use crate::hosts::network::Family;
use crate::{Count, Verdict, matrix};
use clap::Args;
use site::Site;
pub use site::{Ended, PATIENCE, Running, program, start};
use std::sync::{Mutex, PoisonError};

/// What to run.
#[derive(Args, Clone)]
pub struct Settings {
    /// Numbers of hosts of the jobs whose results are checked.
    #[arg(long, value_delimiter = ',', default_values_t = [2])]
    hosts: Vec<u32>,
    /// Ranks on each.
    #[arg(long, default_value_t = 2)]
    per_host: u32,
    /// Cycles of starting a job and killing something of it.
    #[arg(long, default_value_t = 6)]
    kills: u32,
    /// Only the scenes whose names have these words, and no results.
    #[arg(long)]
    scene: Option<String>,
}

type Scene = fn(&Settings) -> Result<(), String>;

const SCENES_AT_ONCE: usize = 3;

const SCENES: [(&str, Scene); 8] = [
    ("IPv6 alone", ipv6_alone),
    ("an address that names another machine", decoys),
    ("a preflight", preflight),
    ("containers of one host", containers),
    ("several networks", several_networks),
    ("the hostfile of a job system", hostfile),
    ("the secret is nowhere to be read", secrecy),
    ("output in files, with times", output_files),
];

pub fn run(settings: &Settings) -> Verdict {
    if let Some(reason) = Site::missing() {
        println!("ssh: skipped, {reason}");
        return Ok(Count { passed: 0, skipped: 1 });
    }
    let mut count = Count::default();
    for &hosts in settings.hosts.iter().filter(|_| settings.scene.is_none()) {
        let site = Site::new(hosts, Family::Both, None)?;
        count.passed += results(settings, &site)?;
        println!("ssh: {hosts} hosts of {} ranks: results and training are right", settings.per_host);
    }
    let scenes = SCENES.into_iter().chain(refusals::SCENES).chain(failures::SCENES).chain(elastic::SCENES);
    let wanted = |name: &str| settings.scene.as_ref().is_none_or(|words| name.contains(words));
    let played = play(scenes.filter(|(name, _)| wanted(name)).collect(), settings)?;
    Ok(Count { passed: count.passed + played.passed, skipped: count.skipped + played.skipped })
}

/// Plays scenes, several at a time: each has hosts of its own, and mostly waits.
fn play(scenes: Vec<(&'static str, Scene)>, settings: &Settings) -> Verdict {
    let rest = Mutex::new((scenes.into_iter(), Ok(Count::default())));
    let lock = || rest.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || {
        let (scenes, verdict) = &mut *lock();
        scenes.next().filter(|_| verdict.is_ok())
    };
    let note = |name: &str, outcome: Result<(), String>| {
        let (_, verdict) = &mut *lock();
        let Ok(count) = verdict else { return };
        match outcome {
            Ok(()) => {
                println!("ssh: {name}: as it should be");
                count.passed += 1;
            }
            Err(words) if words.starts_with("skipped") => {
                println!("ssh: {name}: {words}");
                count.skipped += 1;
            }
            Err(words) => *verdict = Err(format!("{name}: {words}")),
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..SCENES_AT_ONCE {
            scope.spawn(|| {
                while let Some((name, scene)) = next() {
                    note(name, scene(settings));
                }
            });
        }
    });
    rest.into_inner().unwrap_or_else(PoisonError::into_inner).1
}

/// A job of `ci rank` on all hosts.
fn ranks(settings: &Settings, site: &Site, before: &[&str], task: &[&str]) -> Result<Ended, String> {
    let (size, list) = (size_of(settings, site).to_string(), site.list(settings.per_host));
    let own = site::program("ci")?.display().to_string();
    let mut arguments = vec!["-np", &size, "-H", &list];
    arguments.extend(before);
    arguments.extend([own.as_str(), "rank"]);
    arguments.extend(task);
    site.run(&arguments)?.well()
}

fn size_of(settings: &Settings, site: &Site) -> u32 {
    settings.per_host * site.network.all().len() as u32
}

/// The cases of a turn of the matrix, and a training.
fn results(settings: &Settings, site: &Site) -> Result<u64, String> {
    let size = size_of(settings, site);
    let mut passed = 0;
    for (turn, algorithm) in ["auto", "hierarchical"].into_iter().enumerate() {
        let turn_text = turn.to_string();
        let ended = ranks(
            settings,
            site,
            &["--algorithm", algorithm],
            &["matrix", "--seed", "1", "--turn", &turn_text],
        )?;
        let lines: Vec<Vec<String>> =
            (0..size as usize).map(|rank| ended.lines.get(&rank).cloned().unwrap_or_default()).collect();
        passed += matrix::judge(&matrix::cases(size, 1, turn as u64, false), &lines)
            .map_err(|words| format!("{size} ranks, {algorithm}: {words}"))?;
    }
    train(settings, site, &[])?;
    Ok(passed + 1)
}

/// A training; all ranks must end with the same weights.
fn train(settings: &Settings, site: &Site, before: &[&str]) -> Result<Ended, String> {
    let ended = ranks(settings, site, before, &["train"])?;
    let last: Vec<&String> = ended.lines.values().filter_map(|lines| lines.last()).collect();
    let alike = last.windows(2).all(|pair| pair[0] == pair[1]);
    if last.len() != size_of(settings, site) as usize || !alike || !last[0].starts_with("trained") {
        return Err(format!("the ranks end with {last:?}; {}", ended.errors.trim()));
    }
    Ok(ended)
}

fn ipv6_alone(settings: &Settings) -> Result<(), String> {
    train(settings, &Site::new(2, Family::V6, None)?, &[]).map(drop)
}

fn decoys(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    site.network.add_decoys()?;
    train(settings, &site, &[]).map(drop)
}

fn preflight(settings: &Settings) -> Result<(), String> {
    let site = Site::new(3, Family::Both, None)?;
    let list = site.list(settings.per_host);
    let ended = site.run(&["doctor", "-H", &list])?.well()?;
    let out = ended.lines.get(&usize::MAX).cloned().unwrap_or_default().join("\n");
    let pairs = out.lines().filter(|line| line.contains(" -> ") && line.contains("Gbit/s")).count();
    if pairs != 6 || !out.contains("verdict: the 3 hosts can work together") {
        return Err(format!("{pairs} pairs were measured: {out}"));
    }
    site.network.drop_packets(1, 2)?;
    let ended = site.run(&["doctor", "-H", &list])?;
    let out = ended.lines.get(&usize::MAX).cloned().unwrap_or_default().join("\n");
    let words = ["PROBLEM", "10.77.1.2", "10.77.2.2", "verdict: a job would fail"];
    match ended.code == 1 && words.iter().all(|word| out.contains(word)) {
        true => Ok(()),
        false => Err(format!("it ended with {}: {out} {}", ended.code, ended.errors)),
    }
}

/// Ranks of one host in containers: with mounts, processes and IPC of their own they still share memory, because nothing
/// of it is named; with a network of their own they are another host.
fn containers(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let own = site::program("ci")?.display().to_string();
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    let contained = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c"];
    for (transport, before) in [("auto", ""), ("shm", "mount -t tmpfs none /dev/shm && ")] {
        let script = format!("{before}exec {own} rank train");
        let mut arguments = vec!["-np", &size, "-H", &list];
        if transport == "shm" {
            // Where one rank of the job is alone on its host, shared memory is no choice.
            arguments = vec!["-np", "2", "-H", "localhost:2", "--transport", "shm"];
        }
        arguments.extend(contained);
        arguments.push(&script);
        let ended = site.run(&arguments)?.well()?;
        let done =
            ended.lines.values().filter(|lines| lines.iter().any(|l| l.starts_with("trained"))).count();
        if done != ended.lines.len() || done == 0 {
            return Err(format!("{transport}: {done} ranks have trained: {}", ended.errors.trim()));
        }
    }
    // Told that they share memory, though they cannot: they find out, and go by TCP.
    let script = format!("CAROLE_HOST_ID=one exec {own} rank train");
    let ended = site.run(&["-np", &size, "-H", &list, "sh", "-c", &script])?.well()?;
    match ended.lines.values().filter(|lines| lines.iter().any(|l| l.starts_with("trained"))).count() {
        n if n == size_of(settings, &site) as usize => Ok(()),
        n => Err(format!("{n} ranks have trained: {}", ended.errors.trim())),
    }
}

/// Two networks between the same hosts: both are told, one can be chosen by its interface or its address, and one that
/// carries nothing is left out by the probes.
fn several_networks(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    site.network.add_second_interfaces()?;
    train(settings, &site, &[])?;
    for choice in ["eth1", "eth0", "eth0,eth1"] {
        train(settings, &site, &["--network-interfaces", choice])?;
    }
    // Both carry payload when both are named.
    let sent = |interface: &str| -> Result<u64, String> {
        let file = format!("/sys/class/net/{interface}/statistics/tx_bytes");
        let text =
            crate::hosts::network::output("ip", &["netns", "exec", &site.network.host(0), "cat", &file])?;
        text.trim().parse().map_err(|_| text)
    };
    let before = [sent("eth0")?, sent("eth1")?];
    ranks(settings, &site, &["--network-interfaces", "eth0,eth1"], &["shaped", "--bytes", "8388608"])?;
    let (first, second) = (sent("eth0")? - before[0], sent("eth1")? - before[1]);
    println!("ssh: lanes over two networks: {} MiB and {} MiB", first >> 20, second >> 20);
    if first.min(second) * 4 < first.max(second) {
        return Err(format!("eth0 carried {first} bytes and eth1 {second}"));
    }
    let size = size_of(settings, &site).to_string();
    let list = site.list(settings.per_host);
    site.network.add_dead_end(0, "10.99.0.1")?;
    let script = "echo $CAROLE_RANK $CAROLE_INTERFACES";
    let ended = site.run(&["-np", &size, "-H", &list, "sh", "-c", script])?.well()?;
    let told = ended.lines.get(&0).cloned().unwrap_or_default().join("");
    match told.contains("10.77.0.2") && !told.contains("10.99.0.1") {
        true => Ok(()),
        false => Err(format!("rank 0 is told '{told}', and 10.99.0.1 leads nowhere")),
    }
}

/// The hostfile that Kubeflow's MPIJob makes counts where no flag does.
fn hostfile(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    site.write("hosts", &format!("# of the job\nnode0 slots={0}\nnode1:{0}\n", settings.per_host))?;
    let size = size_of(settings, &site).to_string();
    let script = "echo $CAROLE_RANK $CAROLE_LOCAL_RANK $HOROVOD_HOSTNAME $(hostname)";
    let mut command = site.carolerun(&["-np", &size, "sh", "-c", script])?;
    command.env("OMPI_MCA_orte_default_hostfile", site.path("hosts"));
    let ended = site::start(command)?.finish(site::PATIENCE)?.well()?;
    for rank in 0..size_of(settings, &site) {
        let (host, local) = (rank / settings.per_host, rank % settings.per_host);
        let expected = format!("{rank} {local} node{host} node{host}");
        let said = ended.lines.get(&(rank as usize)).map_or("", |lines| lines[0].as_str());
        if said != expected {
            return Err(format!("rank {rank} says '{said}', not '{expected}'"));
        }
    }
    Ok(())
}

/// While a job runs, its secret is in no argument and no environment of any process.
fn secrecy(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    let script = "cat /proc/self/fd/$CAROLE_SECRET_FD; echo; echo ready; sleep 600";
    let secrets = site.path("secrets");
    let keep = format!("cat /proc/self/fd/$CAROLE_SECRET_FD >> {secrets}.$CAROLE_RANK; {script}");
    let mut running = site::start(site.carolerun(&["-np", &size, "-H", &list, "sh", "-c", &keep])?)?;
    (0..size_of(settings, &site)).try_for_each(|_| running.wait_for("ready"))?;
    let secret = std::fs::read_to_string(format!("{secrets}.0")).map_err(|e| e.to_string())?;
    let mut seen = 0;
    for pid in site.of_jobs()?.into_keys().chain([running.pid()]) {
        for file in ["cmdline", "environ"] {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            seen += usize::from(!text.is_empty());
            if String::from_utf8_lossy(&text).contains(secret.trim()) {
                return Err(format!("the secret stands in /proc/{pid}/{file}"));
            }
        }
    }
    crate::hosts::network::output("kill", &["-TERM", &running.pid().to_string()])?;
    let ended = running.finish(site::PATIENCE)?;
    site.nothing_left(std::time::Duration::from_secs(10))?;
    match (secret.trim().len(), seen > 8, ended.code) {
        (64, true, 143) => Ok(()),
        what => Err(format!("secret, files seen, code: {what:?}: {}", ended.errors.trim())),
    }
}

fn output_files(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let (size, list, folder) =
        (size_of(settings, &site).to_string(), site.list(settings.per_host), site.path("out"));
    let script = "seq 1 20000; echo err >&2; printf end";
    let ended = site
        .run(&[
            "-np",
            &size,
            "-H",
            &list,
            "--output-filename",
            &folder,
            "-prefix-timestamp",
            "sh",
            "-c",
            script,
        ])?
        .well()?;
    for rank in 0..size_of(settings, &site) {
        let read = |name: &str| {
            std::fs::read_to_string(format!("{folder}/rank.{rank}/{name}")).map_err(|e| e.to_string())
        };
        let (out, err) = (read("stdout")?, read("stderr")?);
        if out.lines().count() != 20_001 || !out.ends_with("\n20000\nend") || err != "err\n" {
            return Err(format!("rank {rank} has {} lines in its file, and '{err}'", out.lines().count()));
        }
    }
    let all = ended.lines.get(&usize::MAX).map_or(0, Vec::len);
    let stamped = ended.lines.get(&usize::MAX).is_some_and(|lines| lines.iter().all(|l| l.starts_with("20")));
    match all == 20_001 * size_of(settings, &site) as usize && stamped {
        true => Ok(()),
        false => Err(format!("{all} lines came, with times: {stamped}")),
    }
}
