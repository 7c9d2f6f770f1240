//! Leaving in an orderly way, here and elsewhere; and the links that it takes to notice who leaves otherwise.
//!
//! A rank that leaves says goodbye on all its links, everybody passes it on, and it lingers until its peers
//! have closed their links (they do so when they need nothing more of what it had sent). What was agreed
//! before and needs nothing more from it is finished; everything else of its process sets ends with `Shutdown`.
//!
//! Whether something was agreed before is a matter of order: the news of a departure must not overtake the
//! last agreement. So a set is closed by its coordinator's root, and *closed* travels down the tree behind the
//! agreements; a rank whose parent in the tree has left hears it from the parent's own goodbye, which is also
//! behind whatever the parent had passed on.
#![forbid(unsafe_code)]

use super::Engine;
use super::batch::Flight;
use super::links::LinkChange;
use crate::error::Error;
use crate::types::{GLOBAL_SET, Rank, SetId, Time};
use crate::wire;

impl Engine {
    /// Says goodbye to everybody. Operations in flight end with [`Error::Shutdown`]. Keep turning until
    /// [`Engine::is_gone`], within reason.
    pub fn leave(&mut self) {
        self.settle_standings(None);
        let clean = self.ops.is_empty()
            && self.flying == 0
            && !self.has_active_channels()
            && !self.standings.is_any_under_way();
        self.left = Some(clean);
        self.fail_all(&Error::Shutdown(None));
        if self.broken.is_none() {
            self.meet_neighbours();
            for place in 0..self.links.up().len() {
                let to = self.links.up()[place];
                let sent = self.sent_to(to);
                self.say(to, &wire::Message::Goodbye { who: self.me, clean, sent });
            }
        } else {
            for to in self.links.up().to_vec() {
                self.links.close(to);
            }
        }
        self.broken.get_or_insert(Error::Shutdown(None));
    }

    /// Asks for links to the neighbours in the tree of the global set, once: with the first traffic of this rank,
    /// or of any rank, since a new link is traffic, too. Only a rank to which there is a link is missed when
    /// its process ends or stops, so all ranks must hang together before anybody waits for anybody.
    pub(super) fn hang_together(&mut self) {
        if std::mem::replace(&mut self.hangs_together, true) {
            return;
        }
        let Some(set) = self.sets.get(&GLOBAL_SET) else { return };
        let Some(coordinator) = &set.coordinator else { return };
        for member in coordinator.neighbours() {
            self.links.request(set.ranks[member.0 as usize]);
        }
    }

    /// Asks for links to the neighbours in the trees of agreement that this rank has never needed to talk to. A
    /// rank that vanished without a word to anybody would be taken for a dead one by whoever asks for it next.
    fn meet_neighbours(&mut self) {
        for set in self.sets.values() {
            // Also where nothing is agreed any more, because another has left: whoever comes late has not heard of it.
            for &to in set.neighbours.iter().filter(|&&rank| !self.membership.has_departed(rank)) {
                self.links.request(to);
                if self.links.is_awaited(to) && !self.unmet.contains(&to) {
                    self.unmet.push(to);
                }
            }
        }
    }

    /// After the goodbye: those whose links come up late must hear it, too, behind the goodbyes that came before it: who
    /// left because another had left is not to blame. About the others this rank has nothing to say any more.
    pub(super) fn linger(&mut self, changes: &mut Vec<LinkChange>) {
        let clean = self.left.unwrap_or_default();
        for change in changes.drain(..) {
            let (LinkChange::Up(peer) | LinkChange::Down(peer, _) | LinkChange::Unreachable { peer, .. }) =
                change;
            self.unmet.retain(|&rank| rank != peer);
            if let LinkChange::Up(_) = change {
                for place in 0..self.leavers.len() {
                    let (who, clean) = self.leavers[place];
                    if who != peer {
                        self.say(peer, &wire::Message::Goodbye { who, clean, sent: 0 });
                    }
                }
                let sent = self.sent_to(peer);
                self.say(peer, &wire::Message::Goodbye { who: self.me, clean, sent });
            }
        }
    }

    /// Whether nothing of this rank is under way any more, nobody holds a link to it, and it waits for none.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.links.up().is_empty() && self.unmet.is_empty()
    }

    /// A neighbour has sent the goodbye of a rank, perhaps its own.
    pub(super) fn hear_goodbye(&mut self, peer: Rank, who: Rank, clean: bool, sent: u64, now: Time) {
        if self.left.is_some() {
            if peer == who {
                // Both have left: neither needs the link.
                self.links.close(peer);
            }
            return;
        }
        self.membership.goodbye(peer, who, clean);
        if self.membership.has_departed(who) && self.leavers.iter().all(|&(known, _)| known != who) {
            self.leavers.push((who, clean));
        }
        if peer != who {
            return;
        }
        self.farewells.insert(who, sent);
        for id in self.set_ids().collect::<Vec<SetId>>() {
            let Some(set) = self.sets.get(&id) else { continue };
            let parent = set.coordinator.as_ref().and_then(|c| c.parent()).map(|m| set.ranks[m.0 as usize]);
            if parent == Some(who) {
                self.close_set(id, who, now);
            }
        }
    }

    /// The coordinator of a set has closed it.
    pub(super) fn hear_closed(&mut self, peer: Rank, id: SetId, who: Rank, now: Time) {
        let Some(set) = self.sets.get(&id) else { return };
        let parent = set.coordinator.as_ref().and_then(|c| c.parent()).map(|m| set.ranks[m.0 as usize]);
        if parent == Some(peer) && set.member_of(who).is_some() {
            self.close_set(id, who, now);
        }
    }

    /// Whether a rank is known to have left.
    pub(super) fn has_departed(&self, who: Rank) -> bool {
        self.membership.has_departed(who)
    }

    /// Whether a rank has left with nothing under way.
    pub(super) fn has_left_cleanly(&self, who: Rank) -> bool {
        self.leavers.iter().any(|&(leaver, clean)| leaver == who && clean)
    }

    /// A rank has left; heard of for the first time.
    pub(super) fn depart(&mut self, who: Rank, clean: bool, now: Time) {
        if self.links.is_dead(who) {
            // No link to it could be made, and now it is known why.
            self.fail_with(who);
        }
        self.departing.push(who);
        let concerned: Vec<SetId> =
            self.sets.iter().filter(|(_, set)| set.member_of(who).is_some()).map(|(&id, _)| id).collect();
        for id in concerned {
            let set = self.sets.get_mut(&id).expect("just seen");
            set.departed.get_or_insert(who);
            self.dissolve_ledger(id);
            self.leave_channels(id, who);
            self.fail_standings(Some(id), Some(who), &Error::Shutdown(Some(who)));
            let Some(set) = self.sets.get(&id) else { continue };
            if !clean {
                // It takes no further part in what had been agreed.
                self.close_set(id, who, now);
                self.fail_set(id, Some(who), &Error::Shutdown(Some(who)));
            } else if set.coordinator.as_ref().is_some_and(|c| c.parent().is_none()) {
                self.close_set(id, who, now);
            }
        }
    }

    /// No agreement follows in this set: ends what was not agreed, and passes the news down the tree.
    fn close_set(&mut self, id: SetId, who: Rank, now: Time) {
        // What came before the news is run and passed on first.
        self.turn_coordinator(id, now);
        self.dissolve_ledger(id);
        let Some(set) = self.sets.get_mut(&id) else { return };
        // The first that left may not be the one whose news closes the set: others may have left for its sake.
        let first = self.leavers.iter().map(|&(leaver, _)| leaver).find(|&r| set.member_of(r).is_some());
        let who = *set.departed.get_or_insert(first.unwrap_or(who));
        let Some(coordinator) = set.coordinator.take() else { return };
        let parent = coordinator.parent();
        let ranks = std::sync::Arc::clone(&set.ranks);
        for child in coordinator.neighbours().filter(|&m| Some(m) != parent) {
            self.say(ranks[child.0 as usize], &wire::Message::Closed { set: id, who });
        }
        let mut open = self.ops_in_flight();
        open.retain(|op| self.ops[op].set == id && !self.ops[op].agreed);
        for op in open {
            self.end(op, Err(Error::Shutdown(Some(who))));
        }
    }

    /// Closes the links to ranks that have left, as soon as nothing may still come from them: for what is in flight, or
    /// messages that nobody has asked for yet.
    pub(super) fn close_departed(&mut self) {
        let mut place = 0;
        while place < self.departing.len() {
            let who = self.departing[place];
            if !self.has_all_of(who) {
                place += 1;
                continue;
            }
            self.end_unsent(who);
            if self.flights.iter().flatten().any(|flight| self.may_need(flight, who)) {
                place += 1;
                continue;
            }
            // Its sets may not be closed yet: what was agreed may still be on its way down the tree.
            let open = self.sets.values().any(|s| s.coordinator.is_some() && s.member_of(who).is_some());
            if open
                && self
                    .ops
                    .values()
                    .any(|o| self.sets.get(&o.set).is_some_and(|s| s.member_of(who).is_some()))
            {
                place += 1;
                continue;
            }
            self.links.close(who);
            self.departing.swap_remove(place);
        }
    }

    fn may_need(&self, flight: &Flight, who: Rank) -> bool {
        match flight {
            Flight::Batch(flight) => self.sets.get(&flight.set).is_some_and(|s| s.member_of(who).is_some()),
            Flight::Message { peer, .. } => *peer == who,
        }
    }

    /// The link to a rank that had left has ended, and with it what was still hoped for.
    pub(super) fn fail_with(&mut self, who: Rank) {
        let error = Error::Shutdown(Some(who));
        let sets: Vec<SetId> =
            self.sets.iter().filter(|(_, s)| s.member_of(who).is_some()).map(|(&id, _)| id).collect();
        for id in sets {
            let needed = self.flights.iter().flatten().any(|f| match f {
                Flight::Batch(flight) => flight.set == id,
                Flight::Message { peer, set, .. } => *set == id && *peer == who,
            });
            if needed {
                self.fail_set(id, Some(who), &error);
            }
        }
    }
}
