//! The cases of a job: the same list on every rank and in the parent.

use crate::call::Target;
use carole::types::{Collective, DType, ReduceOp};

/// Which ranks take part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetKind {
    /// All.
    Global,
    /// Those with an even number.
    Even,
    /// All but rank 0; overlaps with the even ones.
    ButFirst,
}

/// One operation to check.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// `None` is a message to the next member and one from the previous.
    pub collective: Option<Collective>,
    pub op: ReduceOp,
    pub dtype: DType,
    /// Rows, about: where each rank's may differ, they do.
    pub rows: u64,
    /// Elements of a row.
    pub row: u64,
    pub place: Target,
    /// Tensors in the group.
    pub tensors: u32,
    /// Prescale and postscale.
    pub scaled: bool,
    pub set: SetKind,
    /// Of the members, the root.
    pub root: u32,
    pub seed: u64,
}

const ROWS: [u64; 5] = [7, 1000, 0, 1, 65537];
/// Per type, the first is run in every job.
const MOVES: [Collective; 5] = [
    Collective::Allgather,
    Collective::Broadcast,
    Collective::Alltoall,
    Collective::Gather,
    Collective::Scatter,
];
const REDUCTIONS: [Collective; 3] = [Collective::Allreduce, Collective::Reducescatter, Collective::Reduce];
const PLACES: [Target; 3] = [Target::InPlace, Target::Apart, Target::Engine];

/// Every valid (collective, operation, type).
fn combinations() -> Vec<(Option<Collective>, ReduceOp, DType)> {
    let mut all = Vec::new();
    for &dtype in DType::ALL {
        for collective in REDUCTIONS {
            // Adasum weighs whole tensors, so that the runtime refuses it where they are dealt out.
            let valid = |op: &&ReduceOp| {
                let dealt_out = **op == ReduceOp::Adasum && collective == Collective::Reducescatter;
                op.accepts(dtype).is_ok() && !dealt_out
            };
            for &op in ReduceOp::ALL.iter().filter(valid) {
                all.push((Some(collective), op, dtype));
            }
        }
        all.extend(MOVES.map(|collective| (Some(collective), ReduceOp::Sum, dtype)));
        all.push((None, ReduceOp::Sum, dtype));
    }
    all
}

/// The cases of a job on `size` ranks. `turn` rotates sizes and places where not all are run.
pub fn cases(size: u32, seed: u64, turn: u64, full: bool) -> Vec<Case> {
    let mut list = Vec::new();
    for (i, (collective, op, dtype)) in combinations().into_iter().enumerate() {
        let turn = turn.wrapping_add(i as u64);
        // The largest size is dear, so that it comes up less often when sizes rotate.
        let sizes =
            if full { &ROWS[..] } else { &ROWS[if turn.is_multiple_of(16) { 4..5 } else { index(turn, 4) }] };
        let places = if full { &PLACES[..] } else { &PLACES[index(turn / 4, 3)] };
        for &rows in sizes {
            for &place in places {
                let base = Case {
                    collective,
                    op,
                    dtype,
                    rows,
                    row: if turn.is_multiple_of(3) { 3 } else { 1 },
                    place: allowed(collective, place),
                    tensors: 1,
                    scaled: false,
                    set: SetKind::Global,
                    root: (turn % u64::from(size)) as u32,
                    seed: seed ^ turn << 8 ^ rows,
                };
                list.push(base);
                extend(&mut list, base, turn, full);
            }
        }
    }
    list
}

/// The same again, grouped, scaled, and on process sets that overlap.
fn extend(list: &mut Vec<Case>, base: Case, turn: u64, full: bool) {
    let small = base.rows <= 1000;
    if small && base.collective.is_some() && (full || turn.is_multiple_of(4)) {
        list.push(Case { tensors: 3, ..base });
    }
    let scales = base.collective.is_some_and(Collective::reduces) && base.dtype != DType::Bool;
    let exact = base.op == ReduceOp::Sum || base.op == ReduceOp::Average && !base.dtype.is_integer();
    if scales && exact && (full || turn.is_multiple_of(2)) {
        list.push(Case { scaled: true, ..base });
    }
    if small && (full || turn % 4 == 1) {
        list.push(Case { set: SetKind::Even, ..base });
        list.push(Case { set: SetKind::ButFirst, ..base });
    }
}

fn index(turn: u64, len: u64) -> std::ops::Range<usize> {
    let at = (turn % len) as usize;
    at..at + 1
}

/// Where an output's size is known only after agreement, the engine allocates it; where it is smaller than
/// the input, it is not in place.
fn allowed(collective: Option<Collective>, place: Target) -> Target {
    match collective {
        Some(Collective::Allgather | Collective::Alltoall | Collective::Gather) => Target::Engine,
        Some(Collective::Reducescatter | Collective::Scatter) if place == Target::InPlace => Target::Apart,
        _ => place,
    }
}

impl SetKind {
    /// Whether a rank is a member.
    pub fn has(self, rank: u32) -> bool {
        match self {
            SetKind::Global => true,
            SetKind::Even => rank.is_multiple_of(2),
            SetKind::ButFirst => rank > 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn rotating_jobs_cover_every_size_and_place_of_every_combination() {
        let key = |case: &Case| {
            (
                case.collective.map(Collective::code),
                case.op,
                case.dtype,
                case.rows,
                format!("{:?}", case.place),
            )
        };
        let all: BTreeSet<_> = cases(4, 1, 0, true).iter().map(key).collect();
        let small: BTreeSet<_> = all.iter().filter(|key| key.3 < 65537).cloned().collect();
        let rotated: BTreeSet<_> =
            (1..=96).flat_map(|turn| cases(4, 1, turn, false)).map(|case| key(&case)).collect();
        assert!(small.is_subset(&rotated), "{:?}", small.difference(&rotated).next());
    }
}
