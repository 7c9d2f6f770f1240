//! `carolerun doctor -H HOSTS`: whether hosts can work together, before a job finds out. Every host is reached as a
//! job would, every pair is probed both ways and measured, and what is odd is said in words.
#![forbid(unsafe_code)]

use super::args::Arguments;
use super::hosts::{self, Host};
use super::remote::facts::{self, Facts};
use super::remote::gather::Crew;
use super::remote::probe::{self, Measure};
use super::remote::ssh::Ssh;
use super::remote::ways::Ways;
use super::remote::words::{escape, unescape_text};
use super::{FORWARDED, complain, job_environment, print, remote, sys, system};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::rendezvous::secret::Secret;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Clocks that differ by more make logs hard to compare.
const CLOCK_MS: i64 = 1000;
/// What a job of a few ranks and frameworks' data loaders need.
const OPEN_FILES: u64 = 1024;
/// Data loaders pass batches through /dev/shm. Carole itself takes nothing there.
const SHM_BYTES: u64 = 256 << 20;
/// Up to so many hosts every pair is measured, one after the other; beyond, each host and the next.
const MEASURED_PAIRS_MAX: usize = 6;
/// A pair that carries less than this part of the median is said to be slow.
const SLOW: f64 = 0.5;
const ANSWER: Duration = Duration::from_secs(20);

/// One host, as it was found.
struct Patient {
    name: String,
    hostname: String,
    facts: Facts,
    clock_off_ms: i64,
}

/// What was measured from one host to another.
type Measures = BTreeMap<(usize, usize), std::result::Result<Measure, String>>;

/// The whole of it; the exit code is 0 when a job would run, 1 when it would not.
pub fn run(arguments: &Arguments, called: &OsStr) -> Result<i32> {
    let (config, _) = Config::load_with_flags(&[], &arguments.settings(), job_environment())?;
    let mut listed = arguments.hosts.source().or_found(|name| std::env::var(name).ok()).read()?;
    if listed.is_empty() {
        listed.push(Host { name: "localhost".to_owned(), slots: 1 });
    }
    let slots = listed.iter().map(|host| host.slots).fold(0, u32::saturating_add);
    let placements = hosts::assign(&listed, slots, hosts::is_this_host)?;
    let local = placements.iter().any(|placement| placement.local);
    let others: Vec<String> = placements.iter().filter(|p| !p.local).map(|p| p.host.clone()).collect();
    let signals =
        sys::Signals::block(&[&FORWARDED[..], &[libc::SIGCHLD, libc::SIGTTOU]].concat()).map_err(system)?;
    let ssh = Ssh::new(arguments.hosts.ssh(), called, |name| std::env::var(name).ok())?;
    let limit = Duration::from_secs(config.start_timeout_s);
    let mut crew = Crew::connect(&ssh, &others, &signals, limit, complain)?;
    let here = placements.iter().find(|placement| placement.local);
    remote::check_distinct(&crew, here.map(|placement| placement.host.as_str()))?;
    let patients = examine(&mut crew)?;
    let secret = Secret::mint()?;
    let ways = Ways::find(&mut crew, &secret, local, &arguments.hosts.network_interfaces)?;
    let measures = measure(&mut crew, &secret, &ways, local)?;
    let first = usize::from(!local);
    let mut text = String::new();
    tell_hosts(&mut text, &patients[first..]);
    tell_ways(&mut text, &ways, &measures);
    let (problems, remarks) = judge(&patients[first..], &ways, &measures, slots);
    tell_verdict(&mut text, &problems, &remarks, patients.len() - first);
    print(&text);
    Ok(i32::from(!problems.is_empty()))
}

/// The facts of this host and all others.
fn examine(crew: &mut Crew<'_>) -> Result<Vec<Patient>> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
    let hostname = crate::rendezvous::listen::hostname();
    let own = Patient { name: "this host".to_owned(), hostname, facts: facts::gather(), clock_off_ms: 0 };
    let before = now();
    let answers = crew.exchange(|_| vec!["facts\n".to_owned()], ANSWER)?;
    let middle = before + (now() - before) / 2;
    let mut patients = vec![own];
    for (agent, answer) in crew.agents.iter().zip(answers) {
        let facts = answer[0]
            .strip_prefix("facts ")
            .and_then(facts::decode)
            .ok_or_else(|| Error::usage(format!("host '{}' says '{}' of itself", agent.host, answer[0])))?;
        let clock: i64 = value(&facts, "clock_ms").parse().unwrap_or(middle);
        patients.push(Patient {
            name: agent.host.clone(),
            hostname: agent.hostname.clone(),
            facts,
            clock_off_ms: clock - middle,
        });
    }
    Ok(patients)
}

fn value<'a>(facts: &'a Facts, name: &str) -> &'a str {
    facts.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
}

fn number(facts: &Facts, name: &str) -> u64 {
    value(facts, name).parse().unwrap_or(0)
}

/// One pair after the other, so that no measurement disturbs another.
fn measure(crew: &mut Crew<'_>, secret: &Secret, ways: &Ways, local: bool) -> Result<Measures> {
    let count = ways.names.len();
    let all = count <= MEASURED_PAIRS_MAX;
    let mut measures = Measures::new();
    for &(from, to) in ways.probes.keys() {
        let wanted = all || to == (from + 1) % count;
        let (Some(&address), true, true) = (ways.reached(from, to).first(), wanted, local || to != 0) else {
            continue;
        };
        let name = ways.proves(to);
        let found = if from == 0 {
            probe::measure(secret, &name, address)
        } else {
            let order = format!("measure {} {address}\n", escape(name.as_bytes()));
            let orders = |index| if index + 1 == from { vec![order.clone()] } else { Vec::new() };
            let answers = crew.exchange(orders, ANSWER)?;
            parse(&answers[from - 1][0])
        };
        measures.insert((from, to), found);
    }
    Ok(measures)
}

fn parse(answer: &str) -> std::result::Result<Measure, String> {
    let words: Vec<&str> = answer.split(' ').collect();
    match words[..] {
        ["measured", _, latency, rate, segment] => {
            let odd = || format!("it answers '{answer}'");
            Ok(Measure {
                latency_us: latency.parse().map_err(|_| odd())?,
                bytes_per_s: rate.parse().map_err(|_| odd())?,
                segment_bytes: segment.parse().map_err(|_| odd())?,
            })
        }
        ["unmeasured", _, why] => Err(unescape_text(why).unwrap_or_default()),
        _ => Err(format!("it answers '{answer}'")),
    }
}

fn tell_hosts(text: &mut String, patients: &[Patient]) {
    // Writing to a String cannot fail.
    for patient in patients {
        let facts = &patient.facts;
        let files = number(facts, "open_files");
        let _ = writeln!(
            text,
            "{} ({}): Linux {}, {} processors ({}), {} of memory free, {} free in /dev/shm, {files} open files, clock \
             {:+} ms; {}",
            patient.name,
            patient.hostname,
            value(facts, "kernel"),
            value(facts, "processors"),
            value(facts, "simd"),
            gib(number(facts, "memory_free")),
            gib(number(facts, "shm_free")),
            patient.clock_off_ms,
            match value(facts, "interfaces") {
                "" => "no network interface",
                list => list,
            },
        );
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

fn tell_ways(text: &mut String, ways: &Ways, measures: &Measures) {
    for (&(from, to), found) in measures {
        let (a, b) = (&ways.names[from], &ways.names[to]);
        let address =
            ways.reached(from, to).first().map_or(String::new(), |address| address.ip().to_string());
        let _ = match found {
            Ok(m) => writeln!(
                text,
                "{a} -> {b} ({address}): {:.0} us, {:.2} Gbit/s, segments of {} bytes",
                m.latency_us,
                m.bytes_per_s * 8.0 / 1e9,
                m.segment_bytes
            ),
            Err(why) => writeln!(text, "{a} -> {b} ({address}): not measured: {why}"),
        };
    }
}

/// What would keep a job from running, and what is worth knowing.
fn judge(patients: &[Patient], ways: &Ways, measures: &Measures, slots: u32) -> (Vec<String>, Vec<String>) {
    let (mut problems, mut remarks) = (Vec::new(), Vec::new());
    problems.extend(ways.complaint());
    for (&(from, to), found) in measures {
        if let Err(why) = found {
            problems.push(format!("{} to {}: {why}", ways.names[from], ways.names[to]));
        }
    }
    for patient in patients {
        let (name, facts) = (&patient.name, &patient.facts);
        if patient.clock_off_ms.abs() > CLOCK_MS {
            remarks.push(format!(
                "the clock of {name} differs by {} ms from this host's: times in logs cannot be compared (chrony or ntp \
                 sets it)",
                patient.clock_off_ms
            ));
        }
        if number(facts, "open_files") < OPEN_FILES && number(facts, "open_files_hard") < OPEN_FILES {
            remarks.push(format!("{name} allows {} open files: ulimit -n", value(facts, "open_files_hard")));
        }
        if number(facts, "shm_free") < SHM_BYTES {
            remarks.push(format!(
                "{name} has {} free in /dev/shm: Carole needs none, but data loaders do (docker: --shm-size)",
                gib(number(facts, "shm_free"))
            ));
        }
        if number(facts, "processors") == 0 {
            remarks.push(format!("{name} does not say how many processors it has"));
        }
    }
    let simd: Vec<&str> = patients.iter().map(|patient| value(&patient.facts, "simd")).collect();
    if simd.windows(2).any(|pair| pair[0] != pair[1]) {
        remarks
            .push(format!("processors differ ({}): results are the same, speeds are not", simd.join(", ")));
    }
    let good: Vec<_> = measures.iter().filter_map(|(pair, m)| Some((pair, m.as_ref().ok()?))).collect();
    let mut segments: Vec<u32> = good.iter().map(|(_, m)| m.segment_bytes).collect();
    segments.sort_unstable();
    segments.dedup();
    if segments.len() > 1 {
        remarks.push(format!("segments differ between pairs ({segments:?} bytes): are all MTUs the same?"));
    }
    let mut rates: Vec<f64> = good.iter().map(|(_, m)| m.bytes_per_s).collect();
    rates.sort_unstable_by(f64::total_cmp);
    if let Some(&median) = rates.get(rates.len() / 2) {
        for ((from, to), m) in &good {
            if m.bytes_per_s < SLOW * median {
                let (a, b) = (&ways.names[*from], &ways.names[*to]);
                remarks.push(format!(
                    "{a} to {b} carries {:.2} Gbit/s, others {:.2}: a slow link holds up every rank",
                    m.bytes_per_s * 8.0 / 1e9,
                    median * 8.0 / 1e9
                ));
            }
        }
        let latency = good.iter().map(|(_, m)| m.latency_us).fold(0.0, f64::max);
        remarks.push(format!(
            "algorithms are chosen well with CAROLE_NETWORK_GBITS={:.0} CAROLE_NETWORK_LATENCY_US={:.0}",
            (median * 8.0 / 1e9).max(1.0),
            latency.ceil()
        ));
    }
    if patients.len() == 1 && number(&patients[0].facts, "processors") < u64::from(slots) {
        remarks.push(format!("{slots} ranks share {} processors", value(&patients[0].facts, "processors")));
    }
    (problems, remarks)
}

fn tell_verdict(text: &mut String, problems: &[String], remarks: &[String], hosts: usize) {
    for problem in problems {
        let _ = writeln!(text, "PROBLEM: {problem}");
    }
    for remark in remarks {
        let _ = writeln!(text, "note: {remark}");
    }
    let _ = match (problems.len(), hosts) {
        (0, 1) => writeln!(text, "verdict: this host is fit for a job"),
        (0, n) => writeln!(text, "verdict: the {n} hosts can work together"),
        (n, _) => writeln!(text, "verdict: a job would fail; {n} of the lines above say why"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_are_read() {
        let found = parse("measured x 12.5 1e9 1448").unwrap();
        assert_eq!((found.latency_us, found.bytes_per_s, found.segment_bytes), (12.5, 1e9, 1448));
        assert_eq!(parse("unmeasured x no%20answer"), Err("no answer".to_owned()));
        assert!(parse("measured x y z w").is_err() && parse("").is_err());
    }
}
