//! Which host reaches which, at which addresses: every pair of a small job, neighbours of a large one.
#![forbid(unsafe_code)]

use super::gather::Crew;
use super::probe::{self, Answerer};
use super::words::{escape, unescape_text};
use crate::error::{Error, Result};
use crate::rendezvous::secret::Secret;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// Up to so many hosts every pair is tried; beyond, each host tries those at distances that are powers of two.
pub const ALL_PAIRS_MAX: usize = 24;
/// How long probes may take, and the agents' answers.
pub const PROBES: Duration = Duration::from_secs(20);

/// What a probe of one address found.
pub type Probed = (SocketAddr, std::result::Result<(), String>);

/// Who reaches whom. Host 0 is the launcher's, the agents follow.
pub struct Ways {
    /// The hosts, by name.
    pub names: Vec<String>,
    /// What each listens at.
    pub served: Vec<Vec<SocketAddr>>,
    /// By (from, to): what the probes found.
    pub probes: BTreeMap<(usize, usize), Vec<Probed>>,
    /// The launcher's own; it answers until this is dropped.
    _answerer: Option<Answerer>,
}

impl Ways {
    /// Between these hosts; nothing is known yet.
    #[must_use]
    pub fn of(names: Vec<String>) -> Ways {
        Ways { served: vec![Vec::new(); names.len()], names, probes: BTreeMap::new(), _answerer: None }
    }

    /// Lets every host open a port, and tries them from the others. `local`: the launcher's host has ranks itself;
    /// otherwise only it must be reached.
    pub fn find(crew: &mut Crew<'_>, secret: &Secret, local: bool, interfaces: &[String]) -> Result<Ways> {
        let own = super::super::system;
        // A host without ranks may be of another kind, with other interfaces.
        let here = if local { interfaces } else { &[] };
        let answerer = Answerer::start(secret.clone(), name_of(0, "this host"), here).map_err(own)?;
        let mut names = vec!["this host".to_owned()];
        names.extend(crew.agents.iter().map(|agent| agent.host.clone()));
        let listed: String = interfaces.iter().map(|name| format!(" {}", escape(name.as_bytes()))).collect();
        let hello = format!("secret {}\n", secret.to_hex());
        let orders = |i: usize| {
            vec![format!("{hello}serve {}{listed}\n", escape(name_of(i + 1, &names[i + 1]).as_bytes()))]
        };
        let answers = crew.exchange(orders, PROBES)?;
        let mut served = vec![answerer.addresses().to_vec()];
        for (i, answer) in answers.iter().enumerate() {
            served.push(addresses(&answer[0]).map_err(|why| {
                Error::usage(format!("host '{}' cannot be reached by others: {why}", names[i + 1]))
            })?);
        }
        if let Some(mute) = served.iter().position(Vec::is_empty) {
            return Err(Error::usage(format!(
                "{} has no address on the interfaces {interfaces:?}; --network-interfaces names interfaces that are \
                 up on every host",
                quoted(&names[mute])
            )));
        }
        let mut ways = Ways { names, served, probes: BTreeMap::new(), _answerer: Some(answerer) };
        ways.probe(crew, secret, local)?;
        Ok(ways)
    }

    fn probe(&mut self, crew: &mut Crew<'_>, secret: &Secret, local: bool) -> Result<()> {
        let count = self.names.len();
        let targets = |from: usize| neighbours(from, count);
        let order = |to: usize| {
            let list: Vec<String> = self.served[to].iter().map(ToString::to_string).collect();
            format!("reach {} {}\n", escape(self.proves(to).as_bytes()), list.join(" "))
        };
        let (answers, own) = std::thread::scope(|scope| {
            let own: Vec<_> = targets(0)
                .into_iter()
                .filter(|_| local)
                .map(|to| {
                    let (name, list) = (self.proves(to), &self.served[to]);
                    (to, scope.spawn(move || probe::reach(secret, &name, list)))
                })
                .collect();
            let answers = crew.exchange(|i| targets(i + 1).into_iter().map(order).collect(), PROBES);
            let own: Vec<_> =
                own.into_iter().map(|(to, probe)| (to, probe.join().unwrap_or_default())).collect();
            (answers, own)
        });
        for (to, found) in own {
            self.probes.insert((0, to), found);
        }
        for (i, answers) in answers?.into_iter().enumerate() {
            for (to, answer) in targets(i + 1).into_iter().zip(answers) {
                let found = parse(&answer).ok_or_else(|| {
                    Error::usage(format!("host '{}' answers '{answer}' to a probe", self.names[i + 1]))
                })?;
                self.probes.insert((i + 1, to), found);
            }
        }
        Ok(())
    }

    /// What a host proves to be.
    pub fn proves(&self, host: usize) -> String {
        name_of(host, &self.names[host])
    }

    /// The addresses at which `from` reaches `to`.
    pub fn reached(&self, from: usize, to: usize) -> Vec<SocketAddr> {
        let probes = self.probes.get(&(from, to)).map(Vec::as_slice).unwrap_or_default();
        probes.iter().filter(|(_, found)| found.is_ok()).map(|(address, _)| *address).collect()
    }

    /// In words, why a pair of hosts cannot work together; `None` when all can.
    pub fn complaint(&self) -> Option<String> {
        let broken = self.probes.keys().find(|&&(from, to)| self.reached(from, to).is_empty());
        let &(from, to) = broken?;
        let (a, b) = (quoted(&self.names[from]), quoted(&self.names[to]));
        let tried: Vec<String> = self.probes[&(from, to)]
            .iter()
            .filter_map(|(address, found)| Some(format!("{}: {}", address.ip(), found.as_ref().err()?)))
            .collect();
        let back = match self.probes.contains_key(&(to, from)) {
            true if self.reached(to, from).is_empty() => format!("; nor does {b} reach {a}"),
            true => format!(
                ", though {b} reaches {a} (a firewall that lets connections pass in one direction only, or {b} is \
                 behind NAT)"
            ),
            false => String::new(),
        };
        Some(format!(
            "{a} cannot connect to {b} at any of its addresses ({}){back}. Hosts of a job connect to each other at ports \
             that the kernel picks: let TCP from {a} to {b} through, or name the interfaces of the network that they \
             share with --network-interfaces",
            tried.join(", ")
        ))
    }

    /// Of a host's addresses those that everybody reached who tried, where some were not: ranks need not try the others
    /// in vain.
    pub fn interfaces(&self, host: usize) -> Option<String> {
        let probes: Vec<_> = self.probes.iter().filter(|((_, to), _)| *to == host).collect();
        let good = |address: &SocketAddr| {
            probes.iter().all(|(_, found)| found.iter().any(|(a, r)| a == address && r.is_ok()))
        };
        let outside: Vec<&SocketAddr> = self.served[host].iter().filter(|a| !a.ip().is_loopback()).collect();
        let chosen: Vec<String> =
            outside.iter().filter(|address| good(address)).map(|address| address.ip().to_string()).collect();
        let narrows = !probes.is_empty() && !chosen.is_empty() && chosen.len() < outside.len();
        narrows.then(|| chosen.join(","))
    }
}

/// What a host proves to be. The number tells apart two hosts of one name.
#[must_use]
pub fn name_of(host: usize, name: &str) -> String {
    format!("{host}/{name}")
}

fn quoted(name: &str) -> String {
    if name == "this host" { name.to_owned() } else { format!("host '{name}'") }
}

/// The hosts that one tries. The launcher is tried by all, since its rendezvous must be reached.
fn neighbours(from: usize, count: usize) -> Vec<usize> {
    if count <= ALL_PAIRS_MAX {
        return (0..count).filter(|&to| to != from).collect();
    }
    let mut found = vec![0];
    let mut distance = 1;
    while distance < count {
        found.push((from + distance) % count);
        distance *= 2;
    }
    found.sort_unstable();
    found.dedup();
    found.retain(|&to| to != from);
    found
}

/// What a host answers to the order to serve: where, or why not.
pub fn addresses(answer: &str) -> std::result::Result<Vec<SocketAddr>, String> {
    match answer.split_once(' ').unwrap_or((answer, "")) {
        ("serving", list) => list
            .split(' ')
            .filter(|word| !word.is_empty())
            .map(|word| word.parse().map_err(|_| format!("'{word}' is no address")))
            .collect(),
        ("mute", why) => Err(unescape_text(why).unwrap_or_default()),
        _ => Err(format!("it answers '{answer}'")),
    }
}

/// `reached NAME ADDRESS % ADDRESS WHY ...`.
#[must_use]
pub fn parse(answer: &str) -> Option<Vec<Probed>> {
    let words: Vec<&str> = answer.strip_prefix("reached ")?.split(' ').skip(1).collect();
    let probed = |pair: &[&str]| {
        let why = unescape_text(pair.get(1)?)?;
        Some((pair[0].parse().ok()?, if why.is_empty() { Ok(()) } else { Err(why) }))
    };
    words.chunks(2).map(probed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(probes: &[(usize, usize, &str, bool)]) -> Ways {
        let mut found: BTreeMap<(usize, usize), Vec<Probed>> = BTreeMap::new();
        let mut served = vec![Vec::new(); 3];
        for &(from, to, ip, ok) in probes {
            let address: SocketAddr = format!("{ip}:7").parse().unwrap();
            let result = if ok { Ok(()) } else { Err("no answer".to_owned()) };
            found.entry((from, to)).or_default().push((address, result));
            if !served[to].contains(&address) {
                served[to].push(address);
            }
        }
        let names = ["this host", "a", "b"].map(str::to_owned).to_vec();
        Ways { served, probes: found, ..Ways::of(names) }
    }

    #[test]
    fn a_pair_that_fails_in_one_direction_is_named_with_the_other() {
        let fine = ways(&[(1, 0, "10.0.0.1", true), (1, 2, "10.0.0.3", true), (2, 1, "10.0.0.2", true)]);
        assert_eq!(fine.complaint(), None);
        let words = ways(&[(1, 2, "10.0.0.3", false), (2, 1, "10.0.0.2", true)]).complaint().unwrap();
        assert!(words.contains("host 'a' cannot connect to host 'b'") && words.contains("NAT"), "{words}");
        assert!(words.contains("10.0.0.3: no answer"), "{words}");
        let words = ways(&[(1, 2, "10.0.0.3", false), (2, 1, "10.0.0.2", false)]).complaint().unwrap();
        assert!(words.contains("nor does host 'b' reach host 'a'"), "{words}");
    }

    #[test]
    fn addresses_that_somebody_does_not_reach_are_left_out() {
        let probes = [
            (1, 2, "10.0.0.3", true),
            (1, 2, "172.17.0.1", false),
            (0, 2, "10.0.0.3", true),
            (0, 2, "172.17.0.1", true),
        ];
        assert_eq!(ways(&probes).interfaces(2).as_deref(), Some("10.0.0.3"));
        assert_eq!(ways(&probes[..1]).interfaces(2), None);
        assert_eq!(ways(&[(1, 2, "10.0.0.3", false)]).interfaces(2), None);
    }

    #[test]
    fn everybody_is_tried_by_somebody_and_nobody_tries_many() {
        for count in [2, 24, 25, 1000] {
            for from in 0..count {
                let found = neighbours(from, count);
                assert!(!found.contains(&from) && (from == 0 || found.contains(&0)));
                assert!(found.len() < ALL_PAIRS_MAX && found.contains(&((from + 1) % count)));
            }
        }
    }

    #[test]
    fn answers_are_read() {
        let found = parse("reached x 10.0.0.1:5 % [fd00::1]:5 no%20answer").unwrap();
        assert_eq!(found[0].1, Ok(()));
        assert_eq!(found[1].1, Err("no answer".to_owned()));
        assert!(parse("reached x 10.0.0.1:5").is_none() && parse("hm").is_none());
        assert!(addresses("mute no%20ports").unwrap_err().contains("no ports"));
        assert_eq!(addresses("serving").unwrap(), []);
    }
}
