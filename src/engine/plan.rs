//! From an agreed batch to something that can run: query, choice, schedule, layout; all of it computed once
//! per shape and kept. A plan holds orders with their pieces resolved; a run only fills in addresses.
#![forbid(unsafe_code)]

use super::boards;
use super::rounds::rounds;
use crate::algorithm::Query;
use crate::cost::Prices;
use crate::device::{DeviceOrder, Finish, Reduction};
use crate::hash::Map;
use crate::layout::{Cut, Extent, Layout, dealt_rows, input_region, output_region};
use crate::limits::BOARD_SLOT_BYTES;
use crate::memory::{Piece, PieceRange};
use crate::run::Program;
use crate::schedule::{Schedule, Span, Verb};
use crate::select::select;
use crate::transport::board::Exchange;
use crate::transport::board::device::Rounds;
use crate::types::{Collective, DType, ReduceOp, Scale};
use std::sync::Arc;

/// What a step of a window asks for.
#[derive(Clone, Debug)]
pub enum Action {
    /// No bytes are concerned: complete at once.
    Nothing,
    /// Send to a member.
    Send {
        /// The member that receives.
        to: u32,
        /// What is read.
        src: PieceRange,
    },
    /// Receive from a member.
    Recv {
        /// The member that sends.
        from: u32,
        /// Where the result goes.
        dst: PieceRange,
    },
    /// Receive from a member and reduce.
    RecvReduce {
        /// The member that sends.
        from: u32,
        /// Where the result goes.
        dst: PieceRange,
        /// The operand that is here.
        with: PieceRange,
        /// Operation and type.
        reduction: Reduction,
        /// Whether the incoming operand is the left one.
        incoming_first: bool,
    },
    /// Work within this process.
    Device(DeviceOrder),
}

/// A batch's shape, made ready to run.
#[derive(Debug)]
pub struct Plan {
    /// What waits for what.
    pub program: Arc<Program>,
    /// For each window, for each step: what to do.
    actions: Vec<Action>,
    /// Scratch of all windows in flight together.
    pub scratch_bytes: u64,
    /// The algorithm, for the timeline and for benches.
    pub algorithm: &'static str,
}

impl Plan {
    /// What a step of a window asks for.
    #[must_use]
    pub fn action(&self, window: u32, step: u32) -> &Action {
        &self.actions[(window * self.program.steps() + step) as usize]
    }
}

/// Everything that a plan depends on, besides what is fixed for the epoch.
#[derive(Clone, Debug)]
pub struct BatchShape<'a> {
    /// What is to be done.
    pub collective: Collective,
    /// How values are combined.
    pub op: ReduceOp,
    /// Element type.
    pub dtype: DType,
    /// This member.
    pub me: u32,
    /// The member that is the root; 0 where there is none.
    pub root: u32,
    /// Factors.
    pub scale: Scale,
    /// What Average divides by.
    pub divisor: u32,
    /// Host number of each member.
    pub hosts: &'a Arc<[u32]>,
    /// For each tensor: its length in bytes (even collectives), or the bytes of each member's block, in
    /// member order (block collectives); for alltoall the bytes sent to each member, then those received
    /// from each.
    pub bytes: &'a [u64],
    /// Tensors in the batch.
    pub tensors: usize,
    /// Bytes of the whole batch over all members: the same number on each, for the choice must be the same.
    pub total_bytes: u64,
    /// Alltoall: the most bytes that any member sends to any other; else 0.
    pub longest: u64,
}

/// What is fixed for the epoch.
#[derive(Clone, Debug)]
pub struct PlanRules {
    /// Prices of links.
    pub prices: Prices,
    /// The algorithm that the user forces.
    pub forced: Option<String>,
    /// Whether the order of summation is fixed.
    pub strict: bool,
    /// Bytes of one window.
    pub window_bytes: u64,
    /// Plans kept.
    pub plans_max: usize,
}

/// Windows of a run at work at the same time.
const WINDOWS_IN_FLIGHT: u32 = 4;

/// Plans by shape.
#[derive(Debug)]
pub struct Plans {
    rules: PlanRules,
    plans: Map<Box<[u64]>, Arc<Plan>>,
    exchanges: Map<Box<[u64]>, Arc<Exchange>>,
    rounds: Map<Box<[u64]>, Arc<Rounds>>,
    key: Vec<u64>,
}

impl Plans {
    /// An empty cache.
    #[must_use]
    pub fn new(rules: PlanRules) -> Plans {
        Plans {
            rules,
            plans: Map::default(),
            exchanges: Map::default(),
            rounds: Map::default(),
            key: Vec::new(),
        }
    }

    /// The plan of a shape, which is made when it is first seen. `set` distinguishes sets whose hosts differ.
    pub fn get(&mut self, set: u32, shape: &BatchShape<'_>) -> Arc<Plan> {
        self.find(set, shape);
        let Plans { rules, plans, key, .. } = self;
        remembered(plans, key, rules.plans_max, || make(shape, rules))
    }

    /// The exchange of a shape over boards, which is made when it is first seen.
    pub fn exchange(&mut self, set: u32, shape: &BatchShape<'_>, lends: bool) -> Arc<Exchange> {
        self.find(set, shape);
        self.key.push(u64::from(lends));
        let Plans { rules, exchanges, key, .. } = self;
        remembered(exchanges, key, rules.plans_max, || boards::exchange(shape, BOARD_SLOT_BYTES, lends))
    }

    /// What is done for a shape at devices, which is made when it is first seen. With `absent` this member has joined.
    pub fn rounds(&mut self, set: u32, shape: &BatchShape<'_>, absent: bool, slot_bytes: u64) -> Arc<Rounds> {
        self.find(set, shape);
        self.key.push(u64::from(absent));
        let Plans { rules, rounds: known, key, .. } = self;
        remembered(known, key, rules.plans_max, || rounds(shape, absent, slot_bytes))
    }

    /// The algorithm that the user forces.
    #[must_use]
    pub fn forced(&self) -> Option<&str> {
        self.rules.forced.as_deref()
    }

    /// Writes down what a plan depends on.
    fn find(&mut self, set: u32, shape: &BatchShape<'_>) {
        self.key.clear();
        self.key.extend([
            u64::from(set),
            u64::from(shape.collective.code()) << 16
                | u64::from(shape.op.code()) << 8
                | u64::from(shape.dtype.code()),
            u64::from(shape.root) << 32 | u64::from(shape.divisor),
            shape.scale.pre.to_bits(),
            shape.scale.post.to_bits(),
            shape.total_bytes,
            shape.longest,
        ]);
        self.key.extend_from_slice(shape.bytes);
    }
}

/// What was made for a key, or is made now.
fn remembered<T>(
    known: &mut Map<Box<[u64]>, Arc<T>>,
    key: &[u64],
    most: usize,
    make: impl FnOnce() -> T,
) -> Arc<T> {
    if let Some(known) = known.get(key) {
        return Arc::clone(known);
    }
    if known.len() >= most {
        // Shapes that come back are made again; runs in flight keep theirs.
        known.clear();
    }
    let made = Arc::new(make());
    known.insert(key.into(), Arc::clone(&made));
    made
}

/// Makes a plan: choose, build, lay out, resolve.
fn make(shape: &BatchShape<'_>, rules: &PlanRules) -> Plan {
    let query = Query {
        collective: shape.collective,
        op: shape.op,
        dtype: shape.dtype,
        bytes: shape.total_bytes,
        hosts: Arc::clone(shape.hosts),
        root: shape.root,
        prescaled: shape.scale.pre != 1.0,
        strict: rules.strict,
    };
    let choice = select(&query, &rules.prices, rules.forced.as_deref(), rules.window_bytes);
    let schedule = choice.algorithm.schedule(shape.me, &query);
    let layout = layout(shape, choice.chunks);
    let program = Arc::new(Program::new(&schedule, choice.windows, WINDOWS_IN_FLIGHT));
    let stride = layout.scratch_stride(choice.windows);
    let scratch_bytes = stride * u64::from(schedule.scratch) * u64::from(program.in_flight);
    let mut resolver = Resolver { shape, layout: &layout, schedule: &schedule, cut: None, list: Vec::new() };
    let actions = resolver.all(choice.windows, program.in_flight);
    Plan { program, actions, scratch_bytes, algorithm: choice.algorithm.name }
}

/// Where the chunks of a batch lie for this member.
pub(super) fn layout(shape: &BatchShape<'_>, chunks: u32) -> Layout {
    let size = shape.hosts.len();
    let me = shape.me as usize;
    match shape.collective {
        Collective::Allreduce | Collective::Reduce | Collective::Broadcast => {
            Layout::even(shape.bytes, chunks, shape.op == ReduceOp::Adasum && shape.collective.reduces())
        }
        Collective::Allgather | Collective::Gather => {
            // The output holds every block in member order; the input is the own block.
            let (output, lengths) = blocks(shape, size, output_region);
            let mut input = vec![Vec::new(); size];
            input[me] =
                (0..shape.tensors).map(|t| whole(input_region(t), shape.bytes[t * size + me])).collect();
            Layout::blocks(input, output, lengths, shape.tensors)
        }
        Collective::Reducescatter | Collective::Scatter => {
            let (input, lengths) = blocks(shape, size, input_region);
            let mut output = vec![Vec::new(); size];
            output[me] =
                (0..shape.tensors).map(|t| whole(output_region(t), shape.bytes[t * size + me])).collect();
            Layout::blocks(input, output, lengths, shape.tensors)
        }
        Collective::Alltoall => alltoall_layout(shape, size),
        Collective::Barrier | Collective::Join | Collective::AddSet | Collective::RemoveSet => {
            unreachable!("complete by agreement, without a plan")
        }
    }
}

/// Input chunk `j` goes to member `j`; output chunk `i` comes from member `i`. The two have different lengths.
fn alltoall_layout(shape: &BatchShape<'_>, size: usize) -> Layout {
    let mut input = vec![Vec::new(); size];
    let mut output = vec![Vec::new(); size];
    let mut lengths = vec![0u64; size];
    for t in 0..shape.tensors {
        let (sent, received) = shape.bytes[t * 2 * size..(t + 1) * 2 * size].split_at(size);
        let (mut from, mut to) = (0, 0);
        for member in 0..size {
            input[member].push(Extent { region: input_region(t), offset: from, len: sent[member] });
            output[member].push(Extent { region: output_region(t), offset: to, len: received[member] });
            from += sent[member];
            to += received[member];
            lengths[member] += sent[member].max(received[member]);
        }
    }
    Layout::blocks(input, output, lengths, shape.tensors)
}

/// Each member's block of every tensor, where a region holds all blocks in member order.
fn blocks(shape: &BatchShape<'_>, size: usize, region: fn(usize) -> u32) -> (Vec<Vec<Extent>>, Vec<u64>) {
    let mut lists = vec![Vec::with_capacity(shape.tensors); size];
    let mut lengths = vec![0u64; size];
    for t in 0..shape.tensors {
        let mut offset = 0;
        for member in 0..size {
            let len = shape.bytes[t * size + member];
            lists[member].push(Extent { region: region(t), offset, len });
            lengths[member] += len;
            offset += len;
        }
    }
    (lists, lengths)
}

fn whole(region: u32, len: u64) -> Extent {
    Extent { region, offset: 0, len }
}

/// The bytes of each member's rows when a tensor's rows are dealt out.
pub fn dealt_bytes(rows: u64, row_bytes: u64, size: u32, into: &mut Vec<u64>) {
    for member in 0..u64::from(size) {
        let range = dealt_rows(rows, member, u64::from(size));
        into.push((range.end - range.start) * row_bytes);
    }
}

/// Turns spans into pieces.
struct Resolver<'a> {
    shape: &'a BatchShape<'a>,
    layout: &'a Layout,
    schedule: &'a Schedule,
    cut: Option<Cut>,
    list: Vec<Extent>,
}

impl Resolver<'_> {
    fn all(&mut self, windows: u32, in_flight: u32) -> Vec<Action> {
        let schedule = self.schedule;
        let mut actions = Vec::with_capacity(schedule.steps.len() * windows as usize);
        for window in 0..windows {
            self.cut =
                Some(Cut { window, windows, slot: window % in_flight, scratch_chunks: schedule.scratch });
            actions.extend(schedule.steps.iter().map(|step| self.action(&step.verb)));
        }
        actions
    }

    fn pieces(&mut self, span: &Span) -> PieceRange {
        self.list.clear();
        self.layout.resolve(span, self.cut.expect("a window is set"), &mut self.list);
        let list: Arc<[Piece]> =
            self.list.iter().map(|e| Piece { region: e.region, offset: e.offset, len: e.len }).collect();
        PieceRange { start: 0, end: list.len() as u32, list }
    }

    fn action(&mut self, verb: &Verb) -> Action {
        let reduction = Reduction { dtype: self.shape.dtype, op: self.shape.op };
        let finish = Finish { divisor: self.shape.divisor, post: self.shape.scale.post };
        let dtype = self.shape.dtype;
        let action = match verb {
            Verb::Send { to, src } => Action::Send { to: *to, src: self.pieces(src) },
            Verb::Recv { from, dst } => Action::Recv { from: *from, dst: self.pieces(dst) },
            Verb::RecvReduce { from, dst, with } => Action::RecvReduce {
                from: *from,
                dst: self.pieces(dst),
                with: self.pieces(with),
                reduction,
                incoming_first: *from < self.shape.me,
            },
            Verb::Copy { dst, src } => {
                Action::Device(DeviceOrder::Copy { dst: self.pieces(dst), src: self.pieces(src) })
            }
            Verb::Prepare { dst, src } => Action::Device(DeviceOrder::Scale {
                dst: self.pieces(dst),
                src: self.pieces(src),
                dtype,
                factor: self.shape.scale.pre,
            }),
            Verb::Reduce { dst, a, b } => Action::Device(DeviceOrder::Reduce {
                dst: self.pieces(dst),
                a: self.pieces(a),
                b: self.pieces(b),
                reduction,
            }),
            Verb::ReduceMany { dst, srcs } => Action::Device(DeviceOrder::ReduceMany {
                dst: self.pieces(dst),
                srcs: srcs.iter().map(|s| self.pieces(s)).collect(),
                reduction,
                pre: self.shape.scale.pre,
                finish,
            }),
            Verb::Combine { dst, a, b } => Action::Device(DeviceOrder::Combine {
                dst: self.pieces(dst),
                a: self.pieces(a),
                b: self.pieces(b),
                dtype,
            }),
            // The value of an only member has seen no reduction, which makes 0 or 1 of every bool.
            Verb::Finish { span } if dtype == DType::Bool && self.shape.hosts.len() == 1 => {
                Action::Device(DeviceOrder::ReduceMany {
                    dst: self.pieces(span),
                    srcs: vec![self.pieces(span)],
                    reduction,
                    pre: 1.0,
                    finish,
                })
            }
            Verb::Finish { .. } if finish.is_identity() => Action::Nothing,
            Verb::Finish { span } => {
                Action::Device(DeviceOrder::Finish { dst: self.pieces(span), dtype, finish })
            }
        };
        if is_empty(&action) { Action::Nothing } else { action }
    }
}

/// Whether no bytes are concerned. Both sides of a message see the same length, so both leave it out.
fn is_empty(action: &Action) -> bool {
    let range = match action {
        Action::Nothing => return true,
        Action::Send { src, .. } => src,
        Action::Recv { dst, .. } | Action::RecvReduce { dst, .. } => dst,
        Action::Device(order) => match order {
            DeviceOrder::Copy { dst, .. }
            | DeviceOrder::Scale { dst, .. }
            | DeviceOrder::Reduce { dst, .. }
            | DeviceOrder::ReduceMany { dst, .. }
            | DeviceOrder::Combine { dst, .. }
            | DeviceOrder::Finish { dst, .. }
            | DeviceOrder::Identity { dst, .. } => dst,
        },
    };
    range.pieces().is_empty()
}
