//! The engine: one per process, a state machine over links, a device and a clock that is handed in. It owns
//! the coordinators, starts what they agree on, moves bytes through the links and reports what has ended. It
//! starts no thread and reads no clock, so that the simulator runs many of them in one thread; [`driver`]
//! gives it both.
//!
//! The way of a tensor: [`Engine::submit`] → coordinator (agreement) → `run_cut` (fusion) → `start_batch` (plan,
//! memory) → `follow` (orders to links and device) → `step_done` → `end` (the outcome).

mod any_source;
mod batch;
mod boards;
mod calls;
pub mod channel;
mod departure;
mod direct;
pub mod driver;
mod epoch;
pub mod handles;
mod inline;
mod lending;
mod links;
#[cfg(all(test, loom))]
mod loom;
mod message;
mod operation;
pub mod passage;
mod persistent;
pub mod plan;
mod rounds;
mod sets;
mod spin;
pub mod standing;
mod submission;
mod uniform;

pub use direct::Direct;
pub use message::MessageSubmission;
pub use operation::{Ended, Outcome, OutputTensor, TensorMemory};
pub(crate) use rounds::serves as devices_serve;
pub use submission::Submission;

use crate::coordinator::{OpId, Rules};
use crate::device::host::HostDevice;
use crate::error::{Cause, Error, Result};
use crate::fusion::{self, Fusion};
use crate::hash::Map;
use crate::limits;
use crate::membership::ledger::{Ledger, Uniform};
use crate::membership::{self, Membership};
use crate::memory::{Memory, OwnedBytes, Region};
use crate::run::Order;
use crate::transport::{Events, Fabric, LinkEvent};
use crate::types::{Epoch, GLOBAL_SET, Rank, SetId, Time};
use crate::wire;
use any_source::Unmatched;
use batch::{BatchFlight, Flight};
use boards::Boards;
use direct::Devices;
use links::{LinkChange, Links};
use operation::Operation;
use persistent::Plannings;
use plan::{PlanRules, Plans};
use sets::ProcessSet;
use standing::Standings;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::RawFd;
use std::sync::Arc;

/// What an engine is told when its epoch begins; the same on every rank, `me` excepted.
#[derive(Clone, Debug)]
pub struct EngineSetup {
    /// This rank.
    pub me: Rank,
    /// The epoch.
    pub epoch: Epoch,
    /// The number of each rank's host, in order of first appearance.
    pub hosts: Arc<[u32]>,
    /// How coordinators behave.
    pub agreement: Rules,
    /// How agreed operations are batched.
    pub fusion: fusion::Rules,
    /// How algorithms are chosen.
    pub plans: PlanRules,
    /// When silence is taken for death.
    pub membership: membership::Rules,
    /// Which tensors stay on their devices.
    pub direct: Direct,
    /// From how many bytes on batches of tensors in shared memory are reduced where they lie.
    pub lent_bytes: u64,
    /// After how many agreements in a row a small collective stands.
    pub stands_after: u32,
    /// How much a member shows in a niche itself; more lies aside.
    pub niche_bytes_within: u64,
    /// In which sets an operation that is complete on one rank is so on all, though the epoch breaks (uniform completion).
    pub uniform: Uniform,
    /// Process sets of the epoch before, by their numbers, besides the global one.
    pub sets: Vec<(SetId, Vec<Rank>)>,
    /// The number of the next process set; all lower ones were given.
    pub next_set: u32,
}

/// One process's engine.
pub struct Engine {
    setup: EngineSetup,
    me: Rank,
    epoch: Epoch,
    links: Links,
    boards: Boards,
    devices: Devices,
    plannings: Plannings,
    standings: Arc<Standings>,
    memory: Memory,
    device: HostDevice,
    plans: Plans,
    fusion: Fusion,
    sets: BTreeMap<SetId, ProcessSet>,
    next_set: u32,
    membership: Membership,
    /// Where completion is uniform: the marks of each set.
    ledgers: BTreeMap<SetId, Ledger>,
    ops: Map<OpId, Operation>,
    /// The algorithm of the batch that was started last.
    last_algorithm: Option<&'static str>,
    spare_ops: Vec<Operation>,
    spare_outcomes: Vec<Outcome>,
    flights: Vec<Option<Flight>>,
    /// Flights that are not over.
    flying: usize,
    #[expect(clippy::vec_box, reason = "a flight is large and moves between tables by its address")]
    spare_flights: Vec<Box<BatchFlight>>,
    scratch: Vec<OwnedBytes>,
    /// The number of the next message of a tag, to or from a rank.
    messages: HashMap<(SetId, Rank, u32, bool), u64>,
    /// Receives that wait for a sender.
    unmatched: Unmatched,
    /// Messages that were sent to a rank and received from it.
    exchanged: Map<Rank, (u64, u64)>,
    ended: Vec<Ended>,
    warnings: Vec<String>,
    broken: Option<Error>,
    /// Whether this rank has said goodbye, and if so whether it had nothing in flight.
    left: Option<bool>,
    /// Ranks that have left, in the order in which this rank heard of it, and whether they had nothing in flight.
    leavers: Vec<(Rank, bool)>,
    /// The messages that they say that they had sent here.
    farewells: Map<Rank, u64>,
    /// Ranks that have left and whose links are kept for what they had sent before.
    departing: Vec<Rank>,
    /// Neighbours whose links this rank waits for only to say goodbye.
    unmet: Vec<Rank>,
    /// Until when there is nothing to do but to look at the links, unless something happens.
    quiet_until: Option<Time>,
    /// Whether the links to the neighbours in the global tree have been asked for.
    hangs_together: bool,
    // Buffers that are used again at each turn.
    events: Events,
    changes: Vec<LinkChange>,
    orders: Vec<Order>,
    encoded: Vec<u8>,
    spare_memory: Vec<TensorMemory>,
    inline_regions: Vec<Region>,
    tensor_bytes: Vec<u64>,
    spare_fds: Vec<(RawFd, bool)>,
    /// Agreement messages for sets that this rank has not made yet: the sender is ahead in the global order.
    early: Vec<(Rank, SetId, Vec<u8>)>,
}

/// Outcomes kept for later operations.
const SPARE_OUTCOMES_MAX: usize = 4096;

impl Engine {
    /// An engine whose global set holds all ranks of `setup`.
    #[must_use]
    pub fn new(setup: EngineSetup, fabric: Box<dyn Fabric>) -> Engine {
        let size = setup.hosts.len() as u32;
        let membership = Membership::new(setup.epoch, setup.me, size, setup.membership);
        let mut engine = Engine {
            me: setup.me,
            epoch: setup.epoch,
            boards: Boards::new(fabric.board()),
            devices: Devices::default(),
            plannings: Plannings::default(),
            standings: Arc::default(),
            links: Links::new(fabric, size, message::is_message),
            memory: Memory::default(),
            device: HostDevice::default(),
            plans: Plans::new(setup.plans.clone()),
            fusion: Fusion::default(),
            sets: BTreeMap::new(),
            next_set: 0,
            membership: match setup.uniform {
                Uniform::Never => membership,
                Uniform::WithinHosts | Uniform::Always => {
                    membership.with_votes(uniform::parents(&setup.hosts))
                }
            },
            ledgers: BTreeMap::new(),
            ops: Map::default(),
            last_algorithm: None,
            spare_ops: Vec::new(),
            spare_outcomes: Vec::new(),
            flights: Vec::new(),
            flying: 0,
            spare_flights: Vec::new(),
            scratch: Vec::new(),
            messages: HashMap::new(),
            unmatched: Unmatched::default(),
            exchanged: Map::default(),
            ended: Vec::new(),
            warnings: Vec::new(),
            broken: None,
            left: None,
            leavers: Vec::new(),
            farewells: Map::default(),
            departing: Vec::new(),
            unmet: Vec::new(),
            quiet_until: None,
            hangs_together: false,
            events: Events::default(),
            changes: Vec::new(),
            orders: Vec::new(),
            encoded: Vec::new(),
            spare_memory: Vec::new(),
            inline_regions: Vec::new(),
            tensor_bytes: Vec::new(),
            spare_fds: Vec::new(),
            early: Vec::new(),
            setup,
        };
        let all: Vec<Rank> = (0..size).map(Rank).collect();
        let global = engine.make_set(&all);
        assert_eq!(global, GLOBAL_SET, "the first set is the global one");
        let (sets, next) = (std::mem::take(&mut engine.setup.sets), engine.setup.next_set);
        for (id, ranks) in sets {
            // Numbers of sets that are gone are not given again.
            engine.next_set = id.0;
            engine.make_set(&ranks);
        }
        engine.next_set = engine.next_set.max(next);
        engine
    }

    /// Somebody waits for this operation: the batching window closes now.
    pub fn wait_for(&mut self, op: OpId, now: Time) {
        self.quiet_until = None;
        let Some(set) = self.ops.get(&op).map(|o| o.set) else { return };
        if let Some(coordinator) = self.coordinator_of(set) {
            coordinator.wait_for(op, now);
        }
    }

    /// Does what can be done now. Returns whether anything moved; call again until it does not.
    pub fn turn(&mut self, now: Time) -> bool {
        let mut moved = self.links.poll_fabric(&mut self.changes);
        moved |= self.turn_links(now);
        moved |= self.turn_seats();
        moved |= self.turn_devices();
        moved |= self.turn_channels();
        moved |= self.turn_standings(now);
        let mut changes = std::mem::take(&mut self.changes);
        if self.left.is_some() {
            self.linger(&mut changes);
            self.changes = changes;
            return moved;
        }
        if !moved && changes.is_empty() && self.quiet_until.is_some_and(|until| now < until) {
            // A waiter that looks again and again comes by here, and its next look must be soon.
            self.changes = changes;
            return false;
        }
        for change in changes.drain(..) {
            moved = true;
            match change {
                LinkChange::Up(peer) => {
                    self.membership.link_up(peer, now);
                    self.hang_together();
                }
                LinkChange::Down(peer, cause) => {
                    if self.membership.has_departed(peer) {
                        self.fail_with(peer);
                    }
                    self.membership.link_down(peer, cause);
                }
                LinkChange::Unreachable { peer, culprit, cause } => {
                    if self.membership.has_departed(peer) {
                        self.fail_with(peer);
                    }
                    self.membership.unreachable(peer, culprit, cause, now);
                }
            }
        }
        self.changes = changes;
        moved |= self.turn_membership(now);
        self.close_departed();
        moved |= self.match_sources();
        if self.agrees() {
            self.take_seats(now);
            self.take_device_seats(now);
            moved |= self.turn_plannings(now);
            moved |= self.turn_coordinators(now);
            moved |= self.turn_seats();
            moved |= self.turn_devices();
            moved |= self.turn_ledgers();
        }
        let settled = !moved && self.departing.is_empty() && self.unmet.is_empty();
        self.quiet_until = settled.then(|| self.poll_timeout().unwrap_or(Time(u64::MAX)));
        moved
    }

    /// Moves bytes on all links, and hears what they tell.
    fn turn_links(&mut self, now: Time) -> bool {
        let mut moved = false;
        let mut events = std::mem::take(&mut self.events);
        let mut place = 0;
        while place < self.links.up().len() {
            let peer = self.links.up()[place];
            events.clear();
            moved |= self.links.progress(place, &self.memory, now, &mut events, &mut self.changes);
            moved |= !events.list.is_empty();
            for event in &events.list {
                self.hear(peer, event, &events.control, now);
            }
            // A link that died has left the list, and another stands in its place.
            place += usize::from(self.links.up().get(place) == Some(&peer));
        }
        let mut place = 0;
        while let Some(&peer) = self.links.left().get(place) {
            events.clear();
            moved |= self.links.settle_left(place, &self.memory, &mut events);
            for event in &events.list {
                self.hear(peer, event, &events.control, now);
            }
            place += usize::from(self.links.left().get(place) == Some(&peer));
        }
        self.events = events;
        moved
    }

    fn hear(&mut self, peer: Rank, event: &LinkEvent, control: &[u8], now: Time) {
        match event {
            LinkEvent::Done(token) => self.step_done(*token),
            LinkEvent::Length { token, ours, theirs } => {
                let error = message::length_mismatch(self.me, peer, *ours, *theirs);
                self.finish_message(token.run, Some(error));
            }
            LinkEvent::Control(range) => {
                let outcome = match wire::Message::decode(&control[range.clone()]) {
                    Ok(wire::Message::Coordination { set, body }) => self.coordinate(peer, set, body, now),
                    Ok(wire::Message::Heartbeat) => Ok(()),
                    Ok(wire::Message::Goodbye { who, clean, sent }) => {
                        self.hear_goodbye(peer, who, clean, sent, now);
                        Ok(())
                    }
                    Ok(wire::Message::Closed { set, who }) => {
                        self.hear_closed(peer, set, who, now);
                        Ok(())
                    }
                    Ok(wire::Message::Abort(broken)) => {
                        self.membership.abort(peer, broken);
                        Ok(())
                    }
                    Ok(wire::Message::Mark { set, mark }) => self.hear_mark(peer, set, mark),
                    Ok(wire::Message::Ballot { verdict, broken, marks }) => {
                        self.membership.ballot(peer, verdict, broken, marks);
                        Ok(())
                    }
                    Err(malformed) => Err(Cause::Misbehaved(malformed.0.to_string())),
                };
                if let Err(cause) = outcome {
                    self.break_epoch_with(Some(peer), cause);
                }
            }
        }
    }

    fn coordinate(
        &mut self,
        peer: Rank,
        id: SetId,
        body: &[u8],
        now: Time,
    ) -> std::result::Result<(), Cause> {
        if !self.agrees() {
            return Ok(());
        }
        let Some(set) = self.sets.get_mut(&id) else {
            if id.0 >= self.next_set {
                if self.early.len() == limits::EARLY_MESSAGES_MAX {
                    return Err(Cause::Misbehaved(format!(
                        "agreement of process set {}, which nobody made",
                        id.0
                    )));
                }
                self.early.push((peer, id, body.to_vec()));
            }
            // Otherwise this rank has removed the set already, and what is under way in it has failed.
            return Ok(());
        };
        let from = set
            .member_of(peer)
            .ok_or_else(|| Cause::Misbehaved(format!("agreement of process set {} from outside", id.0)))?;
        match &mut set.coordinator {
            Some(coordinator) => coordinator.receive(crate::types::Member(from), body, now),
            // A member has left; the sender does not know yet.
            None if set.departed.is_some() => Ok(()),
            None => Err(Cause::Misbehaved(format!("agreement of process set {} to a rank outside it", id.0))),
        }
    }

    fn say(&mut self, to: Rank, message: &wire::Message<'_>) {
        message.encode(&mut self.encoded);
        self.links.tell_if_known(to, &self.encoded);
    }

    /// Ends an operation; where completion is uniform its caller is told when all have it.
    fn end(&mut self, op: OpId, result: Result<()>) {
        if !self.hold(op, result.is_ok()) {
            self.finish(op, result);
        }
    }

    /// Tells the end of an operation.
    fn finish(&mut self, op: OpId, result: Result<()>) {
        let Some(mut operation) = self.ops.remove(&op) else { return };
        let spare = self.spare_outcomes.pop().unwrap_or_default();
        let mut outcome = std::mem::replace(&mut operation.outcome, spare);
        if result.is_ok() && !operation.stand_ins.is_empty() {
            outcome.tensors.clear();
        }
        operation.stand_ins.clear();
        operation.on_device = None;
        if std::mem::take(&mut operation.unmatched) {
            self.unmatched.forget(op);
        }
        self.spare_ops.push(operation);
        self.ended.push(Ended { op, result: result.map(|()| outcome) });
    }

    /// Takes back an outcome that nobody reads any more, for the memory of its lists.
    pub fn recycle(&mut self, mut outcome: Outcome) {
        if self.spare_outcomes.len() < SPARE_OUTCOMES_MAX {
            outcome.reset();
            self.spare_outcomes.push(outcome);
        }
    }

    /// Operations that have ended since the last call.
    pub fn ended(&mut self) -> std::vec::Drain<'_, Ended> {
        self.ended.drain(..)
    }

    /// Warnings for the log since the last call.
    pub fn warnings(&mut self) -> std::vec::Drain<'_, String> {
        self.warnings.drain(..)
    }

    /// Why no operation can be submitted any more, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&Error> {
        self.broken.as_ref()
    }

    /// Ranks that have said goodbye.
    pub fn departed(&self) -> impl Iterator<Item = Rank> + '_ {
        self.membership.departed()
    }

    /// The sets that there are, the global one left out, and the number of the next one.
    #[must_use]
    pub fn carried_sets(&self) -> (Vec<(SetId, Vec<Rank>)>, u32) {
        let sets = self.sets.iter().filter(|(id, _)| **id != GLOBAL_SET);
        (sets.map(|(id, set)| (*id, set.ranks.to_vec())).collect(), self.next_set)
    }

    /// Whether something is unfinished, so that somebody must go on driving.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.ops.is_empty()
            || self.flying > 0
            || self.has_active_channels()
            || self.standings.is_busy()
            || !self.links.drained()
    }

    /// Whether there is still something to agree: the epoch goes on, and this rank has not left.
    fn agrees(&self) -> bool {
        self.broken.is_none() && !self.membership.is_over()
    }

    /// When [`Engine::turn`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let coordinators = self.sets.values().filter_map(|s| s.coordinator.as_ref());
        // Those that are not turned any more have nothing to be woken for.
        let coordinators = coordinators.filter(|_| self.agrees()).filter_map(|c| c.poll_timeout());
        coordinators.chain(self.membership.poll_timeout()).min()
    }

    /// Prepares to sleep; true if there is something to do already.
    pub fn arm(&mut self) -> bool {
        let mut changes = std::mem::take(&mut self.changes);
        let busy = self.links.arm(&mut changes);
        self.changes = changes;
        self.boards.lie_down();
        busy || !self.changes.is_empty()
            || self.seats_have_news()
            || self.channels_have_news()
            || self.standings_have_news()
            || self.devices_have_news()
    }

    /// Awake again.
    pub fn disarm(&mut self) {
        self.links.disarm();
        self.boards.rise();
    }

    /// Descriptors to watch while asleep.
    pub fn descriptors(&self, visit: &mut dyn FnMut(RawFd, bool)) {
        self.links.descriptors(visit);
    }

    /// Whether what comes may come unnoticed while asleep, so that sleeps are to be short.
    #[must_use]
    pub fn is_polled(&self) -> bool {
        self.links.is_polled()
    }

    /// Operations in flight, in order of their numbers, so that the simulator repeats.
    #[must_use]
    pub fn ops_in_flight(&self) -> Vec<OpId> {
        let mut ops: Vec<OpId> = self.ops.keys().copied().collect();
        ops.sort_unstable();
        ops
    }

    /// An empty vector with capacity, for the driver.
    pub(crate) fn spare_tensors(&mut self) -> Vec<TensorMemory> {
        std::mem::take(&mut self.spare_memory)
    }
    /// Takes it back.
    pub(crate) fn return_tensors(&mut self, mut tensors: Vec<TensorMemory>) {
        tensors.clear();
        self.spare_memory = tensors;
    }
    /// An empty vector with capacity, for the driver.
    pub(crate) fn spare_descriptors(&mut self) -> Vec<(RawFd, bool)> {
        std::mem::take(&mut self.spare_fds)
    }
    /// Takes it back.
    pub(crate) fn return_descriptors(&mut self, mut fds: Vec<(RawFd, bool)>) {
        fds.clear();
        self.spare_fds = fds;
    }

    /// What an operation waits for, in words.
    #[must_use]
    pub fn explain(&self, op: OpId, now: Time) -> Option<String> {
        let operation = self.ops.get(&op)?;
        if let Some(words) = self.explain_message(op) {
            return Some(words);
        }
        let coordinator = self.sets.get(&operation.set)?.coordinator.as_ref()?;
        Some(coordinator.explain(op, now))
    }

    /// The transport of the link to a peer, if it is up.
    #[must_use]
    pub fn link_kind(&self, peer: Rank) -> Option<&'static str> {
        self.links.kind(peer)
    }

    /// The algorithm of the batch that this rank started last.
    #[must_use]
    pub fn last_algorithm(&self) -> Option<&'static str> {
        self.last_algorithm
    }
}
