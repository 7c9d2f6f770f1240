//! Tensors that lie in shared memory from the start: their ranks take them from the arenas of their boards
//! ([`crate::runtime::allocate`]), and an allreduce of them is done where they lie, without a copy.
//!
//! Whether the members of a set ask each other where their tensors lie, which costs a tick of each batch, is agreed: a
//! member calls for it when it first submits tensors that lie there, and from where that stands in the agreed log all
//! do. A member that never does never calls, and nothing changes for anybody.
#![forbid(unsafe_code)]

use super::batch::Flight;
use super::boards::Seating;
use super::calls::Call;
use super::operation::TensorMemory;
use super::plan::BatchShape;
use super::sets::ProcessSet;
use super::{Engine, Submission};
use crate::coordinator::Agreed;
use crate::transport::board::BoardMemory;
use crate::types::{Collective, SetId, Time};
use std::sync::Arc;

/// Whether a set asks where tensors lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lending {
    No,
    /// This member has called for it.
    Called,
    Agreed,
}

impl Engine {
    /// This rank's board, of which tensors in shared memory are taken.
    #[must_use]
    pub fn own_board(&self) -> Option<&Arc<BoardMemory>> {
        self.boards.own()
    }

    /// Calls for lending, if this is the first operation of a set for which it pays.
    pub(super) fn offer_to_lend(&mut self, submission: &Submission<'_>, now: Time) {
        // This is looked at first, since it stays as it is once it is agreed.
        let may = |set: &ProcessSet| set.lending == Lending::No && !matches!(set.seating, Seating::None);
        if !self.sets.get(&submission.set).is_some_and(may) {
            return;
        }
        let bytes: u64 = submission.tensors.iter().map(|tensor| tensor.input.len()).sum();
        if bytes < self.setup.lent_bytes
            || submission.signature.collective != Collective::Allreduce
            || !self.lie_in_arena(submission.tensors)
        {
            return;
        }
        let Some(set) = self.sets.get_mut(&submission.set) else { return };
        if let Some(coordinator) = &mut set.coordinator
            && Call::Lend.make(coordinator, now)
        {
            set.lending = Lending::Called;
        }
    }

    /// Whether all of these, and the place of their results, lie in this rank's arena.
    pub(super) fn lie_in_arena(&self, tensors: &[TensorMemory]) -> bool {
        let Some(own) = self.boards.own() else { return false };
        tensors.iter().all(|tensor| {
            let lies = |region: crate::memory::Region| {
                region.is_empty() || own.find(region.as_ptr(), region.len()).is_some()
            };
            lies(tensor.input) && tensor.output.is_some_and(lies)
        })
    }

    /// The call stands in the agreed log. Where some had joined, who could not call, it is made again later.
    pub(super) fn lending_agreed(&mut self, id: SetId, agreed: &Agreed) {
        if let Some(set) = self.sets.get_mut(&id).filter(|_| agreed.op.is_some()) {
            set.lending = if agreed.absent.is_empty() { Lending::Agreed } else { Lending::No };
        }
    }

    /// Whether the members tell each other where the tensors of such a batch lie: a function of what is agreed.
    pub(super) fn asks_where(&self, id: SetId, shape: &BatchShape<'_>) -> bool {
        self.sets[&id].lending == Lending::Agreed
            && shape.collective == Collective::Allreduce
            && shape.total_bytes >= self.setup.lent_bytes
    }

    /// What is under way in a set, or in all, is about to fail here: peers that do not know of it yet must not reach
    /// the tensors any more, which are their owner's again. Where something else goes on, their owner shares them
    /// still, and they stay as they are.
    pub(super) fn take_back_lent(&self, of: Option<SetId>) {
        let batches = self.flights.iter().flatten().filter_map(|flight| match flight {
            Flight::Batch(flight) => flight.lends.then_some(flight.set),
            Flight::Message { .. } => None,
        });
        let (mut fails, mut goes_on) = (false, false);
        for set in batches.chain(self.sets_that_lend_in_channels()) {
            match of.is_none_or(|of| of == set) {
                true => fails = true,
                false => goes_on = true,
            }
        }
        if let Some(own) = self.boards.own().filter(|_| fails && !goes_on) {
            own.take_back();
        }
    }
}
