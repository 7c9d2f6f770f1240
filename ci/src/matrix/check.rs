//! One case on one rank: give, run, compare with the oracle.

use super::case::{Case, SetKind};
use crate::call::{self, Finished, Operation, Target, Tensor};
use crate::oracle::{Element, Recipe, holds};
use crate::random::hash;
use carole::error::{Error, Result};
use carole::runtime::{self, Request};
use carole::types::{Collective, GLOBAL_SET, Rank, Scale, SetId};

/// The process sets of a job.
pub struct Sets {
    size: u32,
    even: Option<SetId>,
    but_first: Option<SetId>,
}

impl Sets {
    /// Makes them, where there are ranks enough.
    pub fn make(size: u32) -> Result<Sets> {
        let make = |kind: SetKind| {
            let ranks: Vec<Rank> = (0..size).filter(|&rank| kind.has(rank)).map(Rank).collect();
            if ranks.len() < 2 || ranks.len() == size as usize {
                return Ok(None);
            }
            runtime::add_process_set(&ranks).map(Some)
        };
        Ok(Sets { size, even: make(SetKind::Even)?, but_first: make(SetKind::ButFirst)? })
    }

    fn id(&self, kind: SetKind) -> Option<SetId> {
        match kind {
            SetKind::Global => Some(GLOBAL_SET),
            SetKind::Even => self.even,
            SetKind::ButFirst => self.but_first,
        }
    }
}

/// What a rank found.
pub struct Found {
    pub wrong: u64,
    /// Of a result that every rank must hold alike.
    pub hash: Option<u64>,
}

/// This rank's view of a case.
struct View<'a> {
    case: &'a Case,
    set: SetId,
    ranks: Vec<u32>,
    /// This rank among them.
    me: u32,
    members: u32,
}

pub fn run(case: &Case, index: usize, rank: u32, sets: &Sets) -> Result<Found> {
    let nothing = Found { wrong: 0, hash: None };
    let Some(set) = sets.id(case.set) else { return Ok(nothing) };
    if !case.set.has(rank) {
        return Ok(nothing);
    }
    let ranks: Vec<u32> = (0..sets.size).filter(|&rank| case.set.has(rank)).collect();
    let me = ranks.iter().position(|&r| r == rank).expect("a member is among the members") as u32;
    let view = View { case, set, me, members: ranks.len() as u32, ranks };
    match case.collective {
        None => view.messages(),
        Some(collective) => view.collective(collective, index),
    }
}

impl View<'_> {
    fn recipe(&self, tensor: u32) -> Recipe {
        let case = self.case;
        let (pre, post) = if case.scaled { (2.0, 0.5) } else { (1.0, 1.0) };
        let op = case.collective.filter(|c| c.reduces()).map(|_| case.op);
        Recipe { op, dtype: case.dtype, pre, post, seed: case.seed ^ u64::from(tensor) << 56 }
    }

    fn root(&self) -> u32 {
        self.case.root % self.members
    }

    /// Rows that a member gives.
    fn rows_of(&self, member: u32, tensor: u32) -> u64 {
        let rows = self.case.rows + u64::from(tensor);
        match self.case.collective {
            Some(Collective::Allgather | Collective::Gather) => rows + u64::from(member % 3),
            Some(Collective::Alltoall) => (0..self.members).map(|to| self.split(member, to, tensor)).sum(),
            _ => rows,
        }
    }

    /// A single element is a scalar where that is not refused; where ranks may differ in rows, they have rows.
    fn shape(&self, collective: Collective, rows: u64) -> Vec<u64> {
        let whole = [Collective::Allreduce, Collective::Reduce, Collective::Broadcast].contains(&collective);
        match (rows, self.case.row) {
            (1, 1) if whole => Vec::new(),
            (_, 1) => vec![rows],
            (_, row) => vec![rows, row],
        }
    }

    /// Rows that a member gives to another in an alltoall.
    fn split(&self, from: u32, to: u32, tensor: u32) -> u64 {
        (self.case.rows + u64::from(tensor)) / u64::from(self.members) + u64::from((from + 2 * to) % 3)
    }

    fn collective(&self, collective: Collective, index: usize) -> Result<Found> {
        let case = self.case;
        let tensors: Vec<Tensor> = (0..case.tensors)
            .map(|tensor| {
                let rows = self.rows_of(self.me, tensor);
                Tensor {
                    dtype: case.dtype,
                    shape: self.shape(collective, rows),
                    input: self.recipe(tensor).bytes(self.me, self.members, 0, rows * case.row),
                    place: case.place,
                }
            })
            .collect();
        let given: Vec<Vec<u8>> = tensors.iter().map(|tensor| tensor.input.clone()).collect();
        let splits: Vec<u64> = match collective {
            Collective::Alltoall => (0..case.tensors)
                .flat_map(|tensor| (0..self.members).map(move |to| self.split(self.me, to, tensor)))
                .collect(),
            _ => Vec::new(),
        };
        let name = format!("case.{index}");
        let recipe = self.recipe(0);
        let request = Request {
            name: Some(&name),
            set: self.set,
            collective,
            op: case.op,
            scale: Scale { pre: recipe.pre, post: recipe.post },
            root: Rank(if collective.has_root() { self.ranks[self.root() as usize] } else { 0 }),
            splits: &splits,
            ..Request::default()
        };
        let finished = call::run(&request, tensors)?;
        self.judge(collective, &finished, &given)
    }

    fn judge(&self, collective: Collective, finished: &Finished, given: &[Vec<u8>]) -> Result<Found> {
        let mut found = Found { wrong: 0, hash: None };
        let mut state = 0;
        for tensor in 0..self.case.tensors {
            let Some(expected) = self.expected(collective, tensor) else { continue };
            let Some(got) = finished.outputs.get(tensor as usize) else {
                return Err(Error::usage("an output is missing"));
            };
            found.wrong += wrong(&self.recipe(tensor), got, &expected);
            state ^= hash(&got[..got.len().min(expected.len() * self.case.dtype.size())]).rotate_left(tensor);
            // Inputs of operations not in place are never touched.
            if self.case.place != Target::InPlace
                && finished.inputs[tensor as usize] != given[tensor as usize]
            {
                found.wrong += 1;
            }
        }
        if collective == Collective::Alltoall {
            let expected: Vec<u64> = (0..self.case.tensors)
                .flat_map(|tensor| (0..self.members).map(move |from| self.split(from, self.me, tensor)))
                .collect();
            found.wrong += u64::from(finished.outcome.received_splits != expected);
        }
        let alike = [Collective::Allreduce, Collective::Allgather, Collective::Broadcast];
        found.hash = alike.contains(&collective).then_some(state);
        Ok(found)
    }

    /// The elements that this rank must hold afterwards; `None` where it gets no result.
    fn expected(&self, collective: Collective, tensor: u32) -> Option<Vec<Element>> {
        let (recipe, row) = (self.recipe(tensor), self.case.row);
        let rows = self.case.rows + u64::from(tensor);
        let from = |member: u32, first: u64, count: u64| {
            (first * row..(first + count) * row).map(move |i| recipe.given(member, self.members, i))
        };
        let reduced = |first: u64, count: u64| {
            (first * row..(first + count) * row).map(|i| recipe.reduced(self.members, i)).collect()
        };
        let (first, mine) = part(rows, self.me, self.members);
        let is_root = self.me == self.root();
        match collective {
            Collective::Allreduce => Some(reduced(0, rows)),
            Collective::Reduce => is_root.then(|| reduced(0, rows)),
            Collective::Reducescatter => Some(reduced(first, mine)),
            Collective::Broadcast => Some(from(self.root(), 0, rows).collect()),
            Collective::Scatter => Some(from(self.root(), first, mine).collect()),
            Collective::Gather if !is_root => None,
            Collective::Allgather | Collective::Gather => {
                Some((0..self.members).flat_map(|m| from(m, 0, self.rows_of(m, tensor))).collect())
            }
            Collective::Alltoall => Some(
                (0..self.members)
                    .flat_map(|m| {
                        let before: u64 = (0..self.me).map(|to| self.split(m, to, tensor)).sum();
                        from(m, before, self.split(m, self.me, tensor))
                    })
                    .collect(),
            ),
            _ => None,
        }
    }

    /// To the next member and from the previous one.
    fn messages(&self) -> Result<Found> {
        if self.members == 1 {
            return Ok(Found { wrong: 0, hash: None });
        }
        let (next, previous) = ((self.me + 1) % self.members, (self.me + self.members - 1) % self.members);
        let (recipe, count) = (self.recipe(0), self.case.rows);
        let tensor = |input: Vec<u8>| Tensor {
            dtype: self.case.dtype,
            shape: vec![count],
            input,
            place: Target::Engine,
        };
        let incoming = tensor(vec![0xA5; count as usize * self.case.dtype.size()]);
        let outgoing = tensor(recipe.bytes(self.me, self.members, 0, count));
        let rank = |member: u32| Rank(self.ranks[member as usize]);
        let received = Operation::recv(self.set, rank(previous), 7, incoming)?;
        let sent = Operation::send(self.set, rank(next), 7, outgoing)?;
        sent.wait()?;
        let got = received.wait()?;
        let expected: Vec<Element> = (0..count).map(|i| recipe.given(previous, self.members, i)).collect();
        Ok(Found { wrong: wrong(&recipe, &got.inputs[0], &expected), hash: None })
    }
}

/// Elements that are not as expected; missing ones count, and so do elements too many in the engine's memory.
fn wrong(recipe: &Recipe, got: &[u8], expected: &[Element]) -> u64 {
    let size = recipe.dtype.size();
    let missing = expected.len().saturating_sub(got.len() / size) as u64;
    let pairs = got.chunks_exact(size).zip(expected);
    missing + pairs.filter(|(bytes, element)| !holds(recipe.dtype, bytes, **element)).count() as u64
}

/// The rows of a member when rows are dealt out: the first, and how many; the lower members get one more.
fn part(rows: u64, member: u32, members: u32) -> (u64, u64) {
    let (member, members) = (u64::from(member), u64::from(members));
    let (each, more) = (rows / members, rows % members);
    (member * each + member.min(more), each + u64::from(member < more))
}
