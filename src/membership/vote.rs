//! The verdict round when an epoch breaks: those that are left tell each other up to where operations were released,
//! and the greatest mark of each process set counts for all. (What anybody has released everybody holds, see
//! [`super::ledger`], so it can be completed everywhere; the rest fails everywhere.)
//!
//! Ballots rise along the tree of the global set with the dead left out: whoever has lost its parent turns to the
//! next ancestor that lives, and where the root is dead the lowest rank that lives takes its place. There the verdict
//! is made, and comes down to whoever has sent a ballot. Who has died is told with the cause of the end, so all see
//! the same tree. Others may have died with it (a host was lost): a rank asks for links to those whose ballots it
//! waits for, and leaves out whoever has ended or says nothing for [`BALLOTS_NS`]. A rank that has risen and hears no
//! verdict for [`VERDICT_NS`], which is long enough for some levels of such waits above it, goes by what it knows.
#![forbid(unsafe_code)]

use crate::types::{Rank, SetId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long a rank waits for the ballots of others.
pub const BALLOTS_NS: u64 = 500_000_000;
/// How long a rank waits for the verdict.
pub const VERDICT_NS: u64 = 4 * BALLOTS_NS;

/// Up to where the operations of each process set were released; ascending, sets of which nothing was released left
/// out.
pub type Marks = Vec<(SetId, u64)>;

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Others are to be heard first.
    Wait,
    /// Send this rank the ballot.
    Rise(Rank),
    /// This rank makes the verdict: its ballot is.
    Decide,
}

/// One rank's part in the round.
#[derive(Debug)]
pub struct Vote {
    me: Rank,
    /// The tree of the global set.
    parents: Arc<[Option<Rank>]>,
    dead: BTreeSet<Rank>,
    /// This rank's own marks with those that came in ballots.
    marks: Marks,
    sealed: bool,
    heard: BTreeSet<Rank>,
    /// Whose ballots are waited for, as long as nobody else has died.
    children: Option<Vec<Rank>>,
    sent: Option<Rank>,
}

impl Vote {
    /// Nobody has died yet. A parent's number is lower than its child's.
    #[must_use]
    pub fn new(me: Rank, parents: Arc<[Option<Rank>]>) -> Vote {
        debug_assert!((0..).zip(parents.iter()).all(|(rank, parent)| parent.is_none_or(|p| p.0 < rank)));
        Vote {
            me,
            parents,
            dead: BTreeSet::new(),
            marks: Marks::new(),
            sealed: false,
            heard: BTreeSet::new(),
            children: None,
            sent: None,
        }
    }

    /// This rank releases nothing more.
    pub fn seal(&mut self, marks: Marks) {
        self.sealed = true;
        self.add(marks);
    }

    /// Whether it has done so.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// A rank takes no part.
    pub fn without(&mut self, rank: Rank) {
        if self.dead.insert(rank) {
            self.children = None;
        }
    }

    /// A ballot has come.
    pub fn hear(&mut self, from: Rank, marks: Marks) {
        self.heard.insert(from);
        if self.add(marks) {
            // Whoever was told less is told again.
            self.sent = None;
        }
    }

    /// Whether it adds anything.
    fn add(&mut self, marks: Marks) -> bool {
        let before = self.marks.clone();
        let mut all: BTreeMap<SetId, u64> = std::mem::take(&mut self.marks).into_iter().collect();
        for (set, mark) in marks {
            let greatest = all.entry(set).or_default();
            *greatest = mark.max(*greatest);
        }
        self.marks = all.into_iter().collect();
        self.marks != before
    }

    /// Whose ballots are waited for.
    pub fn missing(&self) -> impl Iterator<Item = Rank> + '_ {
        self.children.iter().flatten().copied().filter(|child| !self.heard.contains(child))
    }

    /// What is known so far.
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.marks.clone()
    }

    /// Who has sent a ballot.
    pub fn voters(&self) -> impl Iterator<Item = Rank> + '_ {
        self.heard.iter().copied()
    }

    /// What is to be done, once this rank has begun to vote.
    pub fn progress(&mut self) -> Progress {
        let children = self.children.take().unwrap_or_else(|| self.living_children());
        let complete = children.iter().all(|child| self.heard.contains(child));
        self.children = Some(children);
        let parent = self.parent_of(self.me);
        match parent {
            _ if !complete => Progress::Wait,
            None => Progress::Decide,
            Some(to) if self.sent == Some(to) => Progress::Wait,
            Some(to) => {
                self.sent = Some(to);
                Progress::Rise(to)
            }
        }
    }

    fn living_children(&self) -> Vec<Rank> {
        let all = (0..self.parents.len() as u32).map(Rank);
        all.filter(|rank| !self.dead.contains(rank) && self.parent_of(*rank) == Some(self.me)).collect()
    }

    /// The next ancestor that lives, or the lowest rank that does; none for that one. A rank that counts itself dead
    /// (the others do) asks all the same.
    fn parent_of(&self, rank: Rank) -> Option<Rank> {
        let mut at = self.parents[rank.0 as usize];
        while let Some(above) = at.filter(|above| self.dead.contains(above)) {
            at = self.parents[above.0 as usize];
        }
        let lowest = || (0..self.parents.len() as u32).map(Rank).find(|rank| !self.dead.contains(rank));
        at.or_else(|| lowest().filter(|lowest| *lowest != rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(mark: u64) -> Marks {
        vec![(SetId(0), mark)]
    }

    /// Ranks of a tree of fan-in two, each with its own mark; `dead` of them have died, and all know it.
    fn round(size: u32, dead: &[u32]) {
        let parents: Arc<[Option<Rank>]> =
            (0..size).map(|rank| rank.checked_sub(1).map(|before| Rank(before / 2))).collect();
        let alive: Vec<u32> = (0..size).filter(|rank| !dead.contains(rank)).collect();
        let mut votes: BTreeMap<u32, Vote> =
            alive.iter().map(|&rank| (rank, Vote::new(Rank(rank), Arc::clone(&parents)))).collect();
        for (&rank, vote) in &mut votes {
            dead.iter().for_each(|&who| vote.without(Rank(who)));
            vote.seal(marks(u64::from(rank * 7 % 5)));
        }
        let mut decided = None;
        let mut told = BTreeSet::new();
        for _ in 0..size + 1 {
            for &rank in &alive {
                match votes.get_mut(&rank).unwrap().progress() {
                    Progress::Wait => {}
                    Progress::Rise(to) => {
                        let ballot = votes[&rank].marks();
                        votes.get_mut(&to.0).expect("nobody asks the dead").hear(Rank(rank), ballot);
                        told.insert(rank);
                    }
                    Progress::Decide => assert!(*decided.get_or_insert(rank) == rank, "one decides"),
                }
            }
        }
        let greatest = alive.iter().map(|rank| u64::from(rank * 7 % 5)).max().unwrap_or(0);
        let decided = decided.expect("one decides");
        assert_eq!(decided, alive[0]);
        assert_eq!(votes[&decided].marks(), marks(greatest), "{size} ranks without {dead:?}");
        assert_eq!(told.len(), alive.len() - 1, "everybody else has voted");
    }

    #[test]
    fn all_ballots_come_together_whoever_has_died() {
        for size in 1..=12 {
            (0..size).for_each(|one| {
                if size > 1 {
                    round(size, &[one]);
                }
                (0..one).filter(|_| size > 2).for_each(|two| round(size, &[one, two]));
            });
        }
        round(9, &[0, 1, 2]);
    }

    #[test]
    fn who_has_lost_its_parent_turns_to_the_next() {
        let parents: Arc<[Option<Rank>]> = Arc::new([None, Some(Rank(0)), Some(Rank(1))]);
        let mut vote = Vote::new(Rank(2), Arc::clone(&parents));
        vote.seal(marks(3));
        assert_eq!(vote.progress(), Progress::Rise(Rank(1)));
        assert_eq!(vote.progress(), Progress::Wait);
        vote.without(Rank(1));
        assert_eq!(vote.progress(), Progress::Rise(Rank(0)));
        vote.without(Rank(0));
        assert_eq!(vote.progress(), Progress::Decide);
        let mut blamed = Vote::new(Rank(0), parents);
        blamed.seal(marks(1));
        blamed.without(Rank(0));
        assert_eq!(blamed.progress(), Progress::Rise(Rank(1)), "it asks those that go on");
    }
}
