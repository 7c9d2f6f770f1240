//! What fails while a job runs, and what is left when something is killed.
#![forbid(unsafe_code)]

use super::site::{PATIENCE, Running, Site, program, start};
use super::{Scene, Settings, size_of};
use crate::hosts::network::{Family, output};
use std::time::{Duration, Instant};

pub const SCENES: [(&str, Scene); 6] = [
    ("a host dies", host_dies),
    ("a cable is pulled", cable_pulled),
    ("a rank on another host fails", rank_fails),
    ("signals reach every host", signals),
    ("whatever is killed, nothing is left", kills),
    ("a launcher that is suspended for a while", suspended),
];

/// Ranks that train for ever, as far as a test can see.
fn endless(settings: &Settings, site: &Site) -> Result<Running, String> {
    let (size, list) = (size_of(settings, site).to_string(), site.list(settings.per_host));
    let own = program("ci")?.display().to_string();
    let script = format!("echo running; exec {own} rank train --steps 1000000000");
    let mut command = site.carolerun(&["-np", &size, "-H", &list, "sh", "-c", &script])?;
    command.env("CAROLE_TIMEOUT_MS", "3000");
    let mut running = start(command)?;
    for _ in 0..size_of(settings, site) {
        running.wait_for("running")?;
    }
    Ok(running)
}

/// A job whose last host fails: the launcher names it, and ends the others.
fn lose_a_host(
    settings: &Settings,
    strike: impl FnOnce(&mut Site) -> Result<(), String>,
    words: &[&str],
) -> Result<(), String> {
    let mut site = Site::new(3, Family::Both, None)?;
    let running = endless(settings, &site)?;
    std::thread::sleep(Duration::from_millis(500));
    let struck = Instant::now();
    strike(&mut site)?;
    let ended = running.finish(PATIENCE)?;
    let seconds = struck.elapsed().as_secs_f64();
    if ended.code == 0 || !words.iter().all(|word| ended.errors.contains(word)) {
        return Err(format!("code {}, and not the words {words:?}: {}", ended.code, ended.errors.trim()));
    }
    println!("ssh: the job ended {seconds:.1} s after its host");
    // An agent that is cut off ends its ranks when it has heard nothing for a minute.
    site.nothing_left(Duration::from_secs(90))
}

fn host_dies(settings: &Settings) -> Result<(), String> {
    lose_a_host(settings, |site| site.kill_host(2), &["host '10.77.2.2' is lost"])
}

fn cable_pulled(settings: &Settings) -> Result<(), String> {
    lose_a_host(settings, |site| site.network.unplug(2), &["host '10.77.2.2'"])
}

fn rank_fails(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    let last = size_of(settings, &site) - 1;
    let script = format!("if [ $CAROLE_RANK = {last} ]; then echo it is full >&2; exit 7; fi; sleep 600");
    let ended = site.run(&["-np", &size, "-H", &list, "sh", "-c", &script])?;
    let named = format!("rank {last} (host '10.77.1.2') failed first: it exited with code 7");
    ended.refused(7, &[&named, "it is full"], 30)?;
    let script = format!("if [ $CAROLE_RANK = {last} ]; then kill -SEGV $$; fi; sleep 600");
    site.run(&["-np", &size, "-H", &list, "sh", "-c", &script])?.refused(139, &["SIGSEGV"], 30)
}

fn signals(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    let script = "trap 'echo got USR1' USR1; trap 'echo got TERM; exit 3' TERM; echo running; \
                  while :; do sleep 0.05; done";
    let mut running = start(site.carolerun(&["-np", &size, "-H", &list, "sh", "-c", script])?)?;
    let all = |running: &mut Running, words: &str| {
        (0..size_of(settings, &site)).try_for_each(|_| running.wait_for(words))
    };
    all(&mut running, "running")?;
    output("kill", &["-USR1", &running.pid().to_string()])?;
    all(&mut running, "got USR1")?;
    output("kill", &["-TERM", &running.pid().to_string()])?;
    all(&mut running, "got TERM")?;
    running.finish(PATIENCE)?.refused(3, &["SIGTERM"], 60)?;
    site.nothing_left(Duration::from_secs(10))
}

/// The launcher, its guard, an ssh client, an agent, an agent's guard, in turn.
fn kills(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let victims = ["launcher", "carole-guard", "ssh", "agent", "agent's guard", "sshd"];
    for turn in 0..settings.kills {
        let victim = victims[turn as usize % victims.len()];
        let running = endless(settings, &site)?;
        let pid = find(&site, running.pid(), victim)?;
        output("kill", &["-KILL", &pid.to_string()])?;
        let ended = running.finish(PATIENCE)?;
        if ended.code == 0 {
            return Err(format!("turn {turn}: the {victim} was killed, and the launcher ended with 0"));
        }
        site.nothing_left(Duration::from_secs(20))
            .map_err(|words| format!("turn {turn}, {victim}: {words}"))?;
    }
    println!("ssh: {} jobs were started and something of each killed; nothing was left", settings.kills);
    Ok(())
}

/// A process of a job, by what it is.
pub fn find(site: &Site, launcher: i32, victim: &str) -> Result<i32, String> {
    let parent = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let (_, rest) = stat.rsplit_once(')').unwrap_or_default();
        rest.split_whitespace().nth(1).and_then(|pid| pid.parse::<i32>().ok()).unwrap_or(0)
    };
    let name = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let found = site.of_jobs()?.into_iter().find(|(pid, line)| match victim {
        "launcher" => *pid == launcher,
        "carole-guard" => name(*pid).trim() == "carole-guard" && parent(*pid) == launcher,
        "ssh" => name(*pid).trim() == "ssh" && parent(*pid) == launcher,
        "agent" => line.ends_with(" --agent") && name(*pid).trim() == "carolerun",
        "agent's guard" => name(*pid).trim() == "carole-guard" && parent(*pid) != launcher,
        _ => line.starts_with("sshd:"),
    });
    found.map(|(pid, _)| pid).ok_or_else(|| format!("there is no {victim}: {:?}", site.of_jobs()))
}

fn suspended(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let (size, list) = (size_of(settings, &site).to_string(), site.list(settings.per_host));
    let script = "echo running; sleep 8; echo done";
    let mut running = start(site.carolerun(&["-np", &size, "-H", &list, "sh", "-c", script])?)?;
    running.wait_for("running")?;
    let pid = running.pid().to_string();
    output("kill", &["-STOP", &pid])?;
    std::thread::sleep(Duration::from_secs(6));
    output("kill", &["-CONT", &pid])?;
    running.finish(PATIENCE)?.well()?;
    site.nothing_left(Duration::from_secs(10))
}
