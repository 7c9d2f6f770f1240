//! What is found out about a host before it gets workers: who reaches it, and whom it reaches. A host that cannot work
//! with the others would break every epoch that it takes part in.
#![forbid(unsafe_code)]

use super::super::remote::ways::{ALL_PAIRS_MAX, Probed, Ways};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// The launcher's host among those of an exam.
pub const HERE: usize = 0;
/// The new host.
pub const NEW: usize = 1;

/// The exam of one host.
pub struct Exam {
    ways: Ways,
    /// What each host proves to be.
    proofs: Vec<String>,
    /// Pairs that are being tried.
    awaited: BTreeSet<(usize, usize)>,
}

impl Exam {
    /// Of the host `name`, beside the launcher's and these others; each by its name and what it proves to be.
    pub fn new(here: String, new: (String, String), others: Vec<(String, String)>) -> Exam {
        let (mut names, mut proofs) = (vec!["this host".to_owned(), new.0], vec![here, new.1]);
        for (name, proof) in others {
            names.push(name);
            proofs.push(proof);
        }
        Exam { ways: Ways::of(names), proofs, awaited: BTreeSet::new() }
    }

    /// `from` has been asked to try `to` at its addresses.
    pub fn expect(&mut self, from: usize, to: usize, served: &[SocketAddr]) {
        self.ways.served[to] = served.to_vec();
        self.awaited.insert((from, to));
    }

    /// The number of the host that proves to be this.
    pub fn number_of(&self, proof: &str) -> Option<usize> {
        self.proofs.iter().position(|known| known == proof)
    }

    /// What came of a try.
    pub fn found(&mut self, from: usize, to: usize, probes: Vec<Probed>) {
        if self.awaited.remove(&(from, to)) {
            self.ways.probes.insert((from, to), probes);
        }
    }

    /// A host has gone, and nothing more is heard of it.
    pub fn forget(&mut self, proof: &str) {
        if let Some(number) = self.number_of(proof) {
            self.awaited.retain(|(from, to)| *from != number && *to != number);
            self.ways.probes.retain(|(from, to), _| *from != number && *to != number);
        }
    }

    /// Whether all has been tried.
    pub fn is_over(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Why the new host cannot work with the others, if so.
    pub fn complaint(&self) -> Option<String> {
        self.ways.complaint()
    }

    /// The launcher's addresses at which the new host reaches it.
    pub fn reached(&self) -> Vec<SocketAddr> {
        self.ways.reached(NEW, HERE)
    }

    /// The new host's addresses that its workers should use, where some lead nowhere.
    pub fn interfaces(&self) -> Option<String> {
        self.ways.interfaces(NEW)
    }
}

/// Of so many hosts that are there already, those with which a new one is tried: all, or of many some.
pub fn partners(count: usize) -> Vec<usize> {
    if count <= ALL_PAIRS_MAX {
        return (0..count).collect();
    }
    let distances = std::iter::successors(Some(1), |distance| Some(distance * 2));
    distances.take_while(|distance| *distance <= count).map(|distance| count - distance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn exam() -> Exam {
        let named = |name: &str, number: u32| (name.to_owned(), format!("{number}/{name}"));
        let mut exam = Exam::new("0/this host".into(), named("b", 7), vec![named("a", 2)]);
        exam.expect(NEW, HERE, &[address("10.0.0.1:1"), address("172.17.0.1:1")]);
        exam.expect(NEW, 2, &[address("10.0.0.2:1")]);
        exam.expect(2, NEW, &[address("10.0.0.3:1"), address("172.17.0.1:1")]);
        exam
    }

    #[test]
    fn a_host_that_works_with_all_others_passes() {
        let mut exam = exam();
        let silent = (address("172.17.0.1:1"), Err("no answer".to_owned()));
        exam.found(NEW, HERE, vec![(address("10.0.0.1:1"), Ok(())), silent.clone()]);
        exam.found(NEW, 2, vec![(address("10.0.0.2:1"), Ok(()))]);
        assert!(!exam.is_over());
        exam.found(exam.number_of("2/a").unwrap(), NEW, vec![(address("10.0.0.3:1"), Ok(())), silent]);
        assert!(exam.is_over() && exam.complaint().is_none());
        assert_eq!(exam.reached(), [address("10.0.0.1:1")]);
        assert_eq!(exam.interfaces().as_deref(), Some("10.0.0.3"));
    }

    #[test]
    fn one_that_cannot_is_named_with_whom_it_cannot() {
        let mut exam = exam();
        exam.found(NEW, HERE, vec![(address("10.0.0.1:1"), Ok(()))]);
        exam.found(NEW, 2, vec![(address("10.0.0.2:1"), Ok(()))]);
        exam.found(2, NEW, vec![(address("10.0.0.3:1"), Err("no answer".to_owned()))]);
        let words = exam.complaint().unwrap();
        assert!(words.contains("host 'a' cannot connect to host 'b'"), "{words}");
        exam.forget("2/a");
        assert!(exam.is_over() && exam.complaint().is_none(), "who has gone is no reason");
    }

    #[test]
    fn of_many_hosts_some_are_tried() {
        assert_eq!(partners(3), [0, 1, 2]);
        assert_eq!(partners(ALL_PAIRS_MAX).len(), ALL_PAIRS_MAX);
        let some = partners(1000);
        assert!(some.len() <= 10 && some.contains(&999) && some.iter().all(|&one| one < 1000));
    }
}
