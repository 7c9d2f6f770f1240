//! Uniform completion within one process set, while its epoch lasts: an operation that has been agreed is *held* by
//! a member when its result is complete there and no peer reads its memory any more, and *released* when its caller
//! has it. Nobody releases before all members hold. A machine without I/O.
//!
//! All members run the same agreed log, so an operation is known by its place in it, and a mark is a number: a member
//! holds everything before it. Marks of holding rise along the tree of agreement as minima, and the root's comes
//! down as the mark of release. So what anybody has released everybody holds, and the members that are left
//! when the epoch breaks can complete it ([`super::vote`]). The price is a message up and one down for each
//! operation that is waited for alone; marks of operations in flight together share their messages.
//!
//! An operation is *evident* if a member that holds it knows without being told that all others can complete it, whoever
//! dies: over boards, where whoever is through has seen that all have done their part, and what they have done lies in
//! memory that outlives them. It is released without a mark, in its turn. Whether an operation is evident follows from
//! the log, so all members send the same marks.
//!
//! Not covered are messages between two ranks (a send is complete when its source may be used again, whatever
//! becomes of the receiver) and sets that a member has left, whose operations end as `engine/departure.rs` says.
#![forbid(unsafe_code)]

use crate::coordinator::OpId;
use crate::types::Rank;
use std::collections::VecDeque;

/// Which process sets complete uniformly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uniform {
    /// None.
    Never,
    /// Those that live on one host.
    WithinHosts,
    /// All.
    Always,
}

impl Uniform {
    /// Whether a set does whose members live on these hosts.
    #[must_use]
    pub fn covers(self, hosts: &[u32]) -> bool {
        match self {
            Uniform::Never => false,
            Uniform::WithinHosts => hosts.iter().all(|host| *host == hosts[0]),
            Uniform::Always => true,
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Tell this rank the mark: of holding to the parent, of release to a child.
    Tell(Rank, u64),
    /// Give the operation's result to its caller.
    Release(OpId),
}

#[derive(Debug)]
struct Entry {
    /// None where this member takes no part.
    op: Option<OpId>,
    held: bool,
    is_evident: bool,
}

/// The marks of one process set.
#[derive(Debug)]
pub struct Ledger {
    parent: Option<Rank>,
    /// Each child and up to where its part of the tree holds.
    children: Vec<(Rank, u64)>,
    /// What is agreed and not released, in the order of the log.
    open: VecDeque<Entry>,
    /// The places of those of them that no mark has risen for and that need one.
    unmarked: VecDeque<u64>,
    /// Up to where this member has released: the place of the first of `open`.
    released: u64,
    /// Up to where this member holds.
    held: u64,
    /// What the parent was told; at the root, what was concluded.
    risen: u64,
    /// Up to where may be released.
    limit: u64,
    /// What the children are being told, and how many know.
    told: (u64, usize),
    /// A member has left: nobody is waited for any more.
    dissolved: bool,
}

impl Ledger {
    /// Nothing is agreed yet.
    #[must_use]
    pub fn new(parent: Option<Rank>, children: impl Iterator<Item = Rank>) -> Ledger {
        let children: Vec<(Rank, u64)> = children.map(|rank| (rank, 0)).collect();
        Ledger {
            parent,
            told: (0, children.len()),
            children,
            open: VecDeque::new(),
            unmarked: VecDeque::new(),
            released: 0,
            held: 0,
            risen: 0,
            limit: 0,
            dissolved: false,
        }
    }

    /// The next operation of the log; returns its place.
    pub fn enter(&mut self, op: Option<OpId>, is_evident: bool) -> u64 {
        let place = self.end();
        self.open.push_back(Entry { op, held: op.is_none(), is_evident });
        if !is_evident {
            self.unmarked.push_back(place);
        }
        place
    }

    fn end(&self) -> u64 {
        self.released + self.open.len() as u64
    }

    /// The operation at this place is held here.
    pub fn hold(&mut self, place: u64) {
        if let Some(entry) = place.checked_sub(self.released).and_then(|at| self.open.get_mut(at as usize)) {
            entry.held = true;
        }
    }

    /// A rank has told its mark. The error says what cannot be.
    pub fn hear(&mut self, from: Rank, mark: u64) -> Result<(), &'static str> {
        if self.dissolved {
            return Ok(());
        }
        if self.parent == Some(from) {
            if mark > self.risen || mark < self.limit {
                return Err("a release of what is not held here");
            }
            self.limit = mark;
            return Ok(());
        }
        let end = self.end();
        match self.children.iter_mut().find(|child| child.0 == from) {
            Some(child) if (child.1..=end).contains(&mark) => child.1 = mark,
            Some(_) => return Err("a mark of operations that are not agreed"),
            None => return Err("a mark from outside the tree"),
        }
        Ok(())
    }

    /// A member has left: what is held is released, now and from now on.
    pub fn dissolve(&mut self) {
        self.dissolved = true;
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Step> {
        while self.open.get((self.held - self.released) as usize).is_some_and(|entry| entry.held) {
            self.held += 1;
        }
        if self.dissolved {
            return self.release_anything();
        }
        let all = self.children.iter().map(|child| child.1).fold(self.held, u64::min);
        if self.unmarked.front().is_some_and(|place| *place < all) {
            while self.unmarked.pop_front_if(|place| *place < all).is_some() {}
            self.risen = all;
            match self.parent {
                Some(parent) => return Some(Step::Tell(parent, all)),
                None => self.limit = all,
            }
        }
        if self.told.1 == self.children.len() && self.told.0 < self.limit {
            self.told = (self.limit, 0);
        }
        if let Some(child) = self.children.get(self.told.1) {
            self.told.1 += 1;
            return Some(Step::Tell(child.0, self.told.0));
        }
        while self.released < self.limit
            || self.open.front().is_some_and(|entry| entry.is_evident && entry.held)
        {
            if let Some(op) = self.pop() {
                return Some(Step::Release(op));
            }
        }
        None
    }

    fn pop(&mut self) -> Option<OpId> {
        let entry = self.open.pop_front().expect("only what was entered is held");
        self.released += 1;
        entry.op
    }

    /// Without the others the order does not matter.
    fn release_anything(&mut self) -> Option<Step> {
        while self.released < self.held {
            if let Some(op) = self.pop() {
                return Some(Step::Release(op));
            }
        }
        let mut open = self.open.iter_mut();
        open.find_map(|entry| entry.op.take_if(|_| entry.held)).map(Step::Release)
    }

    /// Up to where this member may have released: what it says when the epoch breaks.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit.max(self.released)
    }

    /// After the epoch: the operations that are held here and that the verdict completes.
    pub fn committed(&self, verdict: u64) -> impl Iterator<Item = OpId> + '_ {
        let count = verdict.saturating_sub(self.released) as usize;
        self.open.iter().take(count).filter(|entry| entry.held).filter_map(|entry| entry.op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(ledger: &mut Ledger) -> Vec<Step> {
        std::iter::from_fn(|| ledger.poll()).collect()
    }

    #[test]
    fn nothing_is_released_before_all_hold_it() {
        let mut root = Ledger::new(None, [Rank(1)].into_iter());
        let mut child = Ledger::new(Some(Rank(0)), std::iter::empty());
        let places = [root.enter(Some(OpId(7)), false), child.enter(Some(OpId(8)), false)];
        assert_eq!(places, [0, 0]);
        root.hold(0);
        assert_eq!(steps(&mut root), []);
        child.hold(0);
        assert_eq!(steps(&mut child), [Step::Tell(Rank(0), 1)]);
        root.hear(Rank(1), 1).unwrap();
        assert_eq!(steps(&mut root), [Step::Tell(Rank(1), 1), Step::Release(OpId(7))]);
        assert_eq!((root.limit(), child.limit()), (1, 0));
        child.hear(Rank(0), 1).unwrap();
        assert_eq!(steps(&mut child), [Step::Release(OpId(8))]);
    }

    #[test]
    fn what_is_evident_is_released_without_a_mark_in_its_turn() {
        let mut ledger = Ledger::new(Some(Rank(0)), [Rank(2)].into_iter());
        for op in 0..4 {
            ledger.enter(Some(OpId(op)), op != 1);
        }
        ledger.hold(2);
        assert_eq!(steps(&mut ledger), [], "another is before it");
        ledger.hold(0);
        assert_eq!(steps(&mut ledger), [Step::Release(OpId(0))]);
        ledger.hold(1);
        assert_eq!(steps(&mut ledger), [], "the child does not hold it yet");
        ledger.hear(Rank(2), 2).unwrap();
        assert_eq!(steps(&mut ledger), [Step::Tell(Rank(0), 2)]);
        assert_eq!(ledger.limit(), 1);
        ledger.hear(Rank(0), 2).unwrap();
        let told = [Step::Tell(Rank(2), 2), Step::Release(OpId(1)), Step::Release(OpId(2))];
        assert_eq!(steps(&mut ledger), told);
        ledger.hold(3);
        assert_eq!(steps(&mut ledger), [Step::Release(OpId(3))]);
        assert_eq!(ledger.limit(), 4, "what this member says when the epoch breaks");
    }

    #[test]
    fn the_verdict_completes_what_is_held() {
        let mut ledger = Ledger::new(None, [Rank(1)].into_iter());
        for op in 0..3 {
            ledger.enter((op != 1).then_some(OpId(op)), true);
        }
        ledger.hold(2);
        assert_eq!(ledger.committed(3).collect::<Vec<_>>(), [OpId(2)]);
        ledger.hold(0);
        assert_eq!(ledger.committed(2).collect::<Vec<_>>(), [OpId(0)]);
        assert_eq!(ledger.committed(3).collect::<Vec<_>>(), [OpId(0), OpId(2)]);
    }

    #[test]
    fn one_host_is_enough_within_hosts() {
        assert!(Uniform::WithinHosts.covers(&[3, 3, 3]) && !Uniform::WithinHosts.covers(&[0, 0, 1]));
        assert!(Uniform::Always.covers(&[0, 1]) && !Uniform::Never.covers(&[0, 0]));
    }
}
