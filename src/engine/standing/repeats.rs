//! Which operations stand, as the agreed log tells, and what the engine does for their starts.
#![forbid(unsafe_code)]

use super::share::{Share, slot_bytes};
use super::{Inner, Look, Standing, Standings, Start, lock};
use crate::coordinator::{Agreed, Coordinator, ENGINE_NAMES, PLAN_NAMES};
use crate::engine::boards::Seating;
use crate::engine::lending::Lending;
use crate::engine::operation::Ended;
use crate::engine::{Engine, Submission, TensorMemory};
use crate::error::Error;
use crate::hash::Map;
use crate::limits::{BOARD_NICHES_BYTES, CACHE_KEYS_MAX, NICHE_BYTES_MAX, NICHES_ASIDE_BYTES};
use crate::transport::board::{Niche, Room};
use crate::types::{Collective, Place, Rank, SetId, SharedSignature, TensorKey, Time};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// What a set remembers to see that an operation repeats, and where its niches lie.
#[derive(Default)]
pub(in crate::engine) struct Repeats {
    seen: Map<TensorKey, Seen>,
    /// Where the niches end that were given out.
    end: usize,
    /// Niches that were given back, by their size.
    free: Vec<(usize, usize)>,
    /// Bytes that lie aside on each board.
    aside: usize,
    /// Niches given out so far: their starts have numbers that no other niche's ever had.
    given: u64,
}

/// A few members: as many as small machines have processors.
const MEMBERS_FEW: u32 = 4;

/// How often a key of the response cache was agreed on in a row.
struct Seen {
    name: Arc<str>,
    signature: SharedSignature,
    /// The row counts or splits of all members.
    rows: Vec<u64>,
    times: u32,
}

impl Repeats {
    /// Whether this is the time from which on the operation stands.
    fn note(&mut self, agreed: &Agreed, stands_after: u32) -> bool {
        if self.seen.len() >= CACHE_KEYS_MAX && !self.seen.contains_key(&agreed.key) {
            self.seen.clear();
        }
        // Of others the values of a call are no rows.
        let rows = if agreed.signature.collective.has_free_rows() { &agreed.call.values[..] } else { &[] };
        let seen = self.seen.entry(agreed.key).or_insert_with(|| Seen {
            name: Arc::clone(&agreed.name),
            signature: Arc::clone(&agreed.signature),
            rows: rows.to_vec(),
            times: 0,
        });
        if seen.name != agreed.name || seen.signature != agreed.signature || seen.rows != rows {
            seen.name = Arc::clone(&agreed.name);
            seen.signature = Arc::clone(&agreed.signature);
            seen.rows.clear();
            seen.rows.extend_from_slice(rows);
            seen.times = 0;
        }
        seen.times = if agreed.absent.is_empty() { seen.times + 1 } else { 0 };
        seen.times >= stands_after
    }

    fn take(&mut self, room: Room) -> Option<(usize, u64)> {
        if self.aside + room.aside() > NICHES_ASIDE_BYTES {
            return None;
        }
        let size = room.behind_seat();
        let offset = match self.free.iter().position(|(of, _)| *of == size) {
            Some(at) => self.free.swap_remove(at).1,
            None if self.end + size <= BOARD_NICHES_BYTES => {
                self.end += size;
                self.end - size
            }
            None => return None,
        };
        self.given += 1;
        self.aside += room.aside();
        Some((offset, self.given << 32))
    }

    fn give_back(&mut self, standing: &Standing) {
        let room = standing.niche.room();
        self.free.push((room.behind_seat(), standing.offset));
        self.aside -= room.aside();
        standing.niche.release();
    }
}

impl Engine {
    /// The operations that stand.
    #[must_use]
    pub fn standings(&self) -> Arc<Standings> {
        Arc::clone(&self.standings)
    }

    /// An operation was agreed on. One that stood does not any more; one that repeats may from now on.
    pub(in crate::engine) fn note_agreed(&mut self, id: SetId, agreed: &Agreed) {
        let removed = self.standings.remove(id, &agreed.name);
        let may_stand = self.may_stand(id, agreed);
        let Some(set) = self.sets.get_mut(&id) else { return };
        if let Some(removed) = removed {
            set.repeats.give_back(&removed);
        }
        if !may_stand || !set.repeats.note(agreed, self.setup.stands_after) {
            return;
        }
        let Seating::Taken(seat) = &set.seating else { return };
        let (size, root) = (set.size(), set.root_of(&agreed.signature));
        let bytes = slot_bytes(agreed, size, root);
        let room = Room { bytes: bytes as usize, is_aside: bytes > self.setup.niche_bytes_within };
        let Some((offset, next)) = set.repeats.take(room) else { return };
        set.repeats.seen.remove(&agreed.key);
        let places = seat.places().iter().map(|place| place.niche(offset)).collect();
        let niche = Niche::new(set.me() as usize, places, room);
        let is_whole = niche.is_whole();
        let standing = self.standings.insert(Standing {
            set: id,
            name: Arc::clone(&agreed.name),
            signature: Arc::clone(&agreed.signature),
            ranks: Arc::clone(&set.ranks),
            niche,
            offset,
            share: Share::new(agreed, set.me(), size, root),
            inner: Mutex::new(Inner { next, start: None, is_over: false }),
        });
        // What this member submitted before it joined may stand only now; it will not start it.
        if !is_whole || set.coordinator.as_ref().is_some_and(Coordinator::has_joined) {
            self.standings.withdraw(&standing, &mut lock(&standing.inner));
        }
    }

    /// Whether such an operation can stand: a function of what is agreed.
    fn may_stand(&self, id: SetId, agreed: &Agreed) -> bool {
        let signature = &agreed.signature;
        // Names of a ring are told apart by order, and the same one may be in flight twice.
        let is_named =
            !agreed.name.starts_with([ENGINE_NAMES, PLAN_NAMES]) && !agreed.name.contains(".noname.");
        let is_small = || {
            let set = &self.sets[&id];
            let bytes = slot_bytes(agreed, set.size(), set.root_of(signature));
            // To reduce tensors where they lie takes less time, unless they are small.
            let lends = signature.collective == Collective::Allreduce && set.lending == Lending::Agreed;
            (1..=most_bytes(signature.collective, set.size()) as u64).contains(&bytes)
                && !(lends && bytes > self.setup.lent_bytes)
        };
        signature.place == Place::Host
            && signature.tensors.len() == 1
            && is_named
            && self.goes_over_boards(id, signature)
            && is_small()
    }

    /// Looks at what somebody sleeps for, makes ordinary operations of starts from which a member has withdrawn, and
    /// wakes members that sleep.
    pub fn turn_standings(&mut self, now: Time) -> bool {
        let standings = Arc::clone(&self.standings);
        if !standings.is_busy() {
            return false;
        }
        let mut moved = false;
        if standings.awaits.load(Ordering::SeqCst) {
            let mut awaited = lock(&standings.awaited);
            awaited.retain(|standing| match standings.look(standing) {
                Look::Waiting => true,
                Look::Idle | Look::Fallen => false,
                Look::Done(op, outcome) => {
                    self.ended.push(Ended { op, result: Ok(outcome) });
                    moved = true;
                    false
                }
            });
            standings.awaits.store(!awaited.is_empty(), Ordering::SeqCst);
        }
        if standings.nudges.swap(false, Ordering::SeqCst) {
            for place in 0..self.links.up().len() {
                let peer = self.links.up()[place];
                self.links.nudge(peer);
            }
        }
        if standings.has_fallen.swap(false, Ordering::SeqCst) {
            let fallen = std::mem::take(&mut *lock(&standings.fallen));
            for (standing, start) in fallen {
                standings.under_way.fetch_sub(1, Ordering::SeqCst);
                self.submit_fallen(&standing, &start, now);
                moved = true;
            }
        }
        moved
    }

    fn submit_fallen(&mut self, standing: &Standing, start: &Start, now: Time) {
        let output = start.made.is_none().then_some(start.output);
        let submission = Submission {
            op: start.op,
            set: standing.set,
            name: &standing.name,
            hold: false,
            signature: &standing.signature,
            call: &standing.share.call,
            tensors: &[TensorMemory { input: start.input, output }],
            refused: None,
            on_device: None,
        };
        match self.submit(&submission, now) {
            // Somebody may wait for it, and has told that to nobody.
            Ok(()) => self.wait_for(start.op, now),
            Err(error) => self.ended.push(Ended { op: start.op, result: Err(error) }),
        }
    }

    /// Whether a join can be submitted: it waits for the starts of its set, which were submitted before it, and there will
    /// be no others.
    pub fn may_join(&mut self, set: SetId, now: Time) -> bool {
        self.standings.withdraw_all(Some(set));
        self.settle_standings(Some(set));
        self.turn_standings(now);
        !self.standings.is_under_way(set)
    }

    /// Ends what is over of what stands in a set, or in all, though nobody may wait for it.
    pub fn settle_standings(&mut self, set: Option<SetId>) {
        let mut done = Vec::new();
        self.standings.look_at_all(set, &mut done);
        self.ended.extend(done.into_iter().map(|(op, outcome)| Ended { op, result: Ok(outcome) }));
    }

    /// Starts of a set, or of all, end with an error; with `without`, only those that wait for this rank.
    pub(in crate::engine) fn fail_standings(
        &mut self,
        set: Option<SetId>,
        without: Option<Rank>,
        error: &Error,
    ) {
        // What is complete has been completed by others, too.
        self.settle_standings(set);
        let ended = self.standings.give_up(set, without);
        self.ended.extend(ended.into_iter().map(|op| Ended { op, result: Err(error.clone()) }));
    }

    /// A set is no more.
    pub(in crate::engine) fn forget_standings(&mut self, set: SetId) {
        self.standings.forget(set);
    }

    /// Whether somebody sleeps for a start whose niche has moved since it was last looked at.
    pub(in crate::engine) fn standings_have_news(&self) -> bool {
        self.standings.calls()
            || self.standings.awaits.load(Ordering::SeqCst)
                && lock(&self.standings.awaited).iter().any(|standing| standing.has_news())
    }
}

/// The most that a member may put into what stands. Above it the ordinary way takes less time, though members wait for
/// each other twice more: it goes in windows that stay in cache, and each member reduces a part for all. Many members
/// share processors, and take longer over a round of waiting.
fn most_bytes(collective: Collective, size: u32) -> usize {
    match collective {
        Collective::Allreduce => NICHE_BYTES_MAX / 4,
        _ if size <= MEMBERS_FEW => NICHE_BYTES_MAX / 2,
        _ => NICHE_BYTES_MAX,
    }
}
