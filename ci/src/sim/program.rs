//! What the ranks of a simulated cluster do: a list of operations, the same for all, that each submits in an
//! order of its own, some of them wrong; and what goes wrong besides.
#![forbid(unsafe_code)]

use carole::types::{Collective, DType, Rank, ReduceOp, Scale};

/// A small generator of random numbers (splitmix64), so that a seed means the same everywhere.
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

/// One operation of the program.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// What is done.
    pub collective: Collective,
    /// How values are combined.
    pub op: ReduceOp,
    /// Element type.
    pub dtype: DType,
    /// Factors.
    pub scale: Scale,
    /// The root.
    pub root: Rank,
    /// For each tensor of the group, the length of a row and the rows of each rank.
    pub tensors: Vec<(u64, Vec<u64>)>,
    /// Alltoall: rows from each rank to each, for each tensor.
    pub splits: Vec<Vec<Vec<u64>>>,
    /// Whether the output is the input.
    pub in_place: bool,
    /// The rank that calls it differently, and how.
    pub wrong: Option<(Rank, Wrong)>,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The process ends.
    Kill(Rank),
    /// The process stops, for ever.
    Stop(Rank),
    /// The process stops for a while, less than the limit on silence.
    Pause(Rank, u64),
    /// Whatever one rank sends to the other is lost.
    HalfOpen(Rank, Rank),
    /// The process leaves in an orderly way while others go on.
    Leave(Rank),
}

/// The operations of a cluster of `size` ranks.
pub fn program(random: &mut Random, size: u32, steps: usize) -> Vec<Planned> {
    (0..steps).map(|i| planned(random, size, i)).collect()
}

fn planned(random: &mut Random, size: u32, i: usize) -> Planned {
    let collective = random.pick(&[
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
    ]);
    let dtype =
        random.pick(&[DType::F32, DType::F32, DType::I32, DType::BF16, DType::U8, DType::F64, DType::I64]);
    let op = random.pick(&[ReduceOp::Sum, ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max]);
    let scale = match random.below(4) {
        0 if dtype.is_float() => Scale { pre: 2.0, post: 0.5 },
        _ => Scale::default(),
    };
    let count = if collective == Collective::Barrier {
        0
    } else if random.once_in(5) {
        3
    } else {
        1
    };
    let free = collective.has_free_rows();
    let tensors = (0..count)
        .map(|_| {
            let row = random.pick(&[1, 1, 3, 64, 700]);
            let rows = random.pick(&[0, 1, 2, 5, 17, 40]);
            (row, (0..size).map(|_| if free { random.below(5) } else { rows }).collect())
        })
        .collect::<Vec<(u64, Vec<u64>)>>();
    let splits = match collective {
        Collective::Alltoall => (0..count).map(|_| matrix(random, size)).collect(),
        _ => Vec::new(),
    };
    let tensors = match collective {
        // The rows of an alltoall are what its splits add up to.
        Collective::Alltoall => tensors
            .into_iter()
            .zip(&splits)
            .map(|((row, _), m): (_, &Vec<Vec<u64>>)| (row, m.iter().map(|s| s.iter().sum()).collect()))
            .collect(),
        _ => tensors,
    };
    let alike = matches!(collective, Collective::Allreduce | Collective::Broadcast);
    let wrong = (size > 1 && random.once_in(12)).then(|| {
        let kinds = [Wrong::DType, Wrong::Shape, Wrong::Op, Wrong::Collective, Wrong::Refused];
        (Rank(random.below(u64::from(size)) as u32), random.pick(&kinds))
    });
    // Only an allreduce can differ in every way.
    let wrong = wrong.filter(|(_, w)| collective == Collective::Allreduce || *w == Wrong::Refused);
    Planned {
        name: format!("{collective}/{i}"),
        collective,
        op,
        dtype,
        scale: if collective.reduces() { scale } else { Scale::default() },
        root: Rank(random.below(u64::from(size)) as u32),
        tensors,
        splits,
        in_place: alike && random.once_in(2),
        wrong,
    }
}

fn matrix(random: &mut Random, size: u32) -> Vec<Vec<u64>> {
    (0..size).map(|_| (0..size).map(|_| random.below(4)).collect()).collect()
}

/// The fault of a cluster, if it has one, and when it happens.
pub fn fault(random: &mut Random, size: u32, horizon_ns: u64) -> Option<(u64, Fault)> {
    if size < 2 || random.below(3) != 0 {
        return None;
    }
    let rank = Rank(random.below(u64::from(size)) as u32);
    let other = Rank((rank.0 + 1 + random.below(u64::from(size) - 1) as u32) % size);
    let fault = match random.below(5) {
        0 => Fault::Kill(rank),
        1 => Fault::Stop(rank),
        2 => Fault::Pause(rank, random.below(2_000_000_000)),
        3 => Fault::HalfOpen(rank, other),
        _ => Fault::Leave(rank),
    };
    Some((random.below(horizon_ns), fault))
}
