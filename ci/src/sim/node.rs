//! A rank of a simulated cluster.
#![forbid(unsafe_code)]

use super::buffer::Buffer;
use super::program::{Kind, Planned, Program};
use carole::engine::{Ended, Engine, Outcome};
use carole::error::Error;
use carole::types::{GLOBAL_SET, Rank, SetId, Time};

/// One rank: its engine, and what it still has to do.
pub struct Node {
    pub rank: Rank,
    pub engine: Option<Engine>,
    pub stopped_until: Option<Time>,
    /// Indices into the program with the time at which each is submitted, latest first.
    pub plan: Vec<(Time, usize)>,
    pub buffers: Vec<Vec<Buffer>>,
    pub submitted: Vec<bool>,
    /// What was over when it was submitted.
    pub done: Vec<Ended>,
    /// What it needed did not end well, so it was not submitted.
    pub skipped: Vec<bool>,
    pub results: Vec<Option<Result<Outcome, Error>>>,
    /// The number of each set of the program here.
    pub sets: Vec<Option<SetId>>,
    pub left: bool,
    /// Whether nothing of it was under way when it left.
    pub left_idle: bool,
    /// When a rank that has left ends its process at the latest.
    pub gone_at: Option<Time>,
    /// Whether its engine may find something to do.
    pub awake: bool,
    /// When its engine wants a turn in any case.
    pub timer: Option<Time>,
}

impl Node {
    /// With all of the program still to do, from `start` on.
    pub fn new(rank: Rank, engine: Engine, program: &Program, start: Time) -> Node {
        let n = program.ops.len();
        let mine = |i: &usize| program.ops[*i].present[rank.0 as usize];
        let due = |i: usize| (start.after_ns(program.ops[i].at[rank.0 as usize]), i);
        let mut plan: Vec<(Time, usize)> = (0..n).filter(mine).map(due).collect();
        plan.sort_by_key(|&due| std::cmp::Reverse(due));
        let mut sets = vec![None; program.sets.len()];
        sets[0] = Some(GLOBAL_SET);
        for (place, id) in program.carried.iter().enumerate() {
            sets[place + 1] = Some(*id);
        }
        Node {
            rank,
            engine: Some(engine),
            stopped_until: None,
            plan,
            buffers: (0..n).map(|_| Vec::new()).collect(),
            submitted: vec![false; n],
            done: Vec::new(),
            skipped: vec![false; n],
            results: (0..n).map(|_| None).collect(),
            sets,
            left: false,
            left_idle: false,
            gone_at: None,
            awake: true,
            timer: None,
        }
    }

    /// Whether this rank submits an operation.
    pub fn takes(&self, planned: &Planned) -> bool {
        planned.present[self.rank.0 as usize]
    }

    /// Whether an operation that this rank needs for another has ended well here; `None`: not yet.
    fn has(&self, program: &Program, op: usize, by: &Planned) -> Option<bool> {
        if !self.takes(&program.ops[op]) || self.skipped[op] {
            return Some(!self.skipped[op]);
        }
        // A removal waits for whatever becomes of the set's operations, and a name for its former one.
        let (former, of_set) = (&program.ops[op], matches!(by.kind, Kind::RemoveSet(_)));
        let any = of_set && former.set > 0 || former.set == by.set && former.name == by.name;
        self.results[op].as_ref().map(|result| any || result.is_ok())
    }

    /// Whether an operation can be submitted now; `None` if never.
    pub fn may_submit(&self, program: &Program, op: usize) -> Option<bool> {
        let planned = &program.ops[op];
        let mut ready = true;
        for &need in &planned.needs {
            match self.has(program, need, planned) {
                Some(true) => {}
                Some(false) => return None,
                None => ready = false,
            }
        }
        if planned.kind == Kind::Join {
            // Whatever this rank has for the set comes before.
            ready &= self.plan.iter().all(|&(_, other)| {
                let o = &program.ops[other];
                other == op
                    || o.set != planned.set
                    || o.needs.contains(&op)
                    || matches!(o.kind, Kind::RemoveSet(_))
            });
        }
        Some(ready)
    }
}
