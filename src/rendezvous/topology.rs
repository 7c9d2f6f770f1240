//! Who shares a host with whom: a pure function of the table, the same on every rank.
#![forbid(unsafe_code)]

use super::card::Table;
use crate::types::Rank;
use std::collections::HashMap;

/// One rank's coordinates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Coordinates {
    /// Its host, counted in order of first appearance.
    pub host: u32,
    /// This rank, among those on its host.
    pub local_rank: u32,
    /// Its host, among the hosts that have this local rank.
    pub cross_rank: u32,
    /// Hosts that have this local rank.
    pub cross_size: u32,
}

/// Hosts and who is on them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Topology {
    /// Each rank's coordinates.
    pub ranks: Vec<Coordinates>,
    /// The ranks of each host, ascending.
    pub hosts: Vec<Vec<Rank>>,
    /// Whether all hosts have equally many ranks.
    pub homogeneous: bool,
    /// Where variables said otherwise than the ranks found; to be logged by rank 0.
    pub contradictions: Vec<String>,
}

impl Topology {
    /// The topology of these ranks. Local ranks are those that the launcher gave, where they fit the hosts
    /// found (each host's are 0, 1, 2, ...); otherwise they count by rank.
    #[must_use]
    pub fn of(table: &Table) -> Topology {
        let mut numbers = HashMap::new();
        let mut hosts: Vec<Vec<Rank>> = Vec::new();
        for card in &table.cards {
            let host = *numbers.entry(card.host_id.as_str()).or_insert(hosts.len());
            if host == hosts.len() {
                hosts.push(Vec::new());
            }
            hosts[host].push(card.rank);
        }
        let mut contradictions = Vec::new();
        let mut ranks =
            vec![Coordinates { host: 0, local_rank: 0, cross_rank: 0, cross_size: 0 }; table.cards.len()];
        for (host, members) in hosts.iter().enumerate() {
            for (rank, local_rank) in local_ranks(table, members, &mut contradictions) {
                ranks[rank.0 as usize] =
                    Coordinates { host: host as u32, local_rank, cross_rank: 0, cross_size: 0 };
            }
        }
        let widest = hosts.iter().map(Vec::len).max().unwrap_or(0);
        let mut across = vec![0; widest];
        // Host by host, so that the cross rank follows the order of hosts.
        for members in &hosts {
            for rank in members {
                let place = &mut ranks[rank.0 as usize];
                place.cross_rank = across[place.local_rank as usize];
                across[place.local_rank as usize] += 1;
            }
        }
        for place in &mut ranks {
            place.cross_size = across[place.local_rank as usize];
        }
        let homogeneous = hosts.iter().all(|members| members.len() == widest);
        Topology { ranks, hosts, homogeneous, contradictions }
    }

    /// How many ranks share this rank's host.
    #[must_use]
    pub fn local_size(&self, rank: Rank) -> u32 {
        self.hosts[self.ranks[rank.0 as usize].host as usize].len() as u32
    }

    /// Whether two ranks share memory.
    #[must_use]
    pub fn same_host(&self, a: Rank, b: Rank) -> bool {
        self.ranks[a.0 as usize].host == self.ranks[b.0 as usize].host
    }
}

fn local_ranks(table: &Table, members: &[Rank], contradictions: &mut Vec<String>) -> Vec<(Rank, u32)> {
    let hint = |rank: &Rank| table.cards[rank.0 as usize].hints;
    let mut taken = vec![false; members.len()];
    // Not to be told is no contradiction: some launchers say only how many there are.
    let wrong = members.iter().find(|rank| {
        let hints = hint(rank);
        let fits =
            |local: u32| taken.get_mut(local as usize).is_some_and(|slot| !std::mem::replace(slot, true));
        hints.local_size.is_some_and(|size| size as usize != members.len())
            || !hints.local_rank.is_none_or(fits)
    });
    if let Some(rank) = wrong {
        let hints = hint(rank);
        let text = |v: Option<u32>| v.map_or("unset".to_owned(), |v| v.to_string());
        contradictions.push(format!(
            "{rank} was told local rank {} of {}, but {} ranks share its host ({}); local ranks are counted anew \
             (CAROLE_HOST_ID says which ranks share a host)",
            text(hints.local_rank),
            text(hints.local_size),
            members.len(),
            table.cards[rank.0 as usize].hostname,
        ));
    } else if let Some(told) = members.iter().map(|rank| Some((*rank, hint(rank).local_rank?))).collect() {
        return told;
    }
    members.iter().enumerate().map(|(i, rank)| (*rank, i as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::card::tests::card;
    use crate::rendezvous::place::Hints;
    use crate::types::Epoch;

    fn table(hosts: &[&str]) -> Table {
        let cards = hosts
            .iter()
            .enumerate()
            .map(|(rank, host)| {
                let mut card = card(rank as u32);
                card.host_id = (*host).to_owned();
                card.hints = Hints::default();
                card
            })
            .collect();
        Table {
            epoch: Epoch(0),
            job: Default::default(),
            cards,
            knobs: Vec::new(),
            simd: 0,
            sets: Default::default(),
        }
    }

    #[test]
    fn even_hosts() {
        let topology = Topology::of(&table(&["a", "a", "b", "b"]));
        assert!(topology.homogeneous);
        assert_eq!(topology.hosts, [[Rank(0), Rank(1)], [Rank(2), Rank(3)]]);
        assert_eq!(topology.ranks[3], Coordinates { host: 1, local_rank: 1, cross_rank: 1, cross_size: 2 });
        assert_eq!(topology.local_size(Rank(3)), 2);
        assert!(topology.same_host(Rank(0), Rank(1)) && !topology.same_host(Rank(1), Rank(2)));
    }

    #[test]
    fn interleaved_and_uneven_hosts() {
        let topology = Topology::of(&table(&["b", "a", "b", "b"]));
        assert!(!topology.homogeneous);
        let found: Vec<_> =
            topology.ranks.iter().map(|c| (c.host, c.local_rank, c.cross_rank, c.cross_size)).collect();
        assert_eq!(found, [(0, 0, 0, 2), (1, 0, 1, 2), (0, 1, 0, 1), (0, 2, 0, 1)]);
    }

    #[test]
    fn given_local_ranks_are_kept_where_they_fit() {
        let mut table = table(&["a", "a"]);
        for (rank, local) in [(0, 1), (1, 0)] {
            table.cards[rank].hints =
                Hints { local_rank: Some(local), local_size: Some(2), ..Hints::default() };
        }
        let topology = Topology::of(&table);
        assert_eq!(topology.ranks[0].local_rank, 1);
        assert!(topology.contradictions.is_empty());
    }

    #[test]
    fn who_is_told_only_how_many_share_its_host_is_not_contradicted() {
        let mut table = table(&["a", "a"]);
        for card in &mut table.cards {
            card.hints = Hints { local_size: Some(2), ..Hints::default() };
        }
        table.cards[0].hints.local_rank = Some(1);
        let topology = Topology::of(&table);
        assert_eq!((topology.ranks[0].local_rank, topology.ranks[1].local_rank), (0, 1));
        assert!(topology.contradictions.is_empty(), "{:?}", topology.contradictions);
    }

    #[test]
    fn given_local_ranks_that_contradict_are_counted_anew_and_told() {
        for hints in [
            Hints { local_rank: Some(0), local_size: Some(2), ..Hints::default() },
            Hints { local_rank: Some(7), ..Hints::default() },
            Hints { local_rank: Some(1), local_size: Some(3), ..Hints::default() },
        ] {
            let mut table = table(&["a", "a"]);
            table.cards[0].hints = hints;
            table.cards[1].hints = hints;
            let topology = Topology::of(&table);
            assert_eq!((topology.ranks[0].local_rank, topology.ranks[1].local_rank), (0, 1));
            assert!(topology.contradictions[0].contains("rank 0"), "{:?}", topology.contradictions);
        }
    }
}
