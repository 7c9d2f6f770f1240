//! A collective as data: the steps that one member takes, in chunks, without bytes, dtype or transport.
//!
//! Chunks of `Input` and `Output` share one index space: chunk `i` of the input and chunk `i` of the
//! output are the same elements (for an allreduce in place they are the same memory). A block collective
//! has one chunk per member: an allgather's input is chunk `me` alone, a reducescatter's output likewise.
#![forbid(unsafe_code)]

use std::ops::Range;

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
    /// The `i`-th chunk of the span is as long as data chunk `of + i` (for input and output: `chunks.start`).
    pub of: u32,
}

/// What a step does. `to` and `from` are members of the set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Send the bytes of `src`; complete when they may be overwritten.
    Send { to: u32, src: Span },
    /// Receive into `dst`.
    Recv { from: u32, dst: Span },
    /// Receive `x` and write `with ⊕ x` to `dst`; the operand of the lower member stands first. `with` may be `dst`.
    RecvReduce { from: u32, dst: Span, with: Span },
    /// Copy.
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
