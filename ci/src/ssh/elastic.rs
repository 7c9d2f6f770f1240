//! Elastic jobs on several hosts: they grow, shrink, lose hosts and get them back, and what they have computed in the
//! end is what one process alone would have.
#![forbid(unsafe_code)]

use super::failures::find;
use super::site::{PATIENCE, Site, program};
use super::{Scene, Settings};
use crate::elastic::expected;
use crate::hosts::network::{Family, output};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

pub const SCENES: [(&str, Scene); 6] = [
    ("elastic: hosts come and go", come_and_go),
    ("elastic: a cable is pulled and put in again", cable),
    ("elastic: a host that dies is not missed", host_dies),
    ("elastic: hosts that cannot be used", unusable),
    ("elastic: the secret is nowhere to be read", secrecy),
    ("elastic: whatever is killed, nothing is left", kills),
];

/// An elastic job that runs, and what it has written.
struct Job {
    child: Child,
    lines: Receiver<String>,
    /// All of it, for messages.
    said: Vec<String>,
    end: std::path::PathBuf,
}

impl Job {
    /// Starts one with the hosts of the site's file `hosts`, or with those that the flags name.
    fn start(site: &Site, flags: &[&str]) -> Result<Job, String> {
        let own = program("ci")?.display().to_string();
        let end = site.directory.path().join("end");
        // Another job of this site may have ended by it.
        let _ = std::fs::remove_file(&end);
        let end_text = end.display().to_string();
        let mut command =
            site.carolerun(&[flags, &[&own, "rank", "elastic", "--end", &end_text]].concat())?;
        command.env("CAROLE_TIMEOUT_MS", "3000");
        let mut child = command.spawn().map_err(|e| format!("carolerun does not start: {e}"))?;
        let (tell, lines) = channel();
        let read = |from: Box<dyn std::io::Read + Send>, tell: Sender<String>| {
            std::thread::spawn(move || {
                let lines = BufReader::new(from).lines().map_while(Result::ok);
                lines.for_each(|line| drop(tell.send(line)));
            })
        };
        read(Box::new(child.stdout.take().expect("piped")), tell.clone());
        read(Box::new(child.stderr.take().expect("piped")), tell);
        Ok(Job { child, lines, said: Vec::new(), end })
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line, within the time.
    fn line(&mut self, until: Instant) -> Result<String, String> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.said.push(line.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err("nothing more came in time".to_owned()),
            Err(RecvTimeoutError::Disconnected) => Err("the job ended".to_owned()),
        }
    }

    /// Waits for a line with all these words.
    fn says(&mut self, words: &[&str]) -> Result<(), String> {
        let until = Instant::now() + PATIENCE / 2;
        loop {
            let line = self.line(until).map_err(|why| self.failed(&format!("{words:?}: {why}")))?;
            if words.iter().all(|word| line.contains(word)) {
                return Ok(());
            }
        }
    }

    /// Waits until so many train together on each of these hosts (`a|b`: one or the other), in a later epoch than `after`; which.
    fn trains(&mut self, hosts: &[(&str, usize)], after: Option<u64>) -> Result<u64, String> {
        let size: usize = hosts.iter().map(|(_, count)| count).sum();
        let until = Instant::now() + PATIENCE / 2;
        let mut found: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        loop {
            let line = self
                .line(until)
                .map_err(|why| self.failed(&format!("no {size} on {hosts:?} have trained: {why}")))?;
            let Some(words) = line.split_once("]<stdout>:epoch ").map(|(_, words)| words) else { continue };
            let words: Vec<&str> = words.split(' ').collect();
            let [epoch, "of", members, "on", host] = words[..] else { continue };
            let epoch: u64 = epoch.parse().map_err(|_| line.clone())?;
            if members == size.to_string() && after.is_none_or(|after| epoch > after) {
                let there = found.entry(epoch).or_default();
                there.push(host.to_owned());
                let on = |name: &str| there.iter().filter(|host| name.split('|').any(|n| n == *host)).count();
                if there.len() == size && hosts.iter().all(|(name, count)| on(name) == *count) {
                    return Ok(epoch);
                }
            }
        }
    }

    fn failed(&self, what: &str) -> String {
        format!("{what}:\n{}", self.said.join("\n"))
    }

    /// Lets the training end; so many must have the right result.
    fn ends(&mut self, size: usize) -> Result<(), String> {
        std::fs::write(&self.end, "").map_err(|e| format!("{}: {e}", self.end.display()))?;
        let code = self.wait()?;
        let results: Vec<&str> =
            self.said.iter().filter_map(|line| Some(line.split_once("]<stdout>:trained ")?.1)).collect();
        let right = |result: &&str| {
            let (steps, hash) = result.split_once(' ').unwrap_or_default();
            steps.parse().is_ok_and(|steps: u64| steps > 0 && format!("{:016x}", expected(steps)) == hash)
        };
        let alike = results.windows(2).all(|pair| pair[0] == pair[1]);
        match code == 0 && results.len() == size && alike && results.first().is_some_and(right) {
            true => Ok(()),
            false => Err(self.failed(&format!("code {code}, and the results {results:?} of {size}"))),
        }
    }

    /// Waits for its end, and gives the exit code.
    fn wait(&mut self) -> Result<i32, String> {
        let until = Instant::now() + PATIENCE / 2;
        loop {
            match self.line(until) {
                Ok(_) => {}
                Err(why) if why == "the job ended" => break,
                Err(why) => return Err(self.failed(&why)),
            }
        }
        let status = self.child.wait().map_err(|e| e.to_string())?;
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        Ok(status.code().unwrap_or_else(|| 128 + signal.unwrap_or_default()))
    }

    /// It must refuse with all these words.
    fn refuses(&mut self, words: &[&str]) -> Result<(), String> {
        let code = self.wait()?;
        let said = self.said.join("\n");
        match code != 0 && words.iter().all(|word| said.contains(word)) {
            true => Ok(()),
            false => Err(self.failed(&format!("code {code}, and not the words {words:?}"))),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // It has ended, or the scene has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A discovery script of the site, and the hosts that it names.
fn discover(site: &Site, hosts: &str) -> Result<String, String> {
    site.write("hosts", hosts)?;
    site.write("discover", &format!("#!/bin/sh\ncat '{}'\n", site.path("hosts")))?;
    output("chmod", &["755", &site.path("discover")])?;
    Ok(site.path("discover"))
}

/// The workers on a host.
fn workers(site: &Site, n: u32) -> Result<Vec<String>, String> {
    let there = output("ip", &["netns", "pids", &site.network.host(n)])?;
    let there: Vec<&str> = there.split_whitespace().collect();
    let jobs = site.of_jobs()?.into_iter();
    let jobs = jobs.filter(|(_, line)| line.contains("rank elastic") && !line.contains("carolerun"));
    Ok(jobs.map(|(pid, _)| pid.to_string()).filter(|pid| there.contains(&pid.as_str())).collect())
}

fn come_and_go(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let per = settings.per_host as usize;
    let (a, b) = (site.address(0), site.address(1));
    let script = discover(&site, &format!("{a}:{per}\n"))?;
    let flags = ["--min-np", "1", "--host-discovery-script", &script, "--blacklist-cooldown-range", "1", "2"];
    let mut job = Job::start(&site, &flags)?;
    let first = job.trains(&[(&a, per)], None)?;
    site.write("hosts", &format!("{a}:{per}\n{b}:{per}\n"))?;
    let grown = job.trains(&[(&a, per), (&b, per)], Some(first))?;
    let victims = workers(&site, 1)?;
    if victims.len() != per {
        return Err(job.failed(&format!("the workers on {b} are {victims:?}")));
    }
    output("kill", &[&["-KILL"], &victims.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat())?;
    let shrunk = job.trains(&[(&a, per)], Some(grown))?;
    // When it has cooled down, others come there.
    let again = job.trains(&[(&a, per), (&b, per)], Some(shrunk))?;
    // Its host is named no more: they leave, and nothing stays there, the agent included.
    site.write("hosts", &format!("{a}:{per}\n"))?;
    job.trains(&[(&a, per)], Some(again))?;
    let until = Instant::now() + Duration::from_secs(20);
    while site.of_jobs()?.values().any(|line| line.ends_with(" --agent")) {
        if Instant::now() >= until {
            return Err(job.failed("the agent of a host that is not named any more stays"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    job.ends(per)?;
    site.nothing_left(Duration::from_secs(10))
}

fn cable(settings: &Settings) -> Result<(), String> {
    let hosts = settings.hosts.iter().copied().max().unwrap_or(3).max(3);
    let site = Site::new(hosts, Family::Both, None)?;
    let per = settings.per_host as usize;
    let names: Vec<String> = (0..hosts).map(|n| site.address(n)).collect();
    let all: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), per)).collect();
    let (size, list) = ((per * all.len()).to_string(), site.list(settings.per_host));
    let flags =
        ["-np", &size, "--min-np", "1", "-H", &list, "--blacklist-cooldown-range", "2", "4", "--verbose"];
    let mut job = Job::start(&site, &flags)?;
    let first = job.trains(&all, None)?;
    site.network.unplug(1)?;
    let pulled = Instant::now();
    let others: Vec<(&str, usize)> = all.iter().copied().filter(|(name, _)| *name != names[1]).collect();
    let fewer = job.trains(&others, Some(first))?;
    println!("ssh: the others trained on {:.1} s after a cable was pulled", pulled.elapsed().as_secs_f64());
    site.network.plug_in(1)?;
    job.trains(&all, Some(fewer))?;
    job.ends(all.len() * per)?;
    site.nothing_left(Duration::from_secs(10))
}

fn host_dies(settings: &Settings) -> Result<(), String> {
    let mut site = Site::new(3, Family::Both, None)?;
    let per = settings.per_host as usize;
    let (a, b, c) = (site.address(0), site.address(1), site.address(2));
    let (size, list) = ((3 * per).to_string(), site.list(settings.per_host));
    let flags = ["-np", &size, "--min-np", "2", "-H", &list, "--blacklist-cooldown-range", "600", "600"];
    let mut job = Job::start(&site, &flags)?;
    let first = job.trains(&[(&a, per), (&b, per), (&c, per)], None)?;
    site.kill_host(2)?;
    job.says(&[&format!("host '{c}' is lost, and with it {per} workers"), &format!("{} left", 2 * per)])?;
    job.trains(&[(&a, per), (&b, per)], Some(first))?;
    job.ends(2 * per)?;
    site.nothing_left(Duration::from_secs(10))
}

/// Hosts that are named and cannot be used: left out while there are enough others, and an error else.
fn unusable(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let per = settings.per_host as usize;
    let (a, list) = (site.address(0), site.list(settings.per_host));
    let (most, few) = ((2 * per).to_string(), per.to_string());
    let cool = ["--blacklist-cooldown-range", "600", "600"];
    // Its key is another than the one that is known.
    let key = std::fs::read_to_string(site.path("other_key.pub")).map_err(|e| e.to_string())?;
    site.write("known_hosts", &format!("10.77.1.2 {key}"))?;
    let mut job = Job::start(&site, &[&["-np", &most, "--min-np", &few, "-H", &list], &cool[..]].concat())?;
    job.says(&["host '10.77.1.2' cannot be used", "ssh-keygen -R", "left out"])?;
    job.trains(&[(&a, per)], None)?;
    job.ends(per)?;
    Job::start(&site, &["-np", &most, "--min-np", &most, "-H", &list])?.refuses(&[
        "host '10.77.1.2' cannot be used",
        "ssh-keygen -R",
        "at least",
        "--min-np",
    ])?;
    site.write("known_hosts", "")?;
    let list = format!("{}:{per},10.77.1.2:{per},[fd77:1::2]:{per}", site.address(0));
    let three = (3 * per).to_string();
    let flags = ["-np", &three, "--min-np", &few, "-H", &list];
    let mut job = Job::start(&site, &[&flags, &cool[..]].concat())?;
    job.says(&["are the same host"])?;
    // Whichever of the two names was reached first.
    job.trains(&[(&a, per), ("10.77.1.2|fd77:1::2", per)], None)?;
    job.ends(2 * per)?;
    if std::process::Command::new("nft").arg("--version").output().is_ok() {
        // It would break every epoch.
        site.hide_behind_firewall(1)?;
        let list = site.list(settings.per_host);
        let mut job =
            Job::start(&site, &[&["-np", &most, "--min-np", &few, "-H", &list], &cool[..]].concat())?;
        job.says(&["cannot connect to host '10.77.1.2'", "NAT", "left out"])?;
        job.trains(&[(&a, per)], None)?;
        job.ends(per)?;
    }
    site.nothing_left(Duration::from_secs(10))
}

fn secrecy(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let per = settings.per_host as usize;
    let (a, b, list) = (site.address(0), site.address(1), site.list(settings.per_host));
    let size = (2 * per).to_string();
    let mut job = Job::start(&site, &["-np", &size, "--min-np", &size, "-H", &list])?;
    job.trains(&[(&a, per), (&b, per)], None)?;
    let worker = workers(&site, 1)?.pop().ok_or("there is no worker")?;
    let environment = std::fs::read(format!("/proc/{worker}/environ")).unwrap_or_default();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let number = environment.split('\0').find_map(|pair| pair.strip_prefix("CAROLE_SECRET_FD="));
    let number = number.ok_or("the worker was told no descriptor of the secret")?;
    // It closes the descriptor when it has read it; an agent keeps no copy in any place that others can read.
    if std::fs::metadata(format!("/proc/{worker}/fd/{number}")).is_ok_and(|found| found.len() == 64) {
        return Err("the worker keeps the descriptor of the secret open".to_owned());
    }
    let hexadecimal = |text: &str| text.split(|c: char| !c.is_ascii_hexdigit()).any(|part| part.len() == 64);
    for pid in site.of_jobs()?.into_keys().chain([job.pid()]) {
        for file in ["cmdline", "environ"] {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            if hexadecimal(&String::from_utf8_lossy(&text)) {
                return Err(format!("what looks like a secret stands in /proc/{pid}/{file}"));
            }
        }
    }
    job.ends(2 * per)?;
    site.nothing_left(Duration::from_secs(10))
}

/// The launcher or its guard: the job ends everywhere. What leads to another host, or looks after it: the others go on.
fn kills(settings: &Settings) -> Result<(), String> {
    let site = Site::new(2, Family::Both, None)?;
    let per = settings.per_host as usize;
    let (a, b, list) = (site.address(0), site.address(1), site.list(settings.per_host));
    let (size, few) = ((2 * per).to_string(), per.to_string());
    let victims = ["launcher", "agent's guard", "carole-guard", "ssh", "agent", "sshd"];
    let turns = settings.kills.div_ceil(3);
    for turn in 0..turns {
        let victim = victims[turn as usize % victims.len()];
        let cool = ["--blacklist-cooldown-range", "600", "600"];
        let mut job =
            Job::start(&site, &[&["-np", &size, "--min-np", &few, "-H", &list], &cool[..]].concat())?;
        let first = job.trains(&[(&a, per), (&b, per)], None)?;
        let pid = find(&site, job.pid(), victim)?;
        output("kill", &["-KILL", &pid.to_string()])?;
        if ["launcher", "carole-guard"].contains(&victim) {
            let code = job.wait()?;
            if code == 0 {
                return Err(
                    job.failed(&format!("turn {turn}: the {victim} was killed, and the job ended with 0"))
                );
            }
        } else {
            job.trains(&[(&a, per)], Some(first))
                .map_err(|words| format!("turn {turn}, {victim}: {words}"))?;
            job.ends(per).map_err(|words| format!("turn {turn}, {victim}: {words}"))?;
        }
        site.nothing_left(Duration::from_secs(20))
            .map_err(|words| format!("turn {turn}, {victim}: {words}"))?;
    }
    println!("ssh: {turns} elastic jobs were started and something of each killed; nothing was left");
    Ok(())
}
