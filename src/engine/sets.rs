//! Process sets: who is in them, and the coordinator of each.
#![forbid(unsafe_code)]

use super::Engine;
use super::batch::Flight;
use super::boards::Seating;
use super::calls::Call;
use super::direct::AtDevices;
use super::lending::Lending;
use super::operation::Operation;
use super::standing::Repeats;
use crate::coordinator::{Agreed, Coordinator, Intent, OpId, Setup};
use crate::error::Error;
use crate::types::{Collective, GLOBAL_SET, Member, Rank, SetId, Signature, Time};
use std::sync::Arc;

/// A process set, as this rank sees it.
pub(super) struct ProcessSet {
    /// Its ranks, ascending.
    pub(super) ranks: Arc<[Rank]>,
    /// The number of each member's host.
    pub(super) hosts: Arc<[u32]>,
    /// This rank's position, if it is a member.
    pub(super) member: Option<Member>,
    /// The machine that agrees; only on members.
    pub(super) coordinator: Option<Coordinator>,
    /// Those with whom it agrees, or did.
    pub(super) neighbours: Box<[Rank]>,
    /// Batches started: the same number on every member.
    pub(super) next_batch: u64,
    /// The first member that has said goodbye.
    pub(super) departed: Option<Rank>,
    /// Plans agreed: the same number on every member.
    pub(super) plans: u64,
    /// Which operations repeat: the same on every member.
    pub(super) repeats: Repeats,
    /// Where it exchanges over boards, if it does.
    pub(super) seating: Seating,
    /// Whether its members tell each other where their tensors lie.
    pub(super) lending: Lending,
    /// Where its devices exchange among themselves, if they do.
    pub(super) at_devices: AtDevices,
}

impl ProcessSet {
    pub(super) fn me(&self) -> u32 {
        self.member.expect("only members run batches").0
    }
    pub(super) fn size(&self) -> u32 {
        self.ranks.len() as u32
    }
    /// The member that is the root of what is agreed; 0 where there is none.
    pub(super) fn root_of(&self, signature: &Signature) -> u32 {
        let root = signature.collective.has_root().then(|| self.member_of(signature.root));
        root.flatten().unwrap_or(0)
    }
    pub(super) fn member_of(&self, rank: Rank) -> Option<u32> {
        self.ranks.binary_search(&rank).ok().map(|m| m as u32)
    }
}

impl Engine {
    /// Makes a set; every rank of the job does so at the same place of the global set's agreed order.
    pub(super) fn make_set(&mut self, ranks: &[Rank]) -> SetId {
        let id = SetId(self.next_set);
        self.next_set += 1;
        let hosts: Arc<[u32]> = renumbered(ranks.iter().map(|r| self.setup.hosts[r.0 as usize]));
        let ranks: Arc<[Rank]> = ranks.into();
        let member = ranks.binary_search(&self.me).ok().map(|m| Member(m as u32));
        let coordinator = member.map(|me| {
            Coordinator::new(Setup {
                set: id,
                me,
                ranks: Arc::clone(&ranks),
                hosts: Arc::clone(&hosts),
                rules: self.setup.agreement,
            })
        });
        let neighbours = coordinator.iter().flat_map(Coordinator::neighbours);
        let neighbours: Box<[Rank]> = neighbours.map(|member| ranks[member.0 as usize]).collect();
        // The tree's links carry heartbeats, so they are wanted before the first operation.
        for &neighbour in &neighbours {
            self.links.request(neighbour);
        }
        let seating = self.boards.claim(id, member.is_some(), &hosts);
        let set = ProcessSet {
            ranks,
            hosts,
            member,
            coordinator,
            neighbours,
            next_batch: 0,
            plans: 0,
            repeats: Repeats::default(),
            departed: None,
            seating,
            lending: Lending::No,
            at_devices: AtDevices::Unsought,
        };
        self.sets.insert(id, set);
        id
    }

    /// Lets every coordinator act on the time, and carries out what they intend.
    pub(super) fn turn_coordinators(&mut self, now: Time) -> bool {
        let mut moved = false;
        let mut place = 0;
        while let Some((&id, _)) = self.sets.iter().nth(place) {
            place += 1;
            moved |= self.turn_coordinator(id, now);
        }
        moved
    }

    /// Lets one coordinator act on the time, and carries out what it intends.
    pub(super) fn turn_coordinator(&mut self, id: SetId, now: Time) -> bool {
        let mut moved = false;
        let Some(coordinator) = self.coordinator_of(id) else { return false };
        if coordinator.poll_timeout().is_some_and(|at| at <= now) {
            coordinator.handle_timeout(now);
        }
        while self.broken.is_none()
            && let Some(intent) = self.coordinator_of(id).and_then(Coordinator::poll)
        {
            moved = true;
            self.carry_out(id, intent, now);
        }
        moved
    }

    pub(super) fn coordinator_of(&mut self, id: SetId) -> Option<&mut Coordinator> {
        self.sets.get_mut(&id).and_then(|s| s.coordinator.as_mut())
    }

    fn carry_out(&mut self, id: SetId, intent: Intent, now: Time) {
        match intent {
            Intent::Tell { to, message } => {
                let peer = self.sets[&id].ranks[to.0 as usize];
                self.links.tell(peer, &message);
                if let Some(coordinator) = self.coordinator_of(id) {
                    coordinator.recycle(message);
                }
            }
            Intent::Run(cut) => {
                self.run_cut(id, &cut, now);
                if let Some(coordinator) = self.coordinator_of(id) {
                    coordinator.recycle_cut(cut);
                }
            }
            Intent::Failed { op, mismatch } => self.end(op, Err(Error::Mismatch(mismatch))),
            Intent::Joined { op, last } => {
                let last = self.sets[&id].ranks[last.0 as usize];
                self.joined(id, op, last);
            }
            Intent::Warn(words) => self.warnings.push(words),
            Intent::Break(culprit, cause) => {
                let culprit = culprit.map(|m| self.sets[&id].ranks[m.0 as usize]);
                self.break_epoch_with(culprit, cause);
            }
        }
    }

    /// All have joined. The join is over when the batches are, to which this rank gave stand-ins: it may leave
    /// then, and others still wait for what those batches send.
    fn joined(&mut self, id: SetId, op: OpId, last: Rank) {
        self.seek_seat_again(id);
        self.call_to_devices_again(id);
        self.enter_ledger(id, Some(op), None);
        let sets = if id == GLOBAL_SET {
            self.sets.iter().map(|(&id, s)| (id, Arc::clone(&s.ranks))).collect()
        } else {
            Vec::new()
        };
        let Some(operation) = self.ops.get_mut(&op) else { return };
        operation.outcome.tensors.clear();
        operation.outcome.last_joined = Some(last);
        operation.outcome.set = Some(id);
        operation.outcome.sets = sets;
        operation.outcome.sets_made = if id == GLOBAL_SET { self.next_set } else { 0 };
        operation.agreed = true;
        operation.remaining = 0;
        for flight in self.flights.iter_mut().flatten() {
            if let Flight::Batch(flight) = flight
                && flight.set == id
            {
                flight.ops.push(Some(op));
                operation.remaining += 1;
            }
        }
        if operation.remaining == 0 {
            self.end(op, Ok(()));
        }
    }

    /// Runs one cut of the agreed log: set changes and barriers at once, the rest in batches.
    fn run_cut(&mut self, id: SetId, cut: &[Agreed], now: Time) {
        for agreed in cut {
            if let Some(call) = Call::of(agreed) {
                match call {
                    Call::Boards => self.sit_down(id, agreed),
                    Call::Devices => self.sit_down_at_devices(id, agreed),
                    Call::Lend => self.lending_agreed(id, agreed),
                    Call::Free(number) => self.plan_freed(id, number),
                }
                continue;
            }
            let tensors = agreed.signature.tensors.len();
            if let Some(op) = agreed.op {
                prepare_outcome(
                    self.ops.get_mut(&op).expect("an agreed operation is in flight here"),
                    agreed,
                );
            }
            self.enter_ledger(id, agreed.op, Some(agreed));
            if agreed.is_plan() {
                self.note_received_splits(id, agreed);
                self.plan_agreed(id, agreed);
                continue;
            }
            match agreed.signature.collective {
                Collective::AddSet => self.add_agreed_set(agreed, now),
                Collective::RemoveSet => self.remove_agreed_set(agreed),
                Collective::Barrier | Collective::Join => {
                    if let Some(op) = agreed.op {
                        self.end(op, Ok(()));
                    }
                }
                _ if agreed.is_inline() => self.finish_inline(id, agreed),
                // An empty group is complete as soon as it is agreed.
                _ if tensors == 0 => {
                    if let Some(op) = agreed.op {
                        self.end(op, Ok(()));
                    }
                }
                _ => self.note_received_splits(id, agreed),
            }
        }
        let mut fusion = std::mem::take(&mut self.fusion);
        fusion.fuse(cut, self.setup.fusion);
        cut.iter().for_each(|agreed| self.note_agreed(id, agreed));
        for batch in fusion.batches().filter(|batch| !batch.parts.is_empty()) {
            self.start_batch(id, cut, &batch);
        }
        self.fusion = fusion;
    }

    fn add_agreed_set(&mut self, agreed: &Agreed, now: Time) {
        let ranks = agreed.signature.ranks.clone();
        let known = self.sets.iter().find(|(_, set)| set.ranks[..] == ranks[..]).map(|(&id, _)| id);
        let result = match known {
            Some(id) => Err(Error::usage(format!(
                "a process set of these ranks exists already (number {}); use that one",
                id.0
            ))),
            None => {
                let id = self.make_set(&ranks);
                self.deliver_early(id, now);
                if let Some(operation) = agreed.op.and_then(|op| self.ops.get_mut(&op)) {
                    operation.outcome.set = Some(id);
                }
                Ok(())
            }
        };
        if let Some(op) = agreed.op {
            self.end(op, result);
        }
    }

    /// Hands over the messages that came before this rank had made their set.
    fn deliver_early(&mut self, id: SetId, now: Time) {
        let (ready, rest) = std::mem::take(&mut self.early).into_iter().partition(|(_, set, _)| *set == id);
        self.early = rest;
        let ready: Vec<(Rank, SetId, Vec<u8>)> = ready;
        for (peer, set, body) in ready {
            if let Err(cause) = self.coordinate(peer, set, &body, now) {
                self.break_epoch_with(Some(peer), cause);
            }
        }
    }

    fn remove_agreed_set(&mut self, agreed: &Agreed) {
        // By its number: after a change of epochs several sets may have the same ranks.
        let id = SetId(agreed.signature.root.0);
        let known = id != GLOBAL_SET && self.sets.contains_key(&id);
        if known {
            let error =
                Error::usage(format!("process set {} was removed while this operation was in flight", id.0));
            // What is done here is not taken back.
            self.dissolve_ledger(id);
            self.turn_ledgers();
            self.ledgers.remove(&id);
            self.fail_set(id, None, &error);
            self.leave_devices(id);
            self.forget_standings(id);
            self.sets.remove(&id);
        }
        if let Some(operation) = agreed.op.and_then(|op| self.ops.get_mut(&op)) {
            operation.outcome.set = known.then_some(id);
        }
        if let Some(op) = agreed.op {
            self.end(op, Ok(()));
        }
    }

    /// Alltoall: what each member sends here is part of the outcome.
    fn note_received_splits(&mut self, id: SetId, agreed: &Agreed) {
        if agreed.signature.collective != Collective::Alltoall {
            return;
        }
        let (me, size) = (self.sets[&id].me(), self.sets[&id].size());
        if let Some(operation) = agreed.op.and_then(|op| self.ops.get_mut(&op)) {
            for t in 0..agreed.signature.tensors.len() {
                let rows = (0..size).map(|from| super::operation::split(&agreed.call, from, me, t, size));
                operation.outcome.received_splits.extend(rows);
            }
        }
    }

    /// The ranks of a set.
    #[must_use]
    pub fn set_ranks(&self, set: SetId) -> Option<Arc<[Rank]>> {
        self.sets.get(&set).map(|s| Arc::clone(&s.ranks))
    }

    /// All sets.
    pub fn set_ids(&self) -> impl Iterator<Item = SetId> + '_ {
        self.sets.keys().copied()
    }
}

/// Ranks as a list for a message.
pub(super) fn list(ranks: &[Rank]) -> String {
    let words: Vec<String> = ranks.iter().take(16).map(|r| r.0.to_string()).collect();
    let more = if ranks.len() > 16 { format!(" and {} more", ranks.len() - 16) } else { String::new() };
    format!("ranks {}{more}", words.join(", "))
}

fn prepare_outcome(operation: &mut Operation, agreed: &Agreed) {
    let tensors = agreed.signature.tensors.len();
    operation.remaining = tensors;
    operation.agreed = true;
    // A recycled outcome keeps the memory of its shapes.
    let outputs = &mut operation.outcome.tensors;
    outputs.resize_with(tensors, super::OutputTensor::default);
    for (output, signature) in outputs.iter_mut().zip(&agreed.signature.tensors) {
        output.dtype = signature.dtype;
        output.shape.clear();
        output.memory = None;
        output.direct = false;
    }
}

/// Host numbers in order of first appearance among the members.
fn renumbered(hosts: impl Iterator<Item = u32>) -> Arc<[u32]> {
    let mut seen: Vec<u32> = Vec::new();
    hosts
        .map(|host| {
            let place = seen.iter().position(|&h| h == host);
            place.unwrap_or_else(|| {
                seen.push(host);
                seen.len() - 1
            }) as u32
        })
        .collect()
}
