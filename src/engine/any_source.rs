//! Receives from any rank. Such a receive waits until some member of its set is known to have sent a message of its tag
//! (it is here, on its way, or announced), and is from then on an ordinary receive from that member.
//!
//! *Order.* Receives of one tag meet messages in the order in which they were submitted, as in MPI: one that names its
//! rank waits, too, while one from any rank was submitted before it.
//!
//! *Fairness.* Members are looked at in turn, the one behind the last source first, so that nobody who sends all the
//! time keeps another from being heard.
//!
//! *The end.* When all other members have left, and nothing of theirs is here, nothing can come any more: the receive ends
//! with `Shutdown`. A broken epoch ends it as it ends all else.
#![forbid(unsafe_code)]

use super::Engine;
use super::message::MessageSubmission;
use crate::coordinator::OpId;
use crate::error::{Error, Result};
use crate::hash::Map;
use crate::types::{Rank, SetId};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

/// Receives that have not met their senders.
#[derive(Default)]
pub(super) struct Unmatched {
    /// By set and tag, in the order of submission. The first of each queue is from any rank.
    queues: BTreeMap<(SetId, u32), VecDeque<MessageSubmission>>,
    /// The member that was heard last, by set and tag.
    heard: Map<(SetId, u32), u32>,
}

impl Unmatched {
    /// Whether a later receive of this tag has to wait.
    pub(super) fn has(&self, set: SetId, tag: u32) -> bool {
        self.queues.contains_key(&(set, tag))
    }

    /// The operations of a set that go on without a rank.
    pub(super) fn without(&self, set: SetId, who: Rank) -> impl Iterator<Item = OpId> {
        let of = self.queues.range((set, 0)..=(set, u32::MAX)).flat_map(|(_, queue)| queue);
        of.filter(move |m| m.peer != Some(who)).map(|m| m.op)
    }

    /// The receive of an operation, if it waits here.
    pub(super) fn find(&self, op: OpId) -> Option<&MessageSubmission> {
        self.queues.values().flatten().find(|m| m.op == op)
    }

    /// The first of a queue has met its sender.
    fn take_first(&mut self, key: (SetId, u32)) {
        if let Entry::Occupied(mut queue) = self.queues.entry(key) {
            queue.get_mut().pop_front();
            if queue.get().is_empty() {
                queue.remove();
            }
        }
    }

    /// The operation has ended without a sender.
    pub(super) fn forget(&mut self, op: OpId) {
        self.queues.retain(|_, queue| {
            queue.retain(|m| m.op != op);
            !queue.is_empty()
        });
    }
}

impl Engine {
    /// A receive waits for its sender, or for those of its tag that came before it.
    pub(super) fn wait_for_source(&mut self, m: &MessageSubmission) {
        if let Some(operation) = self.ops.get_mut(&m.op) {
            operation.unmatched = true;
        }
        // As for any receive: only a rank to which there is a link is missed.
        let ranks = std::sync::Arc::clone(&self.sets[&m.set].ranks);
        for &peer in ranks.iter().filter(|&&peer| m.peer.is_none_or(|named| named == peer)) {
            if peer != self.me && !self.has_departed(peer) {
                self.links.request(peer);
            }
        }
        self.unmatched.queues.entry((m.set, m.tag)).or_default().push_back(*m);
        self.match_queue((m.set, m.tag));
    }

    /// Gives messages that are here or announced to those that wait for any. Returns whether there were any.
    pub(super) fn match_sources(&mut self) -> bool {
        if self.unmatched.queues.is_empty() || self.broken.is_some() {
            return false;
        }
        let mut moved = false;
        let mut next = self.unmatched.queues.keys().next().copied();
        while let Some(key) = next {
            moved |= self.match_queue(key);
            let behind = (Bound::Excluded(key), Bound::Unbounded);
            next = self.unmatched.queues.range(behind).next().map(|(&key, _)| key);
        }
        moved
    }

    fn match_queue(&mut self, key: (SetId, u32)) -> bool {
        let mut moved = false;
        while let Some(&first) = self.unmatched.queues.get(&key).and_then(VecDeque::front) {
            let Some(source) = self.source_of(&first) else { break };
            moved = true;
            self.unmatched.take_first(key);
            if let Some(operation) = self.ops.get_mut(&first.op) {
                operation.unmatched = false;
            }
            match source {
                Ok(peer) => self.exchange(&first, peer),
                Err(error) => self.end(first.op, Err(error)),
            }
        }
        moved
    }

    /// Whom a receive is to hear now, or why there is nobody left; `None` to wait.
    fn source_of(&mut self, m: &MessageSubmission) -> Option<Result<Rank>> {
        if let Some(peer) = m.peer {
            let gone = self.cannot_reach(m, peer);
            return Some(if gone { Err(Error::Shutdown(Some(peer))) } else { Ok(peer) });
        }
        let ranks = std::sync::Arc::clone(&self.sets.get(&m.set)?.ranks);
        let first = self.unmatched.heard.get(&(m.set, m.tag)).map_or(0, |&last| last as usize + 1);
        for member in (0..ranks.len()).map(|i| (first + i) % ranks.len()) {
            let peer = ranks[member];
            if peer != self.me && self.has_sent(m, peer) {
                self.unmatched.heard.insert((m.set, m.tag), member as u32);
                return Some(Ok(peer));
            }
        }
        let all_gone = ranks.iter().all(|&peer| peer == self.me || self.cannot_reach(m, peer));
        let leaver = self.leavers.iter().map(|&(who, _)| who).find(|who| ranks.contains(who));
        all_gone.then_some(Err(Error::Shutdown(leaver)))
    }

    /// Whether a rank is known to have sent what this receive would take.
    fn has_sent(&self, m: &MessageSubmission, peer: Rank) -> bool {
        let stream = self.next_stream(m, peer);
        match self.has_departed(peer) {
            // It sends nothing any more of what it had only begun or announced.
            true => self.links.holds(peer, stream),
            false => self.links.announces(peer, stream),
        }
    }
}
