//! A batch in flight: its memory is registered, its plan is run, its operations are told.

use super::Engine;
use super::operation::{self, Sizes};
use super::plan::{Action, BatchShape, Plan, dealt_bytes};
use crate::coordinator::{Agreed, OpId};
use crate::device::{Device, DeviceOrder, Reduction, Token};
use crate::error::{Cause, Error};
use crate::fusion::Batch;
use crate::layout::scratch_region;
use crate::memory::{OwnedBytes, Piece, PieceRange, Region, RunId};
use crate::run::{Order, Run};
use crate::transport::board::Exchange;
use crate::transport::{LinkOrder, OrderKind, Stream};
use crate::types::{Collective, DType, JoinAverage, Rank, ReduceOp, SetId};
use std::sync::Arc;

/// What a registered run of memory belongs to.
pub(super) enum Flight {
    /// A batch.
    Batch(Box<BatchFlight>),
    /// A point-to-point message.
    Message {
        /// Its operation.
        op: OpId,
        /// The run, for its generation.
        run: RunId,
        /// Who is at the other end.
        peer: Rank,
        /// Its process set.
        set: SetId,
        /// Its name.
        stream: Stream,
        /// Whether it is sent from here.
        sends: bool,
    },
}

/// A batch in flight.
#[derive(Default)]
pub(super) struct BatchFlight {
    pub(super) set: SetId,
    sequence: u64,
    plan: Option<Arc<Plan>>,
    run: Run,
    id: Option<RunId>,
    /// Whether it goes over the boards.
    pub(super) on_boards: bool,
    /// Whether it goes over the boards, and members tell each other where their tensors lie.
    pub(super) lends: bool,
    /// Whether it goes from device to device.
    direct: bool,
    /// The operation of each tensor; none where this member has joined. A join that waits for the flight stands
    /// behind them.
    pub(super) ops: Vec<Option<OpId>>,
    /// Stand-ins for the tensors that a joined member does not have.
    stand_ins: Vec<OwnedBytes>,
    /// How those are filled, where something is reduced.
    identity: Option<Reduction>,
    scratch: Option<OwnedBytes>,
    pub(super) regions: Vec<Region>,
    bytes: Vec<u64>,
}

/// Scratch buffers kept for later batches.
const SCRATCH_KEPT: usize = 8;

impl Engine {
    /// Starts one batch of an agreed cut.
    pub(super) fn start_batch(&mut self, set: SetId, cut: &[Agreed], batch: &Batch<'_>) {
        let mut flight = self.spare_flights.pop().unwrap_or_default();
        let process_set = &self.sets[&set];
        let (me, size) = (process_set.me(), process_set.size());
        let first = &cut[batch.operation as usize];
        let signature = Arc::clone(&first.signature);
        let root = process_set.root_of(&signature);
        let hosts = Arc::clone(&process_set.hosts);
        let dtype = signature.tensors[batch.parts[0].tensor as usize].dtype;
        let reduction = Reduction { dtype, op: signature.op };

        flight.set = set;
        flight.ops.clear();
        flight.regions.clear();
        flight.bytes.clear();
        flight.stand_ins.clear();
        flight.identity = None;
        let mut total_bytes = 0;
        for part in batch.parts {
            let agreed = &cut[part.operation as usize];
            total_bytes += push_bytes(agreed, part.tensor as usize, me, size, &mut flight.bytes);
        }
        flight.direct = self.goes_direct(set, cut, batch.operation as usize, total_bytes);
        flight.lends = false;
        flight.on_boards = !flight.direct && self.goes_over_boards(set, &signature);
        for part in batch.parts {
            let agreed = &cut[part.operation as usize];
            let sizes = operation::sizes(agreed, part.tensor as usize, me, size, root);
            flight.ops.push(agreed.op);
            match agreed.op {
                _ if flight.direct => {
                    if let Err(cause) = self.take_device_tensor(agreed, *part, sizes, &mut flight.regions) {
                        return self.break_epoch_with(Some(self.me), cause);
                    }
                }
                Some(op) => {
                    let tensor = &agreed.signature.tensors[part.tensor as usize];
                    self.take_tensor(op, part.tensor as usize, tensor, sizes, &mut flight.regions);
                }
                None => stand_in(&sizes, reduction, signature.collective, &mut flight),
            }
        }
        let shape = shape(first, dtype, (me, root), &hosts, (&flight.bytes, total_bytes), batch.parts.len());
        if flight.direct {
            let slot_bytes = self.setup.direct.slot_bytes;
            let rounds = self.plans.rounds(set.0, &shape, first.op.is_none(), slot_bytes);
            return self.launch_direct(flight, &rounds);
        }
        if flight.on_boards {
            flight.lends = self.asks_where(set, &shape);
            let exchange = self.plans.exchange(set.0, &shape, flight.lends);
            return self.launch_on_boards(flight, &exchange);
        }
        let plan = self.plans.get(set.0, &shape);
        self.last_algorithm = Some(plan.algorithm);
        self.launch(flight, plan);
    }

    /// Registers the memory of a batch and gives its first orders.
    fn launch(&mut self, mut flight: Box<BatchFlight>, plan: Arc<Plan>) {
        flight.scratch = self.take_scratch(plan.scratch_bytes);
        if let Some(scratch) = &flight.scratch {
            assert_eq!(
                flight.regions.len(),
                scratch_region(flight.ops.len()) as usize,
                "two regions per tensor"
            );
            // SAFETY: the flight owns the scratch until the run is forgotten.
            flight.regions.push(unsafe { Region::new(scratch.as_ptr(), plan.scratch_bytes) });
        }
        let id = self.register(&mut flight);
        let mut orders = std::mem::take(&mut self.orders);
        flight.run.start(Arc::clone(&plan.program), &mut orders);
        flight.plan = Some(plan);
        self.place_flight(id, Flight::Batch(flight));
        self.follow(id, &mut orders);
        self.orders = orders;
    }

    /// Registers the memory of a batch and hands it to the boards.
    fn launch_on_boards(&mut self, mut flight: Box<BatchFlight>, exchange: &Arc<Exchange>) {
        self.last_algorithm = Some("direct");
        let id = self.register(&mut flight);
        let set = flight.set;
        self.place_flight(id, Flight::Batch(flight));
        if exchange.ticks == 0 {
            return self.finish_batch(id);
        }
        self.seat_of(set)
            .expect("a batch goes over boards where the set has taken its seats")
            .push(id, exchange);
    }

    /// Makes the memory of a batch known, and gives the batch its number in its set.
    pub(super) fn register(&mut self, flight: &mut BatchFlight) -> RunId {
        let id = self.memory.register(flight.regions.iter().copied());
        let process_set = self.sets.get_mut(&flight.set).expect("a batch belongs to a known set");
        flight.sequence = process_set.next_batch;
        process_set.next_batch += 1;
        flight.id = Some(id);
        self.fill_stand_ins(flight, id);
        id
    }

    pub(super) fn place_flight(&mut self, id: RunId, flight: Flight) {
        let slot = id.slot as usize;
        if self.flights.len() <= slot {
            self.flights.resize_with(slot + 1, || None);
        }
        self.flights[slot] = Some(flight);
        self.flying += 1;
    }

    /// A step is complete.
    pub(super) fn step_done(&mut self, token: Token) {
        match &mut self.flights[token.run.slot as usize] {
            Some(Flight::Batch(flight)) if flight.id == Some(token.run) => {
                let mut orders = std::mem::take(&mut self.orders);
                flight.run.done(Order { window: token.window, step: token.step }, &mut orders);
                self.follow(token.run, &mut orders);
                self.orders = orders;
            }
            Some(Flight::Message { run, .. }) if *run == token.run => self.finish_message(token.run, None),
            // A completion that crossed the end of its run (a batch that failed while a message was under way).
            _ => {}
        }
    }

    /// Carries out orders until none is left that can be completed at once.
    fn follow(&mut self, id: RunId, orders: &mut Vec<Order>) {
        let Some(Flight::Batch(flight)) = &mut self.flights[id.slot as usize] else { return };
        let plan = Arc::clone(flight.plan.as_ref().expect("a flight has a plan"));
        let set = &self.sets[&flight.set];
        let stream = |window: u32, step: u32| {
            // The windows of one slot run one after another on every member, so their messages meet in order.
            let slot = window % plan.program.in_flight;
            batch_stream(flight.set, flight.sequence, slot, plan.program.ordinal(step))
        };
        let mut failure = None;
        while let Some(order) = orders.pop() {
            let token = Token { run: id, window: order.window, step: order.step };
            let (peer, kind) = match plan.action(order.window, order.step) {
                Action::Nothing => {
                    flight.run.done(order, orders);
                    continue;
                }
                Action::Device(work) => {
                    match self.device.post(token, work, &self.memory) {
                        Ok(true) => flight.run.done(order, orders),
                        Ok(false) => {}
                        Err(cause) => failure = Some(cause),
                    }
                    continue;
                }
                Action::Send { to, src } => (*to, OrderKind::Send { src: src.clone() }),
                Action::Recv { from, dst } => (*from, OrderKind::Recv { dst: dst.clone() }),
                Action::RecvReduce { from, dst, with, reduction, incoming_first } => (
                    *from,
                    OrderKind::RecvReduce {
                        dst: dst.clone(),
                        with: with.clone(),
                        reduction: *reduction,
                        incoming_first: *incoming_first,
                    },
                ),
            };
            self.links.post(
                set.ranks[peer as usize],
                LinkOrder { token, stream: stream(order.window, order.step), kind },
            );
        }
        if flight.run.is_finished() {
            self.finish_batch(id);
        }
        if let Some(cause) = failure {
            self.break_epoch_with(Some(self.me), cause);
        }
    }

    pub(super) fn finish_batch(&mut self, id: RunId) {
        let Some(Flight::Batch(mut flight)) = self.flights[id.slot as usize].take() else { return };
        self.flying -= 1;
        self.memory.forget(id);
        for op in flight.ops.drain(..).flatten() {
            self.tensor_done(op);
        }
        self.reclaim(flight);
    }

    /// Takes back what a flight that is over had borrowed.
    pub(super) fn reclaim(&mut self, mut flight: Box<BatchFlight>) {
        if let Some(scratch) = flight.scratch.take()
            && self.scratch.len() < SCRATCH_KEPT
        {
            self.scratch.push(scratch);
        }
        flight.plan = None;
        flight.id = None;
        flight.stand_ins.clear();
        self.spare_flights.push(flight);
    }

    /// Working memory of at least this size: the smallest kept one that is large enough, or a new one.
    fn take_scratch(&mut self, bytes: u64) -> Option<OwnedBytes> {
        if bytes == 0 {
            return None;
        }
        let fit = (0..self.scratch.len())
            .filter(|&i| self.scratch[i].as_slice().len() as u64 >= bytes)
            .min_by_key(|&i| self.scratch[i].as_slice().len());
        if let Some(i) = fit {
            return Some(self.scratch.swap_remove(i));
        }
        if self.scratch.len() == SCRATCH_KEPT {
            self.scratch.swap_remove(0);
        }
        Some(OwnedBytes::recycled(bytes as usize))
    }

    /// Puts a tensor's two regions into a batch's table, and allocates its output where the caller gave none.
    pub(super) fn take_tensor(
        &mut self,
        op: OpId,
        t: usize,
        tensor: &crate::types::TensorSignature,
        sizes: Sizes,
        regions: &mut Vec<Region>,
    ) {
        let output_bytes = sizes.output;
        let operation = self.ops.get_mut(&op).expect("an agreed operation is in flight here");
        let memory = operation.tensors[t];
        regions.push(memory.input);
        let Some(shape) = sizes.shape else {
            // This member gets no result (reduce off the root): its input is only read, and what passes
            // through it goes through a stand-in of the output.
            let stand_in = OwnedBytes::recycled(sizes.input as usize);
            // SAFETY: the operation keeps the bytes until it has ended.
            regions.push(unsafe { Region::new(stand_in.as_ptr(), sizes.input) });
            operation.stand_ins.push(stand_in);
            return;
        };
        let (region, owned) = match memory.output {
            Some(region) => (region, None),
            None => {
                let owned = OwnedBytes::recycled(output_bytes as usize);
                // SAFETY: the operation's outcome keeps the bytes until it has ended.
                (unsafe { Region::new(owned.as_ptr(), output_bytes) }, Some(owned))
            }
        };
        regions.push(region);
        let output = &mut operation.outcome.tensors[t];
        output.memory = owned;
        shape.write(&tensor.shape, &mut output.shape);
    }

    /// Fills the inputs of tensors that this joined member does not have with the identity.
    fn fill_stand_ins(&mut self, flight: &BatchFlight, id: RunId) {
        let Some(reduction) = flight.identity else { return };
        for (t, _) in flight.ops.iter().enumerate().filter(|(_, op)| op.is_none()) {
            let region = crate::layout::input_region(t);
            let len = flight.regions[region as usize].len();
            if len == 0 {
                continue;
            }
            let list: Arc<[Piece]> = Arc::new([Piece { region, offset: 0, len }]);
            let dst = PieceRange { list, start: 0, end: 1 };
            let token = Token { run: id, window: 0, step: 0 };
            let done = self.device.post(token, &DeviceOrder::Identity { dst, reduction }, &self.memory);
            assert!(matches!(done, Ok(true)), "the host completes at once");
        }
    }

    /// One tensor of an operation is complete.
    pub(super) fn tensor_done(&mut self, op: OpId) {
        let Some(operation) = self.ops.get_mut(&op) else { return };
        operation.remaining -= 1;
        if operation.remaining == 0 {
            self.end(op, Ok(()));
        }
    }

    /// Ends the epoch because something failed here.
    pub(super) fn break_epoch_with(&mut self, culprit: Option<Rank>, cause: Cause) {
        self.quiet_until = None;
        self.membership.break_here(culprit, cause);
    }

    /// Fails everything in flight and withdraws it from the links.
    pub(super) fn fail_all(&mut self, error: &Error) {
        self.take_back_lent(None);
        self.fail_channels(None, error);
        self.fail_standings(None, None, error);
        for slot in 0..self.flights.len() {
            self.drop_flight(slot);
        }
        for op in self.ops_in_flight() {
            self.end(op, Err(error.clone()));
        }
    }

    /// Fails everything in flight of one set; with `without`, only what needs this rank: messages between
    /// others go on.
    pub(super) fn fail_set(&mut self, set: SetId, without: Option<Rank>, error: &Error) {
        self.take_back_lent(Some(set));
        self.fail_channels(Some(set), error);
        self.fail_standings(Some(set), without, error);
        let mut kept: Vec<OpId> = without.iter().flat_map(|&who| self.unmatched.without(set, who)).collect();
        for slot in 0..self.flights.len() {
            let concerned = match &self.flights[slot] {
                Some(Flight::Batch(flight)) => flight.set == set,
                Some(Flight::Message { set: of, peer, op, .. }) if *of == set => {
                    let goes_on = without.is_some_and(|who| who != *peer);
                    if goes_on {
                        kept.push(*op);
                    }
                    !goes_on
                }
                _ => false,
            };
            if concerned {
                self.drop_flight(slot);
            }
        }
        let mut ops = self.ops_in_flight();
        ops.retain(|op| self.ops[op].set == set && !kept.contains(op));
        for op in ops {
            self.end(op, Err(error.clone()));
        }
    }

    pub(super) fn drop_flight(&mut self, slot: usize) {
        let Some(flight) = self.flights[slot].take() else { return };
        self.flying -= 1;
        let run = match &flight {
            Flight::Batch(flight) => flight.id.expect("a flight has a run"),
            Flight::Message { run, .. } => *run,
        };
        self.links.withdraw(run, &self.memory);
        self.memory.forget(run);
        if let Flight::Batch(flight) = flight {
            if flight.on_boards {
                // Batches follow each other there, so with one the whole seat is over; and so is the set.
                self.leave_seat(flight.set);
            }
            if flight.direct {
                // After this none of our kernels touches the memory of its operations.
                self.leave_devices(flight.set);
            }
            self.reclaim(flight);
        }
    }
}

/// What a batch of `tensors` tensors of this type depends on, the first of them of the agreed operation: this member and
/// the root, and the bytes of each tensor and of all members' together.
pub(super) fn shape<'a>(
    first: &Agreed,
    dtype: DType,
    (me, root): (u32, u32),
    hosts: &'a Arc<[u32]>,
    (bytes, total_bytes): (&'a [u64], u64),
    tensors: usize,
) -> BatchShape<'a> {
    let signature = &first.signature;
    let size = hosts.len() as u32;
    BatchShape {
        collective: signature.collective,
        op: if signature.collective.reduces() { signature.op } else { ReduceOp::Sum },
        dtype,
        me,
        root,
        scale: signature.scale,
        divisor: divisor(first, size),
        hosts,
        bytes,
        tensors,
        total_bytes,
        longest: if signature.collective == Collective::Alltoall { longest_block(first, size) } else { 0 },
    }
}

/// What the sum is divided by.
pub(super) fn divisor(agreed: &Agreed, size: u32) -> u32 {
    match (agreed.signature.op, agreed.signature.join_average) {
        (ReduceOp::Average, JoinAverage::Size) => size,
        (ReduceOp::Average, JoinAverage::Present) => size - agreed.absent.len() as u32,
        _ => 1,
    }
}

/// What a tensor adds to [`BatchShape::bytes`]; returns its bytes over all members.
pub(super) fn push_bytes(agreed: &Agreed, t: usize, me: u32, size: u32, into: &mut Vec<u64>) -> u64 {
    let signature = &agreed.signature;
    let tensor = &signature.tensors[t];
    let row_bytes = tensor.row_elements() * tensor.dtype.size() as u64;
    let start = into.len();
    match signature.collective {
        Collective::Allgather | Collective::Gather => {
            into.extend((0..size).map(|m| operation::gathered_rows(&agreed.call, m, t) * row_bytes));
            into[start..].iter().sum()
        }
        Collective::Reducescatter | Collective::Scatter => {
            dealt_bytes(tensor.shape[0], row_bytes, size, into);
            into[start..].iter().sum()
        }
        Collective::Alltoall => {
            into.extend((0..size).map(|to| operation::split(&agreed.call, me, to, t, size) * row_bytes));
            into.extend((0..size).map(|from| operation::split(&agreed.call, from, me, t, size) * row_bytes));
            let all = |from| {
                (0..size).map(move |to| operation::split(&agreed.call, from, to, t, size)).sum::<u64>()
            };
            (0..size).map(all).sum::<u64>() * row_bytes
        }
        _ => {
            into.push(tensor.elements() * tensor.dtype.size() as u64);
            into[start]
        }
    }
}

/// Alltoall: the most bytes that any member sends to any other. The same number on all members.
fn longest_block(agreed: &Agreed, size: u32) -> u64 {
    let tensors = &agreed.signature.tensors;
    let block = |from, to| -> u64 {
        let bytes = |(t, tensor): (usize, &crate::types::TensorSignature)| {
            operation::split(&agreed.call, from, to, t, size)
                * tensor.row_elements()
                * tensor.dtype.size() as u64
        };
        tensors.iter().enumerate().map(bytes).sum()
    };
    (0..size)
        .flat_map(|from| (0..size).map(move |to| (from, to)))
        .map(|(from, to)| block(from, to))
        .max()
        .unwrap_or(0)
}

/// Memory in the place of a tensor that a joined member does not have.
fn stand_in(sizes: &Sizes, reduction: Reduction, collective: Collective, flight: &mut BatchFlight) {
    flight.identity = collective.reduces().then_some(reduction);
    let output = sizes.output.max(if collective == Collective::Reduce { sizes.input } else { 0 });
    for bytes in [sizes.input, output] {
        let owned = OwnedBytes::zeroed(bytes as usize);
        // SAFETY: the flight owns the stand-ins until the run is forgotten.
        flight.regions.push(unsafe { Region::new(owned.as_ptr(), bytes) });
        flight.stand_ins.push(owned);
    }
}

/// The stream of the messages of one step in the windows of one slot, which both sides compute alike.
fn batch_stream(set: SetId, sequence: u64, slot: u32, ordinal: u32) -> Stream {
    Stream(
        u128::from(set.0) << 96
            | u128::from(sequence & 0xFFFF_FFFF_FFFF) << 48
            | u128::from(slot) << 32
            | u128::from(ordinal),
    )
}
