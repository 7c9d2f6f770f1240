//! Uniform completion: what is done here is told to its caller when it is done everywhere, and when the epoch breaks
//! the verdict of those that are left says what is complete. The rules are in [`crate::membership::ledger`] and
//! [`crate::membership::vote`]; here is what connects them with operations and links.
//!
//! What stands and what goes through channels is in no log. It is settled by what all members have put on their boards:
//! when the epoch is over, a member does nothing more there, and only then votes; so at the verdict nothing moves there
//! any more, and all that are left find the same. (Unless one that had been silent for so long that it was given up
//! awakes in just that moment.)
#![forbid(unsafe_code)]

use super::Engine;
use super::batch::push_bytes;
use super::sets::ProcessSet;
use crate::coordinator::{self, Agreed, OpId};
use crate::error::Cause;
use crate::limits::BALLOT_SETS_MAX;
use crate::membership::ledger::{Ledger, Step};
use crate::membership::vote::Marks;
use crate::types::{Place, Rank, SetId};
use crate::wire;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// The tree of the global set, as the verdict round wants it.
pub(super) fn parents(hosts: &[u32]) -> Arc<[Option<Rank>]> {
    coordinator::tree::parents(hosts).into_iter().map(|parent| parent.map(Rank)).collect()
}

impl Engine {
    /// The next operation of a set's log, whether this rank takes part or not; the same place on every member.
    /// `agreed` is what was agreed on; a join is not.
    pub(super) fn enter_ledger(&mut self, id: SetId, op: Option<OpId>, agreed: Option<&Agreed>) {
        let is_covered = |set: &ProcessSet| {
            set.size() > 1 && set.departed.is_none() && self.setup.uniform.covers(&set.hosts)
        };
        if !self.sets.get(&id).is_some_and(is_covered) {
            return;
        }
        let is_evident = agreed.is_some_and(|agreed| self.is_evident(id, agreed));
        let Some(set) = self.sets.get(&id) else { return };
        let ledger = match self.ledgers.entry(id) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let Some(coordinator) = &set.coordinator else { return };
                let rank = |member: crate::types::Member| set.ranks[member.0 as usize];
                let parent = coordinator.parent();
                let children = coordinator.neighbours().filter(|&member| Some(member) != parent).map(rank);
                place.insert(Ledger::new(parent.map(rank), children))
            }
        };
        let place = ledger.enter(op, is_evident);
        if let Some(operation) = op.and_then(|op| self.ops.get_mut(&op)) {
            operation.place = Some(place);
        }
    }

    /// Whether all members can complete an operation that one has completed: it goes over the boards, and some bytes do,
    /// so that nobody is through before all have entered. A function of what is agreed.
    fn is_evident(&mut self, id: SetId, agreed: &Agreed) -> bool {
        agreed.signature.place == Place::Host
            && !agreed.is_plan()
            && !agreed.is_inline()
            && self.goes_over_boards(id, &agreed.signature)
            && self.has_bytes(id, agreed)
    }

    /// Whether an operation has any byte on any member.
    fn has_bytes(&mut self, id: SetId, agreed: &Agreed) -> bool {
        let (me, size) = (self.sets[&id].me(), self.sets[&id].size());
        let bytes = &mut self.tensor_bytes;
        let any = (0..agreed.signature.tensors.len()).any(|t| push_bytes(agreed, t, me, size, bytes) > 0);
        bytes.clear();
        any
    }

    /// The operation is over here. Whether its caller is to be told later.
    pub(super) fn hold(&mut self, op: OpId, is_ok: bool) -> bool {
        let Some(operation) = self.ops.get(&op) else { return false };
        let (Some(place), Some(ledger)) = (operation.place, self.ledgers.get_mut(&operation.set)) else {
            return false;
        };
        ledger.hold(place);
        is_ok
    }

    /// Passes marks on and releases what may be.
    pub(super) fn turn_ledgers(&mut self) -> bool {
        let mut moved = false;
        let mut ledgers = std::mem::take(&mut self.ledgers);
        for (&set, ledger) in &mut ledgers {
            while let Some(step) = ledger.poll() {
                moved = true;
                match step {
                    Step::Tell(to, mark) => {
                        wire::Message::Mark { set, mark }.encode(&mut self.encoded);
                        self.links.tell(to, &self.encoded);
                    }
                    Step::Release(op) => self.finish(op, Ok(())),
                }
            }
        }
        self.ledgers = ledgers;
        moved
    }

    /// A rank has told its mark.
    pub(super) fn hear_mark(&mut self, from: Rank, set: SetId, mark: u64) -> Result<(), Cause> {
        let agrees = self.agrees();
        match self.ledgers.get_mut(&set) {
            // What comes when the epoch is over counts no more: the sender votes, too.
            Some(ledger) if agrees => ledger.hear(from, mark).map_err(|what| Cause::Misbehaved(what.into())),
            // The set is gone here, or a member has left it.
            _ => Ok(()),
        }
    }

    /// A member has left: its set waits for nobody's marks any more.
    pub(super) fn dissolve_ledger(&mut self, set: SetId) {
        if let Some(ledger) = self.ledgers.get_mut(&set) {
            ledger.dissolve();
        }
    }

    /// The epoch is over, and this rank is about to say what it has released: it releases nothing more, and does
    /// nothing more that others could complete something by.
    pub(super) fn seal(&mut self) {
        self.close_channels();
        self.standings.withdraw_all(None);
        let marks = self.ledgers.iter().map(|(&set, ledger)| (set, ledger.limit()));
        let marks: Marks = marks.filter(|&(_, mark)| mark > 0).take(BALLOT_SETS_MAX).collect();
        self.membership.seal(marks);
    }

    /// Completes what the verdict says is complete everywhere.
    pub(super) fn commit(&mut self) {
        // A rank that was not turned since then has it still to do.
        self.finish_seats();
        let verdict = self.membership.verdict();
        let ledgers = std::mem::take(&mut self.ledgers);
        for (set, ledger) in ledgers {
            let place = verdict.binary_search_by_key(&set, |&(of, _)| of);
            let mark = place.map_or(0, |place| verdict[place].1).max(ledger.limit());
            for op in ledger.committed(mark) {
                self.finish(op, Ok(()));
            }
        }
    }
}
