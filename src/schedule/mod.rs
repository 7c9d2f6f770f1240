//! A collective as data: the steps that one member takes, in chunks, without bytes, dtype or transport.
//!
//! Chunks of `Input` and `Output` share one index space: chunk `i` of the input and chunk `i` of the
//! output are the same elements (for an allreduce in place they are the same memory). A block collective
//! has one chunk per member: an allgather's input is chunk `me` alone, a reducescatter's output likewise.
#![forbid(unsafe_code)]

mod builder;
mod hazard;
mod lower;
mod print;
mod symbol;
mod verify;

pub use builder::Builder;
pub use lower::{Caps, lower};
pub use verify::{Fault, Goal, verify};

use crate::types::Collective;
use std::ops::Range;

/// Whether member `me` has chunk `chunk` of the input of this collective.
#[must_use]
pub fn has_input(collective: Collective, root: u32, me: u32, chunk: u32) -> bool {
    match collective {
        Collective::Allgather | Collective::Gather => chunk == me,
        Collective::Broadcast | Collective::Scatter => me == root,
        _ => true,
    }
}

/// Whether member `me` has chunk `chunk` of the output of this collective.
#[must_use]
pub fn has_output(collective: Collective, root: u32, me: u32, chunk: u32) -> bool {
    match collective {
        Collective::Reduce | Collective::Gather => me == root,
        Collective::Reducescatter | Collective::Scatter => chunk == me,
        _ => true,
    }
}

/// Whether chunk `i` of the input and chunk `i` of the output may be the same memory. Not for an alltoall,
/// where input chunk `j` goes to member `j` and output chunk `i` comes from member `i`.
#[must_use]
pub fn is_aliased(collective: Collective) -> bool {
    collective != Collective::Alltoall
}

/// Which memory a span lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Space {
    /// The caller's input; never written (unless it is also the output).
    Input,
    /// The caller's output.
    Output,
    /// Working memory of the run; each scratch chunk is as large as the largest chunk of the layout.
    Scratch,
}

/// A run of chunks in one space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// Where.
    pub space: Space,
    /// Which chunks.
    pub chunks: Range<u32>,
    /// The `i`-th chunk of this span is as long as chunk `of + i` of the data. Chunks are not equally long, and
    /// a chunk of scratch serves for different ones in turn. `Input` and `Output` spans have
    /// `of == chunks.start`; only in an alltoall, whose input and output chunks differ in length, `of` counts
    /// the output's chunks from [`Schedule::chunks`] on (and so for scratch that stands for them).
    pub of: u32,
}

impl Span {
    /// How many chunks.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.chunks.end - self.chunks.start
    }
}

/// What a step does. `to` and `from` are members of the set. All spans of one step stand for the same lengths.
#[expect(missing_docs, reason = "each variant says what its spans are")]
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Send the bytes of `src`; complete when they may be overwritten.
    Send { to: u32, src: Span },
    /// Receive into `dst`.
    Recv { from: u32, dst: Span },
    /// Receive `x` and write `with ⊕ x` to `dst`; the operand of the lower member stands first. `with` may be `dst`.
    RecvReduce { from: u32, dst: Span, with: Span },
    /// Copy (nothing is done where both are the same memory).
    Copy { dst: Span, src: Span },
    /// Copy and multiply by the prescale factor (nothing is done where that is 1 and both are the same memory).
    Prepare { dst: Span, src: Span },
    /// `dst = a ⊕ b`, `a` first. `dst` may be `a` or `b`.
    Reduce { dst: Span, a: Span, b: Span },
    /// Reduce all members' operands, given in member order, in the canonical tree with a wide accumulator:
    /// prescale each, combine, apply the final scale, round once. (So neither Prepare nor Finish is needed.)
    /// `dst` may be one of `srcs`.
    ReduceMany { dst: Span, srcs: Vec<Span> },
    /// Adasum of `a` and `b` into `dst`, tensor by tensor (whole tensors: one chunk, one window). `dst` may be `a` or `b`.
    Combine { dst: Span, a: Span, b: Span },
    /// The reduction of `span` is complete: apply the final scale (Average's division, postscale).
    Finish { span: Span },
}

impl Verb {
    /// The spans that the verb reads.
    pub fn reads(&self) -> impl Iterator<Item = &Span> {
        let (list, one, two): (&[Span], Option<&Span>, Option<&Span>) = match self {
            Verb::Send { src, .. } | Verb::Copy { src, .. } | Verb::Prepare { src, .. } => {
                (&[], Some(src), None)
            }
            Verb::Recv { .. } => (&[], None, None),
            Verb::RecvReduce { with, .. } => (&[], Some(with), None),
            Verb::Reduce { a, b, .. } | Verb::Combine { a, b, .. } => (&[], Some(a), Some(b)),
            Verb::ReduceMany { srcs, .. } => (srcs, None, None),
            Verb::Finish { span } => (&[], Some(span), None),
        };
        list.iter().chain(one).chain(two)
    }
    /// The span that the verb writes.
    #[must_use]
    pub fn writes(&self) -> Option<&Span> {
        match self {
            Verb::Send { .. } => None,
            Verb::Recv { dst, .. }
            | Verb::RecvReduce { dst, .. }
            | Verb::Copy { dst, .. }
            | Verb::Prepare { dst, .. }
            | Verb::Reduce { dst, .. }
            | Verb::ReduceMany { dst, .. }
            | Verb::Combine { dst, .. } => Some(dst),
            Verb::Finish { span } => Some(span),
        }
    }
}

/// A verb and the steps it must wait for: indices into [`Schedule::dependencies`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// What to do.
    pub verb: Verb,
    /// Which part of [`Schedule::dependencies`] lists the steps that must be complete before.
    pub after: Range<u32>,
}

/// The steps of one member. Sends to one peer (and receives from one peer) are posted in the order in
/// which they stand; that order is the only tag.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Whose steps these are.
    pub me: u32,
    /// Members.
    pub size: u32,
    /// Chunks of the input and the output.
    pub chunks: u32,
    /// Chunks of scratch.
    pub scratch: u32,
    /// Whether input chunk `i` and output chunk `i` may be the same memory: see [`is_aliased`].
    pub aliased: bool,
    /// The steps, in the order in which the algorithm's author wrote them.
    pub steps: Vec<Step>,
    /// All steps' dependencies, one after another.
    pub dependencies: Vec<u32>,
}

impl Schedule {
    /// The steps that step `i` must wait for.
    #[must_use]
    pub fn after(&self, i: usize) -> &[u32] {
        let range = &self.steps[i].after;
        &self.dependencies[range.start as usize..range.end as usize]
    }
}
