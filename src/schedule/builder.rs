//! Algorithms are written against this as straight-line code over chunk numbers. The builder knows where the
//! current value of each chunk lives, so nobody copies the input to the output first, and derives what each
//! step waits for.
#![forbid(unsafe_code)]

use super::hazard::Hazards;
use super::{Schedule, Space, Span, Verb, has_input, has_output, is_aliased};
use crate::types::Collective;
use std::collections::VecDeque;
use std::ops::Range;

/// Where the current value of a chunk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Home {
    Nowhere,
    Input,
    Output,
    Scratch(u32),
}

/// The members and chunks that are in view.
#[derive(Clone)]
struct View {
    members: Vec<u32>,
    me: u32,
    base: u32,
    chunks: u32,
}

/// Writes the steps of one member. Members and chunks are counted within the present view
/// (see [`Builder::within`]), which is everything at first.
pub struct Builder {
    me: u32,
    size: u32,
    chunks: u32,
    collective: Collective,
    root: u32,
    prescaled: bool,
    hazards: Hazards,
    homes: Vec<Home>,
    scratch: u32,
    free: VecDeque<u32>,
    view: View,
}

impl Builder {
    /// A builder for the steps of member `me` of `size`, for a collective cut into `chunks`.
    #[must_use]
    pub fn new(
        me: u32,
        size: u32,
        chunks: u32,
        collective: Collective,
        root: u32,
        prescaled: bool,
    ) -> Builder {
        assert!(me < size && root < size, "member {me} and root {root} of {size}");
        let view = View { members: (0..size).collect(), me, base: 0, chunks };
        let home = |c| if has_input(collective, root, me, c) { Home::Input } else { Home::Nowhere };
        Builder {
            me,
            size,
            chunks,
            collective,
            root,
            prescaled,
            hazards: Hazards::new(chunks, is_aliased(collective)),
            homes: (0..chunks).map(home).collect(),
            scratch: 0,
            free: VecDeque::new(),
            view,
        }
    }

    /// This member, in the view.
    #[must_use]
    pub fn me(&self) -> u32 {
        self.view.me
    }
    /// Members in the view.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.view.members.len() as u32
    }
    /// Chunks in the view.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.view.chunks
    }
    /// All chunks of the view.
    #[must_use]
    pub fn all(&self) -> Range<u32> {
        0..self.view.chunks
    }
    /// The `i`-th of `n` equal parts of the chunks in view (as equal as whole chunks allow); `i` wraps around.
    #[must_use]
    pub fn part(&self, i: u32, n: u32) -> Range<u32> {
        let (i, n, chunks) = (u64::from(i % n), u64::from(n), u64::from(self.view.chunks));
        (i * chunks / n) as u32..((i + 1) * chunks / n) as u32
    }

    /// Narrows the view to some of its members, in this order, and a range of its chunks, while `f` writes.
    /// Nothing happens on members that are not among them.
    pub fn within(&mut self, members: &[u32], chunks: Range<u32>, f: impl FnOnce(&mut Builder)) {
        let Some(me) = members.iter().position(|&m| m == self.view.me) else { return };
        assert!(chunks.end <= self.view.chunks, "a view lies within the view around it");
        let inner = View {
            members: members.iter().map(|&m| self.view.members[m as usize]).collect(),
            me: me as u32,
            base: self.view.base + chunks.start,
            chunks: chunks.end - chunks.start,
        };
        let outer = std::mem::replace(&mut self.view, inner);
        f(self);
        self.view = outer;
    }

    /// Sends the current value of these chunks.
    pub fn send(&mut self, to: u32, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        if chunks.is_empty() {
            return;
        }
        let src = self.value_span(chunks);
        self.push(Verb::Send { to: self.view.members[to as usize], src });
    }
    /// Receives a new value of these chunks.
    pub fn recv(&mut self, from: u32, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        if chunks.is_empty() {
            return;
        }
        let dst = self.landing(chunks.clone());
        self.push(Verb::Recv { from: self.view.members[from as usize], dst: dst.clone() });
        self.settle_at(chunks, &dst);
    }
    /// Receives a value and reduces it into the current one of these chunks.
    pub fn recv_reduce(&mut self, from: u32, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        if chunks.is_empty() {
            return;
        }
        let with = self.value_span(chunks.clone());
        let dst = self.landing(chunks.clone());
        self.push(Verb::RecvReduce { from: self.view.members[from as usize], dst: dst.clone(), with });
        self.settle_at(chunks, &dst);
    }
    /// Applies the prescale factor to these chunks of the input, if there is one. Comes before all else.
    pub fn prepare(&mut self, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        if !self.prescaled || chunks.is_empty() {
            return;
        }
        let src = self.value_span(chunks.clone());
        let dst = self.landing(chunks.clone());
        self.push(Verb::Prepare { dst: dst.clone(), src });
        self.settle_at(chunks, &dst);
    }
    /// The reduction of these chunks is complete: applies the final scale, exactly once among all members.
    pub fn finish(&mut self, chunks: Range<u32>) {
        if chunks.is_empty() {
            return;
        }
        self.relocate(chunks.clone());
        let span = self.value_span(self.absolute(chunks));
        self.push(Verb::Finish { span });
    }
    /// Copies these chunks to where their result belongs (the output, where there is one), unless they are there.
    pub fn relocate(&mut self, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        if chunks.is_empty() {
            return;
        }
        let src = self.value_span(chunks.clone());
        let dst = self.landing(chunks.clone());
        if src != dst {
            self.push(Verb::Copy { dst: dst.clone(), src });
            self.settle_at(chunks, &dst);
        }
    }
    /// These chunks are not needed any more: their scratch may serve again.
    pub fn discard(&mut self, chunks: Range<u32>) {
        for c in self.absolute(chunks) {
            let home = std::mem::replace(&mut self.homes[c as usize], Home::Nowhere);
            if let Home::Scratch(slot) = home {
                self.free.push_back(slot);
            }
        }
    }

    /// Where the current value of these chunks is, for the operands of [`Builder::reduce_many`].
    #[must_use]
    pub fn value(&mut self, chunks: Range<u32>) -> Span {
        let chunks = self.absolute(chunks);
        self.value_span(chunks)
    }
    /// Receives another value of these chunks beside the current one.
    #[must_use]
    pub fn recv_aside(&mut self, from: u32, chunks: Range<u32>) -> Span {
        let dst = self.allocate(self.absolute(chunks));
        self.push(Verb::Recv { from: self.view.members[from as usize], dst: dst.clone() });
        dst
    }
    /// A value that [`Builder::recv_aside`] received is not needed any more.
    pub fn discard_aside(&mut self, span: &Span) {
        self.free.extend(span.chunks.clone());
    }
    /// Reduces all members' values of these chunks, in member order, with prescale and finish.
    pub fn reduce_many(&mut self, chunks: Range<u32>, srcs: Vec<Span>) {
        let chunks = self.absolute(chunks);
        let dst = self.landing(chunks.clone());
        self.push(Verb::ReduceMany { dst: dst.clone(), srcs });
        self.settle_at(chunks, &dst);
    }
    /// Adasum of the current value and one received aside, which comes from a higher member.
    pub fn combine(&mut self, chunks: Range<u32>, aside: Span) {
        let chunks = self.absolute(chunks);
        let a = self.value_span(chunks.clone());
        let dst = self.landing(chunks.clone());
        self.push(Verb::Combine { dst: dst.clone(), a, b: aside });
        self.settle_at(chunks, &dst);
    }
    /// Receives `x` into fresh scratch together with the current value, which stays as it is for the sends that
    /// read it: a member that must send and receive at once cannot wait for its own send (barrier).
    pub fn recv_merge(&mut self, from: u32, chunks: Range<u32>) {
        let chunks = self.absolute(chunks);
        let with = self.value_span(chunks.clone());
        let dst = self.allocate(chunks.clone());
        self.push(Verb::RecvReduce { from: self.view.members[from as usize], dst: dst.clone(), with });
        self.settle_at(chunks, &dst);
    }

    /// Alltoall: sends input chunk `chunk`.
    pub fn send_input(&mut self, to: u32, chunk: u32) {
        let src = Span { space: Space::Input, chunks: chunk..chunk + 1, of: chunk };
        self.push(Verb::Send { to, src });
    }
    /// Alltoall: receives output chunk `chunk`.
    pub fn recv_output(&mut self, from: u32, chunk: u32) {
        let dst = self.alltoall_output(chunk);
        self.push(Verb::Recv { from, dst });
    }
    /// Alltoall: copies input chunk `chunk` to output chunk `chunk`.
    pub fn copy_across(&mut self, chunk: u32) {
        let src = Span { space: Space::Input, chunks: chunk..chunk + 1, of: chunk };
        let dst = self.alltoall_output(chunk);
        self.push(Verb::Copy { dst, src });
    }
    fn alltoall_output(&self, chunk: u32) -> Span {
        assert!(self.collective == Collective::Alltoall, "other collectives name values, not spaces");
        Span { space: Space::Output, chunks: chunk..chunk + 1, of: self.chunks + chunk }
    }

    /// The schedule.
    #[must_use]
    pub fn build(self) -> Schedule {
        Schedule {
            me: self.me,
            size: self.size,
            chunks: self.chunks,
            scratch: self.scratch,
            aliased: is_aliased(self.collective),
            steps: self.hazards.steps,
            dependencies: self.hazards.dependencies,
        }
    }

    fn push(&mut self, verb: Verb) {
        self.hazards.push(verb);
    }
    fn absolute(&self, chunks: Range<u32>) -> Range<u32> {
        assert!(chunks.end <= self.view.chunks, "chunks {chunks:?} of {}", self.view.chunks);
        chunks.start + self.view.base..chunks.end + self.view.base
    }

    /// One span that holds the current value. Where it lies scattered, it is brought together first: a message
    /// is one span on both sides, and the other side cannot know how ours is scattered.
    fn value_span(&mut self, chunks: Range<u32>) -> Span {
        if let Some(span) = self.joined(chunks.clone()) {
            return span;
        }
        let dst = self.landing(chunks.clone());
        for c in chunks.clone() {
            let src = self.joined(c..c + 1).expect("one chunk is never scattered");
            let at = dst.chunks.start + (c - chunks.start);
            let dst = Span { space: dst.space, chunks: at..at + 1, of: c };
            if src != dst {
                self.push(Verb::Copy { dst, src });
            }
        }
        self.settle_at(chunks, &dst);
        dst
    }
    /// The span of these chunks' values, if they lie one after another in one space.
    fn joined(&self, chunks: Range<u32>) -> Option<Span> {
        let place = |c: u32| match self.homes[c as usize] {
            Home::Nowhere => panic!("member {} has no value of chunk {c}", self.me),
            Home::Input => (Space::Input, c),
            Home::Output => (Space::Output, c),
            Home::Scratch(slot) => (Space::Scratch, slot),
        };
        let (space, start) = place(chunks.start);
        let together = chunks.clone().all(|c| place(c) == (space, start + (c - chunks.start)));
        together.then(|| Span { space, chunks: start..start + chunks.len() as u32, of: chunks.start })
    }
    /// Where a new value of these chunks is to be written: the output where this member has it, or else scratch.
    /// Never the input.
    fn landing(&mut self, chunks: Range<u32>) -> Span {
        if chunks.clone().all(|c| has_output(self.collective, self.root, self.me, c)) {
            return Span { space: Space::Output, of: chunks.start, chunks };
        }
        let in_scratch = |c: u32| matches!(self.homes[c as usize], Home::Scratch(_));
        if chunks.clone().all(in_scratch)
            && let Some(span) = self.joined(chunks.clone())
        {
            return span;
        }
        self.allocate(chunks)
    }
    /// Fresh scratch. A slot is used again only while another is free, so that a chunk can be received while
    /// the one before it is still being sent.
    fn allocate(&mut self, chunks: Range<u32>) -> Span {
        let count = chunks.len() as u32;
        let start = match self.free.pop_front() {
            Some(slot) if count == 1 && !self.free.is_empty() => slot,
            other => {
                if let Some(slot) = other {
                    self.free.push_front(slot);
                }
                self.scratch += count;
                self.scratch - count
            }
        };
        Span { space: Space::Scratch, chunks: start..start + count, of: chunks.start }
    }
    /// The current value of `chunks` is in `span` from now on.
    fn settle_at(&mut self, chunks: Range<u32>, span: &Span) {
        for (i, c) in chunks.enumerate() {
            let at = span.chunks.start + i as u32;
            let home = match span.space {
                Space::Input => Home::Input,
                Space::Output => Home::Output,
                Space::Scratch => Home::Scratch(at),
            };
            let old = std::mem::replace(&mut self.homes[c as usize], home);
            if let Home::Scratch(slot) = old
                && old != home
            {
                self.free.push_back(slot);
            }
        }
    }
}
