//! Who is in this epoch, and what ends it. A machine without I/O: facts about neighbours in (a *neighbour* is
//! a rank to which there is a link), intents out.
//!
//! The first cause is flooded to all neighbours, who do the same, and told a moment later, once
//! ([`Intent::Broke`]). In that moment a rank notices nothing more by itself, but a *graver* cause that others
//! had noticed at the same time takes the place of its own and is passed on (`gravity`). So where two ranks
//! die at once (a host is lost, say), their survivors still end with one error: each rank brings at most one
//! cause, the one that it had when it learned that the epoch is over, and the gravest of these reaches all,
//! provided that a message reaches all within half of `SETTLE_NS` and the survivors' links hang together.
//! Where they do not, only a round of votes over new links could settle it.
//! Causes are normalised, so that several ranks that notice one death say the same words: whatever error a
//! transport reports for a link that ends, the peer *has ended*; a silence is as long as the limit, however
//! late it was noticed; texts are cut to what the wire carries.
//!
//! Where completion is uniform, a verdict round ([`vote`]) follows the settling of the cause; between two ranks, and for
//! one that fails itself, what the rank knows is the verdict.
//!
//! What comes after an epoch is decided by a second machine, [`regroup`], which begins where this one ends.
#![forbid(unsafe_code)]

pub mod ledger;
pub mod regroup;
#[cfg(test)]
mod tests;
pub mod vote;

use crate::error::{Broken, Cause};
use crate::limits::{HEARTBEAT_MS, SILENCE_MS};
use crate::types::{Epoch, Rank, Time};
use crate::wire::failure::{normalised, put_broken};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use vote::{BALLOTS_NS, Marks, Progress, VERDICT_NS, Vote};

const MS: u64 = 1_000_000;
/// How long a rank that knows that the epoch is over waits for a graver cause.
const SETTLE_NS: u64 = 50 * MS;
/// How long a failure to connect waits for news of the peer's death.
const BETTER_CAUSE_NS: u64 = 200 * MS;

/// When a peer is suspected. The same on all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A neighbour that has sent nothing for this long is held to be stopped.
    pub silence_ns: u64,
    /// A neighbour to which nothing was sent for this long gets a heartbeat.
    pub heartbeat_ns: u64,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { silence_ns: SILENCE_MS * MS, heartbeat_ns: HEARTBEAT_MS * MS }
    }
}

/// What the engine is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Intent {
    /// Send `Message::Heartbeat` to this neighbour.
    Heartbeat(Rank),
    /// The epoch is over: end everything in flight with this. Once.
    Broke(Arc<Broken>),
    /// Send `Message::Abort` to this neighbour.
    Abort {
        /// Whom.
        to: Rank,
        /// Why the epoch is over.
        broken: Arc<Broken>,
    },
    /// Ask for a link to this rank, whose ballot is waited for: it may have died, too.
    Seek(Rank),
    /// Send `Message::Ballot` to this rank, over a new link if need be.
    Ballot {
        /// Whom.
        to: Rank,
        /// Whether it is the verdict.
        verdict: bool,
        /// Why the epoch is over.
        broken: Arc<Broken>,
        /// Up to where operations were released.
        marks: Arc<Marks>,
    },
    /// This rank has said goodbye: operations that need it end with `Shutdown`.
    Departed {
        /// Who.
        who: Rank,
        /// Whether it had nothing in flight.
        clean: bool,
    },
    /// Send `Message::Goodbye` to this neighbour.
    Goodbye {
        /// Whom to tell.
        to: Rank,
        /// Who has left.
        who: Rank,
        /// Whether it had nothing in flight.
        clean: bool,
    },
}

#[derive(Debug)]
struct Unreachable {
    at: Time,
    peer: Rank,
    culprit: Rank,
    cause: Cause,
}

#[derive(Debug)]
struct Settling {
    gravest: Arc<Broken>,
    /// Unknown until the time is told.
    until: Option<Time>,
    phase: Phase,
}

impl Settling {
    /// When what is waited for is given up; as late as it may be where that is not known yet.
    fn limit(&mut self, now: Time) -> Time {
        *self.until.get_or_insert(now.after_ns(self.phase.patience_ns()))
    }
}

/// What a rank waits for when the epoch is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// A graver cause.
    Cause,
    /// The ballots of those below it in the tree.
    Ballots,
    /// The verdict.
    Verdict,
}

impl Phase {
    fn patience_ns(self) -> u64 {
        match self {
            Phase::Cause => SETTLE_NS,
            Phase::Ballots => BALLOTS_NS,
            Phase::Verdict => VERDICT_NS,
        }
    }
}

#[derive(Debug)]
struct Neighbour {
    heard: Time,
    told: Time,
}

/// The members of one epoch, as this rank sees them.
#[derive(Debug)]
pub struct Membership {
    epoch: Epoch,
    me: Rank,
    size: u32,
    rules: Rules,
    /// Ordered, so that the simulator repeats.
    neighbours: BTreeMap<Rank, Neighbour>,
    /// Who has left, and whether it had nothing in flight.
    departed: BTreeMap<Rank, bool>,
    /// Ranks to which no link could be made, in order of time. Mostly such a rank has died or left, and a
    /// neighbour of it knows better; so this cause waits a little for a better one.
    unreachable: Vec<Unreachable>,
    /// The epoch is over, and why is about to be settled.
    settling: Option<Settling>,
    broken: Option<Arc<Broken>>,
    /// Where completion is uniform: this rank's part in the verdict round.
    vote: Option<Vote>,
    intents: VecDeque<Intent>,
}

impl Membership {
    /// The start of an epoch of `size` ranks, before any link is up.
    #[must_use]
    pub fn new(epoch: Epoch, me: Rank, size: u32, rules: Rules) -> Membership {
        assert!(me.0 < size && rules.heartbeat_ns < rules.silence_ns);
        Membership {
            epoch,
            me,
            size,
            rules,
            neighbours: BTreeMap::new(),
            departed: BTreeMap::new(),
            unreachable: Vec::new(),
            settling: None,
            broken: None,
            vote: None,
            intents: VecDeque::new(),
        }
    }

    /// Completion is uniform: when the epoch breaks there is a verdict round over the tree in which these are the
    /// parents of the ranks.
    #[must_use]
    pub fn with_votes(mut self, parents: Arc<[Option<Rank>]>) -> Membership {
        self.vote = Some(Vote::new(self.me, parents));
        self
    }

    /// The epoch is over, and this rank releases nothing beyond these marks. Once.
    pub fn seal(&mut self, marks: Marks) {
        if let Some(vote) = &mut self.vote {
            vote.seal(marks);
        }
    }

    /// Whether [`Membership::seal`] is to be called.
    #[must_use]
    pub fn is_to_seal(&self) -> bool {
        self.is_over() && self.vote.as_ref().is_some_and(|vote| !vote.is_sealed())
    }

    /// Up to where operations are complete everywhere, once the epoch is over.
    #[must_use]
    pub fn verdict(&self) -> Marks {
        self.vote.as_ref().map(Vote::marks).unwrap_or_default()
    }

    /// A rank has sent `Message::Ballot`.
    pub fn ballot(&mut self, from: Rank, verdict: bool, broken: Broken, marks: Marks) {
        if broken.epoch != self.epoch || self.vote.is_none() {
            return;
        }
        if let Some(broken) = self.broken.clone() {
            if !verdict {
                self.tell_verdict(from, &broken);
            }
            return;
        }
        if !self.is_over() {
            self.end(broken.culprit, broken.cause.clone(), Some(from));
        }
        let Some(vote) = &mut self.vote else { return };
        vote.hear(from, marks);
        let graver = |settling: &Settling| gravity(&broken) < gravity(&settling.gravest);
        if let Some(settling) = self.settling.as_mut().filter(|settling| verdict || graver(settling)) {
            settling.gravest = Arc::new(broken);
        }
        match verdict {
            true => self.conclude(),
            false => self.count_votes(),
        }
    }

    fn tell_verdict(&mut self, to: Rank, broken: &Arc<Broken>) {
        let marks = Arc::new(self.verdict());
        self.intents.push_back(Intent::Ballot { to, verdict: true, broken: broken.clone(), marks });
    }

    /// The cause is settled: votes, where completion is uniform.
    fn begin_vote(&mut self) {
        let (Some(settling), Some(vote)) = (&mut self.settling, &mut self.vote) else {
            return self.conclude();
        };
        (settling.phase, settling.until) = (Phase::Ballots, None);
        // One that has sent what is wrong lives, and has released what it has.
        let lives = matches!(settling.gravest.cause, Cause::Corrupted(_) | Cause::Misbehaved(_));
        let culprit = settling.gravest.culprit.filter(|_| !lives);
        self.departed.keys().copied().chain(culprit).for_each(|rank| vote.without(rank));
        self.count_votes();
    }

    fn count_votes(&mut self) {
        let Some(vote) = &mut self.vote else { return };
        let Some(settling) = self.settling.as_mut().filter(|s| s.phase != Phase::Cause && vote.is_sealed())
        else {
            return;
        };
        match vote.progress() {
            Progress::Wait => {
                let strangers = vote.missing().filter(|rank| !self.neighbours.contains_key(rank));
                self.intents.extend(strangers.map(Intent::Seek));
            }
            Progress::Decide => self.conclude(),
            Progress::Rise(to) => {
                (settling.phase, settling.until) = (Phase::Verdict, None);
                let (broken, marks) = (settling.gravest.clone(), Arc::new(vote.marks()));
                self.intents.push_back(Intent::Ballot { to, verdict: false, broken, marks });
            }
        }
    }

    /// Ballots that have not come will not.
    fn vote_without_missing(&mut self) {
        if let Some(vote) = &mut self.vote {
            for rank in vote.missing().collect::<Vec<Rank>>() {
                vote.without(rank);
            }
        }
        if let Some(settling) = &mut self.settling {
            settling.until = None;
        }
        self.count_votes();
    }

    /// The epoch is over already, and a rank takes no part in its verdict.
    fn vote_without(&mut self, rank: Rank) {
        if self.settling.is_some()
            && let Some(vote) = &mut self.vote
        {
            vote.without(rank);
            self.count_votes();
        }
    }

    /// A link is up.
    pub fn link_up(&mut self, rank: Rank, now: Time) {
        assert!(rank != self.me && rank.0 < self.size);
        self.neighbours.insert(rank, Neighbour { heard: now, told: now });
        let known = self.broken.as_ref().or(self.settling.as_ref().map(|settling| &settling.gravest));
        match known {
            // It may have no other neighbour who knows.
            Some(broken) => self.intents.push_back(Intent::Abort { to: rank, broken: broken.clone() }),
            None => {
                let gone = self.departed.iter().filter(|&(&who, _)| who != rank);
                self.intents.extend(gone.map(|(&who, &clean)| Intent::Goodbye { to: rank, who, clean }));
            }
        }
    }

    /// Any byte has come from a neighbour; `when` may be repeated or late.
    pub fn heard(&mut self, rank: Rank, when: Time) {
        if let Some(neighbour) = self.neighbours.get_mut(&rank) {
            neighbour.heard = neighbour.heard.max(when);
        }
    }

    /// Something was sent to a neighbour, so that no heartbeat is needed.
    pub fn told(&mut self, rank: Rank, when: Time) {
        if let Some(neighbour) = self.neighbours.get_mut(&rank) {
            neighbour.told = neighbour.told.max(when);
        }
    }

    /// A link is dead. No failure if the peer has said goodbye.
    pub fn link_down(&mut self, rank: Rank, cause: Cause) {
        if self.neighbours.remove(&rank).is_none() || self.departed.contains_key(&rank) {
            return;
        }
        let cause = match cause {
            // A reset, a broken pipe and an end of file are one death, seen at different moments.
            Cause::Exited | Cause::System(_) => Cause::Exited,
            other => other,
        };
        // Of several deaths the first ends the epoch, another may be the gravest, and none takes part in the verdict.
        let is_out = self.is_over() || cause == Cause::Exited;
        self.end(Some(rank), cause, None);
        if is_out {
            self.vote_without(rank);
        }
    }

    /// A link to `peer` that is needed could not be made, which is the fault of `culprit`: one of its two ends.
    pub fn unreachable(&mut self, peer: Rank, culprit: Rank, cause: Cause, now: Time) {
        self.vote_without(peer);
        if !self.departed.contains_key(&peer) && !self.is_over() {
            let at = now.after_ns(BETTER_CAUSE_NS);
            self.unreachable.push(Unreachable { at, peer, culprit, cause });
        }
    }

    /// A neighbour has sent `Message::Goodbye`.
    pub fn goodbye(&mut self, from: Rank, who: Rank, clean: bool) {
        if who.0 >= self.size {
            self.end(Some(from), Cause::Misbehaved("a goodbye of a rank that does not exist".into()), None);
            return;
        }
        if who == self.me || self.is_over() || self.departed.contains_key(&who) {
            return;
        }
        self.departed.insert(who, clean);
        self.intents.push_back(Intent::Departed { who, clean });
        let others = self.neighbours.keys().filter(|&&to| to != from && to != who);
        self.intents.extend(others.map(|&to| Intent::Goodbye { to, who, clean }));
    }

    /// A neighbour has sent `Message::Abort`. One of another epoch is late and says nothing about this one.
    pub fn abort(&mut self, from: Rank, broken: Broken) {
        if broken.epoch == self.epoch {
            self.end(broken.culprit, broken.cause, Some(from));
        }
    }

    /// This rank ends the epoch: a coordinator's `Break`, a failure of the operating system, a panic.
    pub fn break_here(&mut self, culprit: Option<Rank>, cause: Cause) {
        self.end(culprit, cause, None);
        if culprit == Some(self.me) {
            // A rank that fails knows best, and may not get much farther.
            self.conclude();
        }
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Time) {
        if let Some(settling) = &mut self.settling {
            let until = settling.limit(now);
            match settling.phase {
                _ if now < until => {}
                Phase::Cause => self.begin_vote(),
                Phase::Ballots => self.vote_without_missing(),
                Phase::Verdict => self.conclude(),
            }
        }
        // Where that has begun another wait, it is as long from now on.
        if let Some(settling) = &mut self.settling {
            settling.limit(now);
        }
        if self.is_over() {
            return;
        }
        // Whoever has said goodbye meanwhile is not missed.
        self.unreachable.retain(|missed| !self.departed.contains_key(&missed.peer));
        if self.unreachable.first().is_some_and(|first| first.at <= now) {
            let missed = self.unreachable.remove(0);
            return self.end(Some(missed.culprit), missed.cause, None);
        }
        let mut silent = None;
        for (&rank, neighbour) in &mut self.neighbours {
            if self.departed.contains_key(&rank) {
                continue;
            }
            if now.since(neighbour.heard) >= self.rules.silence_ns {
                silent = silent.or(Some(rank));
            } else if now.since(neighbour.told) >= self.rules.heartbeat_ns {
                neighbour.told = now;
                self.intents.push_back(Intent::Heartbeat(rank));
            }
        }
        if let Some(rank) = silent {
            self.end(Some(rank), Cause::Silent { for_ms: self.rules.silence_ns / MS }, None);
        }
    }

    /// When to call `handle_timeout`.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        if let Some(settling) = &self.settling {
            return Some(settling.until.unwrap_or_default());
        }
        if self.broken.is_some() {
            return None;
        }
        let alive = self.neighbours.iter().filter(|(rank, _)| !self.departed.contains_key(rank));
        let due = |n: &Neighbour| {
            n.heard.after_ns(self.rules.silence_ns).min(n.told.after_ns(self.rules.heartbeat_ns))
        };
        let unreachable = self.unreachable.first().map(|missed| missed.at);
        alive.map(|(_, neighbour)| due(neighbour)).chain(unreachable).min()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Intent> {
        self.intents.pop_front()
    }

    /// Why the epoch is over, if it is.
    #[must_use]
    pub fn broken(&self) -> Option<&Arc<Broken>> {
        self.broken.as_ref()
    }

    /// Whether this rank has said goodbye.
    #[must_use]
    pub fn has_departed(&self, rank: Rank) -> bool {
        self.departed.contains_key(&rank)
    }

    /// Ranks that have said goodbye.
    pub fn departed(&self) -> impl Iterator<Item = Rank> + '_ {
        self.departed.keys().copied()
    }

    /// Whether the epoch is over, though the reason may not be settled yet: nothing more is to be agreed.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.settling.is_some() || self.broken.is_some()
    }

    /// There is a cause for the epoch's end: noticed here, or told by a neighbour.
    fn end(&mut self, culprit: Option<Rank>, cause: Cause, from: Option<Rank>) {
        if self.broken.is_some() {
            return;
        }
        let broken = Arc::new(normalised(&Broken { epoch: self.epoch, culprit, cause }));
        if let Some(settling) = &mut self.settling {
            if from.is_none() || gravity(&broken) >= gravity(&settling.gravest) {
                return;
            }
            settling.gravest = broken.clone();
        } else {
            self.settling = Some(Settling { gravest: broken.clone(), until: None, phase: Phase::Cause });
        }
        let others = self.neighbours.keys().filter(|&&to| Some(to) != from);
        self.intents.extend(others.map(|&to| Intent::Abort { to, broken: broken.clone() }));
        // Between two ranks there is nobody who could know more.
        if self.size == 2 {
            self.conclude();
        }
    }

    /// The verdict.
    fn conclude(&mut self) {
        if let Some(Settling { gravest, .. }) = self.settling.take() {
            self.broken = Some(gravest.clone());
            let voters: Vec<Rank> = self.vote.iter().flat_map(Vote::voters).collect();
            voters.into_iter().for_each(|to| self.tell_verdict(to, &gravest));
            self.intents.push_back(Intent::Broke(gravest));
        }
    }
}

/// The order of causes, gravest first; total, so that every rank prefers the same one. What a rank said of itself
/// goes before what others saw of it, and what was seen before what was only missed.
fn gravity(broken: &Broken) -> (u8, u32, Vec<u8>) {
    let kind = match broken.cause {
        Cause::Aborted(_) => 0,
        Cause::Misbehaved(_) => 1,
        Cause::Corrupted(_) => 2,
        Cause::System(_) => 3,
        Cause::Exited => 4,
        Cause::Silent { .. } => 5,
        Cause::Stalled { .. } => 6,
        Cause::Unreachable(_) => 7,
        // What comes of a meeting after an epoch, never of an epoch.
        Cause::Excluded { .. } | Cause::Minority { .. } => 8,
    };
    let mut words = Vec::new();
    put_broken(&mut words, broken);
    (kind, broken.culprit.map_or(u32::MAX, |rank| rank.0), words)
}
