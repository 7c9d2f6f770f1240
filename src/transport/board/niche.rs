//! Niches: what the members of a set exchange a small collective through that stands ([`crate::engine::standing`]).
//!
//! Each member has a niche of two slots on its own board, at the same place behind its seat. A slot holds the number
//! of a start and its owner's bytes. Whoever starts writes its bytes and then the number; whoever finds the number in the
//! slots of all takes from them what it gets: it reduces them itself, in member order, or copies pieces of them. So nobody waits for what another does after it has started, and that
//! is one way through memory. Two slots are enough: a member starts again only when it has read all of the start before,
//! and no other can have come further than one start.
//!
//! A member that will not take part in a start withdraws: it writes the start's number into another word, for good.

use super::memory::{BoardMemory, LINE_BYTES};
use crate::device::{Finish, Reduction, host};
use crate::limits::BOARD_MEMBERS_MAX;
use crate::memory::Region;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// In front of the bytes of a slot: the number of its start, and that of the start which its owner withdraws from.
const HEAD_BYTES: usize = 16;
/// What a processor moves at once: slots begin there.
const SLOT_UNIT: usize = 64;

/// The niches of all members, as one of them uses them.
#[derive(Debug)]
pub struct Niche {
    me: usize,
    /// By member: the board, and where on it the niche begins.
    places: Vec<(Arc<BoardMemory>, usize)>,
    /// Room of a slot.
    bytes: usize,
}

/// Bytes that a member has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// Whose.
    pub member: usize,
    /// The first of them in its slot.
    pub from: usize,
    /// How many.
    pub len: usize,
}

/// How far a start has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// All have started.
    Complete,
    /// A member will never start it.
    Withdrawn,
    /// Somebody has not started yet.
    Waiting,
}

impl Niche {
    /// Bytes on each board of a niche in which each member shows at most `bytes` bytes.
    #[must_use]
    pub fn size(bytes: usize) -> usize {
        (2 * Niche::stride(bytes)).next_multiple_of(LINE_BYTES)
    }

    fn stride(bytes: usize) -> usize {
        (HEAD_BYTES + bytes).next_multiple_of(SLOT_UNIT)
    }

    /// The niches at these places, which lie on their boards.
    #[must_use]
    pub fn new(me: usize, places: Vec<(Arc<BoardMemory>, usize)>, bytes: usize) -> Niche {
        let inside = |(board, at): &(Arc<BoardMemory>, usize)| {
            at.is_multiple_of(LINE_BYTES) && board.bytes_at(*at, Niche::size(bytes)).is_some()
        };
        assert!(places.iter().all(inside) && me < places.len() && places.len() <= BOARD_MEMBERS_MAX);
        Niche { me, places, bytes }
    }

    /// What each member may show.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn slot_at(&self, member: usize, start: u64) -> usize {
        self.places[member].1 + (start % 2) as usize * Niche::stride(self.bytes)
    }

    fn number(&self, member: usize, start: u64) -> &AtomicU64 {
        self.places[member].0.word_at(self.slot_at(member, start)).expect("a niche lies on its board")
    }

    fn withdrawn(&self, member: usize) -> &AtomicU64 {
        let (board, at) = &self.places[member];
        board.word_at(at + 8).expect("a niche lies on its board")
    }

    fn payload(&self, member: usize, start: u64) -> *mut u8 {
        let at = self.slot_at(member, start) + HEAD_BYTES;
        self.places[member].0.bytes_at(at, self.bytes).expect("a niche lies on its board")
    }

    /// Starts: shows the others the first `len` bytes of the input. All earlier starts are over here.
    pub fn post(&self, start: u64, input: Region, len: usize) {
        assert!(len <= self.bytes && len as u64 <= input.len());
        // SAFETY: the submitter keeps the input alive and unwritten until the operation has ended; nobody reads the slot,
        // since all others have read the start before the last, or they would not have started the last.
        unsafe { std::ptr::copy_nonoverlapping(input.as_ptr(), self.payload(self.me, start), len) };
        self.number(self.me, start).store(start, Ordering::Release);
    }

    /// Tells the others that this member does not take part in a start, nor in later ones.
    pub fn withdraw(&self, start: u64) {
        self.withdrawn(self.me).store(start, Ordering::Release);
    }

    /// How far a start has come.
    #[must_use]
    pub fn progress(&self, start: u64) -> Progress {
        let mut all = true;
        for member in 0..self.places.len() {
            if self.number(member, start).load(Ordering::Acquire) != start {
                if self.withdrawn(member).load(Ordering::Acquire) == start {
                    return Progress::Withdrawn;
                }
                all = false;
            }
        }
        if all { Progress::Complete } else { Progress::Waiting }
    }

    /// Whether a member has withdrawn from a start.
    #[must_use]
    pub fn is_withdrawn(&self, start: u64) -> bool {
        (0..self.places.len()).any(|member| self.withdrawn(member).load(Ordering::Acquire) == start)
    }

    /// Members that have not started.
    pub fn missing(&self, start: u64) -> impl Iterator<Item = usize> {
        (0..self.places.len()).filter(move |&m| self.number(m, start).load(Ordering::Acquire) != start)
    }

    /// Whether a member sleeps, who is to be woken when something was written here. Whoever lies down says so before a
    /// last look at the niche.
    #[must_use]
    pub fn has_sleepers(&self) -> bool {
        fence(Ordering::SeqCst);
        self.others().any(|(board, _)| board.asleep().load(Ordering::Relaxed) != 0)
    }

    fn others(&self) -> impl Iterator<Item = &(Arc<BoardMemory>, usize)> {
        self.places.iter().enumerate().filter(|(member, _)| *member != self.me).map(|(_, place)| place)
    }

    /// Reduces what all have shown of a start that is [`Progress::Complete`], from the byte `from` on, into all of the
    /// output.
    pub fn reduce(
        &self,
        start: u64,
        from: usize,
        reduction: Reduction,
        pre: f64,
        finish: Finish,
        output: Region,
    ) {
        let len = output.len() as usize;
        assert!(from + len <= self.bytes);
        let mut sources = [std::ptr::null(); BOARD_MEMBERS_MAX];
        for (member, source) in sources.iter_mut().enumerate().take(self.places.len()) {
            *source = self.payload(member, start).wrapping_add(from).cast_const();
        }
        let sources = &sources[..self.places.len()];
        // SAFETY: the bytes of all members were published before their numbers, and stay until this member starts
        // again; the submitter has given the output away until the operation has ended.
        unsafe { host::reduce_many(reduction, output.as_ptr(), sources, len, pre, finish) };
    }

    /// Copies what members have shown of a start that is [`Progress::Complete`], end to end.
    pub fn copy(&self, start: u64, shown: &[Shown], output: Region) {
        let mut at = 0;
        for shown in shown {
            assert!(shown.from + shown.len <= self.bytes && (at + shown.len) as u64 <= output.len());
            let source = self.payload(shown.member, start).wrapping_add(shown.from);
            // SAFETY: as in `reduce`; a board and a caller's memory do not overlap, but for a tensor in shared memory,
            // which is no part of a niche.
            unsafe { std::ptr::copy_nonoverlapping(source, output.as_ptr().wrapping_add(at), shown.len) };
            at += shown.len;
        }
    }
}
