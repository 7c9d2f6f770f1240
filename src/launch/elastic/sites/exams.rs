//! The exams of hosts that have just been reached.
#![forbid(unsafe_code)]

use super::super::super::remote::candidate::Agent;
use super::super::super::remote::probe::{self, Answerer};
use super::super::super::remote::words::escape;
use super::super::super::remote::{agent, ways};
use super::super::exam::{self, Exam, HERE, NEW};
use super::{Site, Sites, Stage};
use std::net::SocketAddr;
use std::time::Instant;

/// The order to try a host.
fn reach(proof: &str, list: &[SocketAddr]) -> String {
    let list: Vec<String> = list.iter().map(ToString::to_string).collect();
    format!("reach {} {}\n", escape(proof.as_bytes()), list.join(" "))
}

impl Sites {
    /// An agent has greeted: it is told what it needs, and asked where others reach it.
    pub(super) fn examine(&mut self, index: usize, agent: Agent) {
        let host = self.sites[index].host.clone();
        let own = (self.local && agent.host_id == agent::host_id()).then_some("this host");
        let known = |site: &&Site| {
            !matches!(site.stage, Stage::Reaching(_) | Stage::Gone) && site.host_id == agent.host_id
        };
        let twin = self.sites.iter().find(known).map(|site| site.host.as_str());
        if let Some(other) = own.or(twin) {
            let why = format!(
                "'{other}' and '{host}' are the same host; name it once, with the slots of both (where containers of one \
                 machine stand for hosts, CAROLE_HOST_ID tells them apart)"
            );
            let mut link = agent.link;
            link.close();
            return self.unreached(index, why);
        }
        if let Err(error) = self.open_answerer() {
            return self.unreached(index, format!("host '{host}' cannot be tried: no ports here: {error}"));
        }
        let site = &mut self.sites[index];
        site.host_id = agent.host_id;
        site.stage = Stage::Examined(Box::new(agent.link), None, Instant::now() + ways::PROBES);
        let (preamble, common, open) = (&self.reach.preamble, &self.reach.common, agent::OPEN);
        let interfaces = self.reach.interfaces.iter();
        let listed: String = interfaces.map(|name| format!(" {}", escape(name.as_bytes()))).collect();
        let serve = format!("serve {}{listed}", escape(site.proof.as_bytes()));
        site.order(&format!("{preamble}{common}{open}\n{serve}\n"));
    }

    fn open_answerer(&mut self) -> std::io::Result<()> {
        if self.answerer.is_none() {
            let start = |list: &[String]| {
                Answerer::start(self.reach.secret.clone(), ways::name_of(0, "this host"), list)
            };
            let named = start(&self.reach.interfaces)?;
            // A host without workers may be of another kind, with other interfaces.
            self.answerer = Some(if named.addresses().is_empty() { start(&[])? } else { named });
        }
        Ok(())
    }

    /// A host has said where others reach it: now all are tried, in both directions.
    pub(super) fn served(&mut self, index: usize, answer: &str) {
        let Stage::Examined(..) = self.sites[index].stage else { return };
        let host = self.sites[index].host.clone();
        let served = match ways::addresses(answer) {
            Ok(list) if list.is_empty() => {
                return self.unreached(
                    index,
                    format!(
                        "host '{host}' has no address on the interfaces {:?}; --network-interfaces names interfaces that \
                         are up on every host",
                        self.reach.interfaces
                    ),
                );
            }
            Ok(list) => list,
            Err(why) => {
                return self.unreached(index, format!("host '{host}' cannot be reached by others: {why}"));
            }
        };
        let partners: Vec<usize> = (0..self.sites.len()).filter(|&at| self.sites[at].answers()).collect();
        let partners: Vec<usize> =
            exam::partners(partners.len()).into_iter().map(|at| partners[at]).collect();
        let named = |at: &usize| (self.sites[*at].host.clone(), self.sites[*at].proof.clone());
        let (here, new) = (ways::name_of(0, "this host"), self.sites[index].proof.clone());
        let mut exam = Exam::new(here.clone(), (host, new.clone()), partners.iter().map(named).collect());
        let own = self.answerer.as_ref().map_or_else(Vec::new, |answerer| answerer.addresses().to_vec());
        exam.expect(NEW, HERE, &own);
        let mut orders = reach(&here, &own);
        for (number, at) in partners.into_iter().enumerate() {
            let (number, other) = (NEW + 1 + number, &mut self.sites[at]);
            exam.expect(NEW, number, &other.served);
            exam.expect(number, NEW, &served);
            orders.push_str(&reach(&other.proof, &other.served));
            other.order(&reach(&new, &served));
        }
        if self.local && self.try_from_here(&new, &served) {
            exam.expect(HERE, NEW, &served);
        }
        let site = &mut self.sites[index];
        site.served = served;
        site.order(&orders);
        if let Stage::Examined(_, taken, _) = &mut site.stage {
            *taken = Some(Box::new(exam));
        }
    }

    /// Tries a host from here, in a thread of its own, since it may take seconds.
    fn try_from_here(&self, proof: &str, served: &[SocketAddr]) -> bool {
        let (secret, proof, served) = (self.reach.secret.clone(), proof.to_owned(), served.to_vec());
        let (tell, bell) = (self.own.0.clone(), self.reach.bell.clone());
        let look = move || {
            let found = probe::reach(&secret, &proof, &served);
            // The job may have ended meanwhile.
            let _ = tell.send((proof, found));
            bell.wake();
        };
        std::thread::Builder::new().name("carole-reach".into()).spawn(look).is_ok()
    }

    /// Takes what the launcher itself has found out.
    pub fn on_bell(&mut self) {
        while let Ok((proof, found)) = self.own.1.try_recv() {
            self.tried(&ways::name_of(0, "this host"), &proof, found);
        }
    }

    /// One host has tried another; one of the two is new.
    pub(super) fn tried(&mut self, from: &str, to: &str, found: Vec<ways::Probed>) {
        for index in 0..self.sites.len() {
            let new = self.sites[index].proof == from || self.sites[index].proof == to;
            let Stage::Examined(_, Some(exam), _) = &mut self.sites[index].stage else { continue };
            if let (true, Some(from), Some(to)) = (new, exam.number_of(from), exam.number_of(to)) {
                exam.found(from, to, found.clone());
                self.judge(index);
            }
        }
    }

    /// If all is known of a host: it is ready, or cannot be used.
    pub(super) fn judge(&mut self, index: usize) {
        let site = &mut self.sites[index];
        let Stage::Examined(_, Some(exam), _) = &site.stage else { return };
        if !exam.is_over() {
            return;
        }
        if let Some(why) = exam.complaint() {
            return self.unreached(index, why);
        }
        let reached = exam.reached();
        let serves = self.reach.serves.iter().filter(|a| reached.iter().any(|r| r.ip() == a.ip()));
        site.rendezvous = serves.map(ToString::to_string).collect::<Vec<_>>().join(",");
        site.interfaces = if self.reach.interfaces.is_empty() { exam.interfaces() } else { None };
        site.stage = match std::mem::replace(&mut site.stage, Stage::Gone) {
            Stage::Examined(link, ..) => Stage::Ready(link),
            stage => stage,
        };
        for (worker, variables) in std::mem::take(&mut site.waiting) {
            site.start(worker, variables);
        }
    }
}
