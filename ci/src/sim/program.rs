//! What the ranks of a simulated cluster do: a list of operations, of which each rank submits its own in an
//! order of its own, some of them wrong; and what goes wrong besides.
#![forbid(unsafe_code)]

use carole::rendezvous::past::Sets;
use carole::types::{Collective, DType, JoinAverage, Rank, ReduceOp, Scale, SetId};

/// A small generator of random numbers (splitmix64), so that a seed means the same everywhere.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of these.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
    /// Mixes a list.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// How one rank's call differs from the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Another element type.
    DType,
    /// Another shape.
    Shape,
    /// Another operation.
    Op,
    /// Another collective.
    Collective,
    /// The binding refused the call.
    Refused,
}

/// What kind of operation it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A collective that moves data, or a barrier.
    Collective,
    /// A point-to-point message: `bytes` are sent, room for `room` is given; with `any` it is received from any rank, of
    /// which no other sends with this tag.
    Message { from: u32, to: u32, tag: u32, bytes: u64, room: u64, any: bool },
    /// Makes the set of this index.
    AddSet(usize),
    /// Removes it.
    RemoveSet(usize),
    /// No more data from this rank, until all have joined.
    Join,
}

/// One operation of the program.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// The index of its process set; 0 is the global one.
    pub set: usize,
    /// What is done.
    pub collective: Collective,
    /// How values are combined.
    pub op: ReduceOp,
    /// Element type.
    pub dtype: DType,
    /// Factors.
    pub scale: Scale,
    /// How Average counts absent ranks.
    pub join_average: JoinAverage,
    /// The root, a global rank.
    pub root: Rank,
    /// For each tensor of the group, the length of a row and the rows of each member.
    pub tensors: Vec<(u64, Vec<u64>)>,
    /// The tensors have no dimensions.
    pub scalar: bool,
    /// Alltoall: rows from each member to each, for each tensor.
    pub splits: Vec<Vec<Vec<u64>>>,
    /// Whether the output is the input.
    pub in_place: bool,
    /// Whether its name is one of a ring, so that it waits for the former of that name.
    pub hold: bool,
    /// Whether sums of its values are rounded (strict mode only, where the order is fixed).
    pub rough: bool,
    /// Makes its values its own.
    pub salt: u64,
    /// The rank that calls it differently, and how.
    pub wrong: Option<(Rank, Wrong)>,
    /// By global rank: who submits it. The others are no members, or have joined.
    pub present: Vec<bool>,
    /// Operations that must have ended well on a rank before it submits this one.
    pub needs: Vec<usize>,
    /// By global rank: when it is submitted at the earliest.
    pub at: Vec<u64>,
}

/// What all ranks do.
#[derive(Clone, Debug)]
pub struct Program {
    /// The ranks of each process set; the first is the global one.
    pub sets: Vec<Vec<u32>>,
    /// The numbers of sets that there are from the start; these stand first, behind the global one.
    pub carried: Vec<SetId>,
    /// The operations.
    pub ops: Vec<Planned>,
}

/// Submissions are spread over this much virtual time.
pub const HORIZON_NS: u64 = 20_000_000;

/// Above this many ranks a cluster only meets in barriers: an alltoall of a thousand ranks is a million messages.
pub const BUSY_RANKS_MAX: u32 = 256;

/// The operations of a cluster of `size` ranks, which has these process sets from the start. In strict mode some have
/// values that are rounded; `within`: more is done that only ranks of one host do in ways of their own.
pub fn program(random: &mut Random, size: u32, (strict, within): (bool, bool), carried: &Sets) -> Program {
    if size > BUSY_RANKS_MAX {
        let barrier = |i| plain(random, size, Collective::Barrier, 0, format!("barrier/{i}"));
        let ops = (0..4).map(barrier).collect();
        return Program { sets: vec![(0..size).collect()], carried: Vec::new(), ops };
    }
    let mut program = Program { sets: sets(random, size), carried: Vec::new(), ops: Vec::new() };
    if !carried.list.is_empty() {
        program.sets.truncate(1);
        for (id, ranks) in &carried.list {
            program.carried.push(*id);
            program.sets.push(ranks.iter().map(|rank| rank.0).collect());
        }
    }
    for set in 1 + program.carried.len()..program.sets.len() {
        let mut op = plain(random, size, Collective::AddSet, 0, format!("add/{set}"));
        op.kind = Kind::AddSet(set);
        op.at = (0..size).map(|_| random.below(HORIZON_NS / 8)).collect();
        program.ops.push(op);
    }
    let steps = if size > 9 { 1 + random.below(8) } else { 1 + random.below(24) };
    let messages = size > 1 && random.once_in(3);
    for i in 0..steps {
        let set = random.below(program.sets.len() as u64) as usize;
        let op = match messages && random.once_in(2) && program.sets[set].len() > 1 {
            true => message(random, size, set, &program.sets[set]),
            false => collective(random, size, set, &program.sets[set], i, strict),
        };
        program.push(op);
    }
    if (2..=9).contains(&size) && random.once_in(3) {
        repeat(random, size, &mut program);
    }
    let stands = (2..=9).contains(&size) && random.once_in(if within { 1 } else { 3 });
    let stands = stands.then(|| stand(random, size, &mut program));
    if size > 1 && random.once_in(if within { 2 } else { 4 }) {
        // Who joins withdraws from what stands.
        let set = stands.filter(|_| random.once_in(2));
        let set = set.unwrap_or_else(|| random.below(program.sets.len() as u64) as usize);
        join(random, size, strict, set, &mut program);
    }
    for set in 1..program.sets.len() {
        if random.once_in(2) {
            let mut op = plain(random, size, Collective::RemoveSet, 0, format!("remove/{set}"));
            op.kind = Kind::RemoveSet(set);
            op.needs = (0..program.ops.len())
                .filter(|&o| program.ops[o].set == set || set_up(&program.ops[o]))
                .collect();
            program.ops.push(op);
        }
    }
    keep_order(&mut program.ops, size);
    program
}

/// Ranks come to the removal of a set through these.
fn set_up(op: &Planned) -> bool {
    matches!(op.kind, Kind::Join | Kind::AddSet(_))
}

impl Program {
    /// Operations of a set that is made at run time wait for it.
    fn push(&mut self, mut op: Planned) {
        if op.set > 0 {
            let made = self.ops.iter().position(|o| o.kind == Kind::AddSet(op.set));
            assert!(made.is_some() || op.set <= self.carried.len(), "sets are made first");
            op.needs.extend(made);
            let members = &self.sets[op.set];
            for (rank, present) in op.present.iter_mut().enumerate() {
                *present &= members.contains(&(rank as u32));
            }
        }
        self.ops.push(op);
    }
}

fn sets(random: &mut Random, size: u32) -> Vec<Vec<u32>> {
    let all: Vec<u32> = (0..size).collect();
    let mut sets = vec![all.clone()];
    if size < 3 || !random.once_in(2) {
        return sets;
    }
    if random.once_in(2) {
        // They overlap in a circle.
        let mut three = all;
        random.shuffle(&mut three);
        sets.extend([(0, 1), (1, 2), (0, 2)].map(|(a, b)| vec![three[a], three[b]]));
    } else {
        for _ in 0..1 + random.below(3) {
            let set: Vec<u32> = (0..size).filter(|_| random.once_in(2)).collect();
            if !set.is_empty() && set.len() < size as usize {
                sets.push(set);
            }
        }
    }
    sets.iter_mut().for_each(|set| set.sort_unstable());
    sets.dedup();
    sets.sort_by_key(|set| std::cmp::Reverse(set.len()));
    let mut seen = Vec::new();
    sets.retain(|set| (!seen.contains(set)).then(|| seen.push(set.clone())).is_some());
    sets
}

/// An operation without tensors, submitted by everybody.
fn plain(random: &mut Random, size: u32, collective: Collective, set: usize, name: String) -> Planned {
    Planned {
        name,
        kind: Kind::Collective,
        set,
        collective,
        op: ReduceOp::Sum,
        dtype: DType::U8,
        scale: Scale::default(),
        join_average: JoinAverage::Size,
        root: Rank(0),
        tensors: Vec::new(),
        scalar: false,
        splits: Vec::new(),
        in_place: false,
        hold: false,
        rough: false,
        salt: random.below(1000),
        wrong: None,
        present: vec![true; size as usize],
        needs: Vec::new(),
        at: (0..size).map(|_| random.below(HORIZON_NS)).collect(),
    }
}

fn message(random: &mut Random, size: u32, set: usize, members: &[u32]) -> Planned {
    let mut pair = members.to_vec();
    random.shuffle(&mut pair);
    let (from, to, own) = (pair[0], pair[1], random.once_in(3));
    let tag = if own { 2 + from } else { random.below(2) as u32 };
    let any = own && !random.once_in(4);
    let bytes = random.pick(&[0, 1, 63, 64, 3000, 9000, 30_000]);
    let room = if random.once_in(6) { random.pick(&[0, 1, 64, 9000, 20_000]) } else { bytes };
    let mut op = plain(random, size, Collective::Barrier, set, format!("message {from} -> {to} tag {tag}"));
    op.kind = Kind::Message { from, to, tag, bytes, room, any };
    op.present = (0..size).map(|rank| rank == from || rank == to).collect();
    op
}

const COLLECTIVES: [Collective; 11] = [
    Collective::Allreduce,
    Collective::Allreduce,
    Collective::Allreduce,
    Collective::Allgather,
    Collective::Broadcast,
    Collective::Reducescatter,
    Collective::Alltoall,
    Collective::Reduce,
    Collective::Gather,
    Collective::Scatter,
    Collective::Barrier,
];

fn collective(random: &mut Random, size: u32, set: usize, members: &[u32], i: u64, strict: bool) -> Planned {
    let collective = random.pick(&COLLECTIVES);
    let mut op = plain(random, size, collective, set, format!("{collective}/{i}"));
    let n = members.len();
    op.dtype = if random.once_in(2) { DType::F32 } else { random.pick(DType::ALL) };
    let of = |op: &ReduceOp, dtype| op.accepts(dtype).is_ok();
    if collective.reduces() {
        let ops: Vec<ReduceOp> = ReduceOp::ALL
            .iter()
            .copied()
            .filter(|o| of(o, op.dtype) && (*o != ReduceOp::Adasum || collective == Collective::Allreduce))
            .collect();
        op.op = if random.once_in(3) { ReduceOp::Sum } else { random.pick(&ops) };
        if op.dtype.is_float() && op.op != ReduceOp::Product && random.once_in(4) {
            op.scale = Scale { pre: 2.0, post: 0.5 };
        }
        op.rough = strict && op.dtype.is_float() && op.op != ReduceOp::Product && random.once_in(2);
        op.join_average = random.pick(&[JoinAverage::Size, JoinAverage::Present]);
    }
    op.hold = random.once_in(6);
    if op.hold {
        op.name = format!("{collective}.noname.{}", random.below(2));
    }
    op.scalar = random.once_in(8)
        && matches!(collective, Collective::Allreduce | Collective::Broadcast | Collective::Reduce);
    let count = if collective == Collective::Barrier { 0 } else { random.pick(&[1, 1, 1, 1, 3]) };
    for _ in 0..count {
        let row = random.pick(&[1, 1, 3, 64, 700]);
        if collective == Collective::Alltoall {
            let matrix: Vec<Vec<u64>> = (0..n).map(|_| (0..n).map(|_| random.below(4)).collect()).collect();
            op.tensors.push((row, matrix.iter().map(|s| s.iter().sum()).collect()));
            op.splits.push(matrix);
        } else if collective.has_free_rows() {
            op.tensors.push((row, (0..n).map(|_| random.below(5)).collect()));
        } else if op.scalar {
            op.tensors.push((1, vec![1; n]));
        } else {
            op.tensors.push((row, vec![random.pick(&[0, 1, 2, 5, 17, 40]); n]));
        }
    }
    op.root = Rank(random.pick(members));
    op.in_place = matches!(collective, Collective::Allreduce | Collective::Broadcast) && random.once_in(2);
    if n > 1 && random.once_in(12) && !op.scalar {
        let kinds = [Wrong::DType, Wrong::Shape, Wrong::Op, Wrong::Collective, Wrong::Refused];
        let wrong = random.pick(&kinds);
        // Only an allreduce can differ in every way. Values in a ring of names say nothing about one call.
        if (collective == Collective::Allreduce || wrong == Wrong::Refused) && !op.hold {
            op.wrong = Some((Rank(random.pick(members)), wrong));
        }
    }
    op
}

/// As training does: large allreduces in one set, one after the other, late enough that what sets agree on for such (seats
/// on boards, lending tensors) is agreed during them.
fn repeat(random: &mut Random, size: u32, program: &mut Program) {
    let set = random.below(program.sets.len() as u64) as usize;
    let pause = HORIZON_NS / 8;
    for step in 1..=2 + random.below(6) {
        let mut op = plain(random, size, Collective::Allreduce, set, format!("step/{step}"));
        op.dtype = random.pick(&[DType::F32, DType::F32, DType::I64, DType::BF16]);
        op.op = random.pick(&[ReduceOp::Sum, ReduceOp::Average, ReduceOp::Max]);
        let members = program.sets[set].len();
        op.tensors =
            (0..random.pick(&[1, 1, 3])).map(|_| (700, vec![random.pick(&[5, 8]); members])).collect();
        op.in_place = random.once_in(2);
        // Which ranks have their tensors in shared memory is taken from the salt.
        op.salt = if random.once_in(4) { op.salt } else { op.salt / 3 * 3 };
        op.at = (0..size).map(|_| step * pause + random.below(pause)).collect();
        program.push(op);
    }
}

/// Small collectives of one name, one after the other: after a few they are done without agreement, until somebody
/// deviates. Returns their set.
fn stand(random: &mut Random, size: u32, program: &mut Program) -> usize {
    let set = random.below(program.sets.len() as u64) as usize;
    let members = program.sets[set].clone();
    let what = match random.once_in(2) {
        true => Collective::Allreduce,
        // The last is a barrier, which has no tensor.
        false => random.pick(&COLLECTIVES[..COLLECTIVES.len() - 1]),
    };
    let mut like = plain(random, size, what, set, "stands".into());
    like.dtype = random.pick(&[DType::F32, DType::F32, DType::I64, DType::BF16]);
    if what.reduces() {
        like.op = random.pick(&[ReduceOp::Sum, ReduceOp::Average, ReduceOp::Max]);
    }
    if what.has_root() {
        like.root = Rank(random.pick(&members));
    }
    let n = members.len();
    let matrix: Vec<Vec<u64>> = (0..n).map(|_| (0..n).map(|_| random.below(4)).collect()).collect();
    let rows: Vec<u64> = match what.has_free_rows() {
        true => (0..n).map(|_| random.below(6)).collect(),
        false => vec![random.pick(&[1, 1, 5, 40]); n],
    };
    let row = random.pick(&[1, 3, 7]);
    let pause = HORIZON_NS / 16;
    let mut before = None;
    for step in 1..=6 + random.below(10) {
        let mut op = like.clone();
        op.salt = random.below(1000);
        // Now and then all of them go on with something else, or one where ranks may differ.
        let other = random.below(n as u64 + 1);
        let differs =
            |m: usize| step % 7 == 6 && (!what.has_free_rows() || other == n as u64 || other == m as u64);
        if what == Collective::Alltoall {
            let splits = matrix
                .iter()
                .enumerate()
                .map(|(m, row)| row.iter().map(|split| split + u64::from(differs(m))).collect::<Vec<u64>>());
            let splits: Vec<Vec<u64>> = splits.collect();
            op.tensors = vec![(row, splits.iter().map(|split| split.iter().sum()).collect())];
            op.splits = vec![splits];
        } else {
            let rows = rows.iter().enumerate().map(|(m, rows)| rows + u64::from(differs(m)));
            op.tensors = vec![(row, rows.collect())];
        }
        op.in_place = matches!(what, Collective::Allreduce | Collective::Broadcast) && random.once_in(2);
        if random.once_in(10) && members.len() > 1 {
            let kinds = [Wrong::DType, Wrong::Shape, Wrong::Op, Wrong::Collective, Wrong::Refused];
            // Only an allreduce can differ in every way.
            let wrong = if what == Collective::Allreduce { random.pick(&kinds) } else { Wrong::Refused };
            op.wrong = Some((Rank(random.pick(&members)), wrong));
        }
        op.at = (0..size).map(|_| step * pause + random.below(pause)).collect();
        op.needs.extend(before);
        before = Some(program.ops.len());
        program.push(op);
    }
    set
}

/// The ranks of a set join, each at its own time: what they would have submitted later goes on without
/// them. When all have joined, they go on together.
fn join(random: &mut Random, size: u32, strict: bool, set: usize, program: &mut Program) {
    let members = program.sets[set].clone();
    let index = program.ops.len();
    let mut join = plain(random, size, Collective::Join, set, "join".into());
    join.kind = Kind::Join;
    let early = |_| random.below(HORIZON_NS * 2).max(HORIZON_NS / 8);
    join.at = (0..size).map(early).collect();
    // A join comes after what waits for the former of its name, which may wait for another rank's join: that rank must
    // not wait, before it joins, for an operation that needs this one's.
    let waits =
        program.ops.iter().any(|op| op.set == set && op.kind == Kind::Collective && !op.needs.is_empty());
    for (i, op) in program.ops.iter_mut().enumerate().filter(|(_, op)| waits && op.set == set && op.hold) {
        (op.hold, op.name) = (false, format!("{}/{i}/named", op.collective));
    }
    // Names of a ring are in order.
    keep_order(&mut program.ops, size);
    for op in program.ops.iter_mut().filter(|op| op.set == set && op.kind == Kind::Collective) {
        for &rank in &members {
            op.present[rank as usize] &= op.at[rank as usize] < join.at[rank as usize];
        }
        let present = op.present.iter().filter(|p| **p).count();
        op.wrong = op
            .wrong
            .filter(|(rank, wrong)| op.present[rank.0 as usize] && (present > 1 || *wrong == Wrong::Refused));
    }
    program.push(join);
    for i in 0..random.below(4) {
        let mut after = collective(random, size, set, &members, 1000 + i, strict);
        after.name.push_str("/after");
        after.needs.push(index);
        program.push(after);
    }
}

/// Operations of one name, and messages of one tag, are submitted in the order of the program on every rank.
fn keep_order(ops: &mut [Planned], size: u32) {
    let names: std::collections::BTreeSet<(usize, String)> =
        ops.iter().map(|op| (op.set, op.name.clone())).collect();
    for (set, name) in names {
        let of: Vec<usize> = (0..ops.len()).filter(|&o| ops[o].set == set && ops[o].name == name).collect();
        for rank in 0..size as usize {
            let mut times: Vec<u64> = of.iter().map(|&o| ops[o].at[rank]).collect();
            times.sort_unstable();
            of.iter().zip(times).for_each(|(&o, at)| ops[o].at[rank] = at);
        }
    }
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The process ends.
    Kill(Rank),
    /// All processes of this rank's host end; if there is one host only, this one.
    KillHost(Rank),
    /// The process stops, for ever.
    Stop(Rank),
    /// The process stops for a while, less than the limit on silence.
    Pause(Rank, u64),
    /// Whatever one rank sends to the other is lost.
    HalfOpen(Rank, Rank),
    /// One bit of what one rank sends to the other changes on the way; checksums are on.
    Flip(Rank, Rank),
    /// The process leaves in an orderly way while others go on.
    Leave(Rank),
}

/// The fault of a cluster, if it has one, and when it happens. Ranks `within` one host exchange a whole collective within
/// an instant, which is seldom hit, so more is tried there.
pub fn fault(random: &mut Random, size: u32, within: bool) -> Option<(u64, Fault)> {
    if size < 2 || random.below(6) >= if within { 4 } else { 2 } {
        return None;
    }
    let rank = Rank(random.below(u64::from(size)) as u32);
    let other = Rank((rank.0 + 1 + random.below(u64::from(size) - 1) as u32) % size);
    let fault = match random.below(7) {
        0 => Fault::Kill(rank),
        6 => Fault::KillHost(rank),
        1 => Fault::Stop(rank),
        2 => Fault::Pause(rank, random.below(2_000_000_000)),
        3 => Fault::HalfOpen(rank, other),
        4 => Fault::Flip(rank, other),
        _ => Fault::Leave(rank),
    };
    Some((random.below(HORIZON_NS * 2), fault))
}
