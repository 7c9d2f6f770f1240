//! Niches: what the members of a set exchange a small collective through that stands ([`crate::engine::standing`]).
//!
//! Each member has a niche of two slots on its own board, at the same place behind its seat. A slot holds the number
//! of a start and its owner's bytes. Whoever starts writes its bytes and then the number; whoever finds the number in the
//! slots of all takes from them what it gets: it reduces them itself, in member order, or copies pieces of them. So nobody
//! waits for what another does after it has started, and that is one way through memory. Two slots are enough: a member
//! starts again only when it has read all of the start before, and no other can have come further than one start.
//!
//! Many bytes lie *aside*, in a block that the member takes of its board's arena when it makes the niche; in its first
//! slot it says where. Each member reduces all bytes of all, which is more work than if each reduced a part for all, but
//! for what stays in cache it takes less time than another round of waiting, the more so where ranks share processors.
//!
//! A member that will not take part in a start withdraws: it writes the start's number into another word, for good.
//! So does one that got no block.

use super::Block;
use super::memory::{BoardMemory, LINE_BYTES};
use crate::device::{Finish, Reduction, host};
use crate::limits::BOARD_MEMBERS_MAX;
use crate::memory::Region;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

/// In front of the bytes of a slot: the number of its start, and that of the start which its owner withdraws from.
const HEAD_BYTES: usize = 16;
/// Where in a slot its bytes lie aside: the place on the board.
const PLACE_BYTES: usize = 8;
/// What a processor moves at once: slots begin there.
const SLOT_UNIT: usize = 64;

/// The niches of all members, as one of them uses them.
#[derive(Debug)]
pub struct Niche {
    me: usize,
    /// By member: the board, and where on it the niche begins.
    places: Vec<(Arc<BoardMemory>, usize)>,
    room: Room,
    /// Where this member's bytes lie aside.
    block: Option<Block>,
    copies: Copies,
    /// Nobody reads the block any more.
    is_free: AtomicBool,
}

/// What each member may show in a niche.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes.
    pub bytes: usize,
    /// Whether they lie aside.
    pub is_aside: bool,
}

impl Room {
    fn stride(self) -> usize {
        let bytes = if self.is_aside { PLACE_BYTES } else { self.bytes };
        (HEAD_BYTES + bytes).next_multiple_of(SLOT_UNIT)
    }

    /// Bytes that a niche takes behind each seat.
    #[must_use]
    pub fn behind_seat(self) -> usize {
        (2 * self.stride()).next_multiple_of(LINE_BYTES)
    }

    /// Bytes of the two slots that lie aside.
    #[must_use]
    pub fn aside(self) -> usize {
        if self.is_aside { 2 * self.slot_aside() } else { 0 }
    }

    fn slot_aside(self) -> usize {
        self.bytes.next_multiple_of(SLOT_UNIT)
    }
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
    /// The niches at these places, which lie on their boards.
    #[must_use]
    pub fn new(me: usize, places: Vec<(Arc<BoardMemory>, usize)>, room: Room) -> Niche {
        let inside = |(board, at): &(Arc<BoardMemory>, usize)| {
            at.is_multiple_of(LINE_BYTES) && board.bytes_at(*at, room.behind_seat()).is_some()
        };
        assert!(places.iter().all(inside) && me < places.len() && places.len() <= BOARD_MEMBERS_MAX);
        let block = match room.is_aside && places.iter().all(|(board, _)| board.has_arena()) {
            // Without memory for it the collective does not stand.
            true => Block::take(&places[me].0, room.aside()).ok(),
            false => None,
        };
        let niche =
            Niche { me, places, room, block, copies: Copies::default(), is_free: AtomicBool::new(false) };
        if let Some(block) = &niche.block {
            // Published with the number of the first start.
            niche.place(me).store(block.at() as u64, Ordering::Relaxed);
        }
        niche
    }

    /// Whether this member can take part.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.room.is_aside || self.block.is_some()
    }

    /// What each member may show.
    #[must_use]
    pub fn room(&self) -> Room {
        self.room
    }

    /// All members have left: what lies aside may be given back.
    pub fn release(&self) {
        self.is_free.store(true, Ordering::Release);
    }

    fn slot_at(&self, member: usize, start: u64) -> usize {
        self.places[member].1 + (start % 2) as usize * self.room.stride()
    }

    /// Where a member says that its bytes lie.
    fn place(&self, member: usize) -> &AtomicU64 {
        let (board, at) = &self.places[member];
        board.word_at(at + HEAD_BYTES).expect("a niche lies on its board")
    }

    fn number(&self, member: usize, start: u64) -> &AtomicU64 {
        self.places[member].0.word_at(self.slot_at(member, start)).expect("a niche lies on its board")
    }

    fn withdrawn(&self, member: usize) -> &AtomicU64 {
        let (board, at) = &self.places[member];
        board.word_at(at + 8).expect("a niche lies on its board")
    }

    /// The bytes of a member that has started; none where it says that they lie where none can.
    fn payload(&self, member: usize, start: u64) -> Option<*mut u8> {
        let board = &self.places[member].0;
        if !self.room.is_aside {
            return board.bytes_at(self.slot_at(member, start) + HEAD_BYTES, self.room.bytes);
        }
        let first = self.place(member).load(Ordering::Relaxed);
        let at = first.checked_add(start % 2 * self.room.slot_aside() as u64)?;
        board.lent_at(at, self.room.bytes as u64)
    }

    fn shown(&self, member: usize, start: u64) -> *mut u8 {
        self.payload(member, start).expect("a start is complete when all bytes lie where they can")
    }

    /// Starts: shows the others the first `len` bytes of the input. All earlier starts are over here.
    pub fn post(&self, start: u64, input: Region, len: usize) {
        assert!(len <= self.room.bytes && len as u64 <= input.len() && self.is_whole());
        let shown = self.payload(self.me, start).expect("a member's own bytes lie on its board");
        // SAFETY: the submitter keeps the input alive and unwritten until the operation has ended; nobody reads the slot,
        // since all others have read the start before the last, or they would not have started the last.
        unsafe { self.copies.copy(shown, input.as_ptr(), len) };
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
            } else if self.payload(member, start).is_none() {
                // It does not keep to the rules; nobody takes anything of it.
                return Progress::Withdrawn;
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
    /// output. `input` is what this member has shown, as it still is in the caller's memory.
    pub fn reduce(
        &self,
        start: u64,
        from: usize,
        reduction: Reduction,
        pre: f64,
        finish: Finish,
        (input, output): (Region, Region),
    ) {
        let len = output.len() as usize;
        assert!(from + len <= self.room.bytes);
        let mut sources = [std::ptr::null(); BOARD_MEMBERS_MAX];
        for (member, source) in sources.iter_mut().enumerate().take(self.places.len()) {
            *source = self.shown(member, start).wrapping_add(from).cast_const();
        }
        // One stream of memory less, where it is the output itself or apart from it.
        let own = input.as_ptr().wrapping_add(from);
        let distance = own.addr().abs_diff(output.as_ptr().addr());
        if (from + len) as u64 <= input.len() && (distance == 0 || distance >= len) {
            sources[self.me] = own.cast_const();
        }
        let sources = &sources[..self.places.len()];
        // SAFETY: the bytes of all members were published before their numbers, and stay until this member starts
        // again; the submitter has given the output away until the operation has ended, and has not written the input.
        unsafe { host::reduce_many(reduction, output.as_ptr(), sources, len, pre, finish) };
    }

    /// Copies what members have shown of a start that is [`Progress::Complete`], end to end.
    pub fn copy(&self, start: u64, shown: &[Shown], output: Region) {
        let mut at = 0;
        for shown in shown {
            assert!(shown.from + shown.len <= self.room.bytes && (at + shown.len) as u64 <= output.len());
            let source = self.shown(shown.member, start).wrapping_add(shown.from);
            // SAFETY: as in `reduce`; a board and a caller's memory do not overlap, but for a tensor in shared memory,
            // which is no part of a niche.
            unsafe { std::ptr::copy_nonoverlapping(source, output.as_ptr().wrapping_add(at), shown.len) };
            at += shown.len;
        }
    }
}

/// How a member copies its bytes into its slots, which the others have read before. Where an ordinary store to such a
/// line is cheap, the others find the bytes in a cache; where it waits for them (2 GB/s were seen), streaming stores go
/// past the caches. Neither kind of machine tells beforehand, so a few copies are timed.
#[derive(Debug, Default)]
struct Copies {
    /// Copies that were looked at.
    count: AtomicU32,
    /// The shortest time that one took.
    shortest_ns: AtomicU64,
}

/// The first copies find slots that nobody has read yet.
const COPIES_FRESH: u32 = 2;
/// So many copies decide.
const COPIES_TIMED: u32 = COPIES_FRESH + 6;
/// What takes longer waits for other processors: streaming stores do 28 GB/s, ordinary ones to lines at hand 50.
const CHEAP_BYTES_PER_NS: u64 = 12;

impl Copies {
    /// # Safety
    /// As for [`host::copy_streaming`].
    unsafe fn copy(&self, dst: *mut u8, src: *const u8, len: usize) {
        let count = self.count.load(Ordering::Relaxed);
        if count >= COPIES_TIMED && self.is_slow(len) {
            // SAFETY: the caller's promise.
            unsafe { host::copy_streaming(dst, src, len) };
            return;
        }
        let begin = (count < COPIES_TIMED).then(Instant::now);
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, len) };
        if let Some(begin) = begin {
            // The time of the stores themselves: a few thousand bytes are on their way when the copy returns.
            fence(Ordering::SeqCst);
            self.note(count, begin.elapsed().as_nanos() as u64);
        }
    }

    /// One member copies at a time.
    fn note(&self, count: u32, ns: u64) {
        if count == COPIES_FRESH || (count > COPIES_FRESH && ns < self.shortest_ns.load(Ordering::Relaxed)) {
            self.shortest_ns.store(ns, Ordering::Relaxed);
        }
        self.count.store(count + 1, Ordering::Relaxed);
    }

    /// Whether copies of so many bytes, once enough were timed, have taken longer than they should.
    fn is_slow(&self, len: usize) -> bool {
        self.shortest_ns.load(Ordering::Relaxed) * CHEAP_BYTES_PER_NS > len as u64
    }
}

impl Drop for Niche {
    fn drop(&mut self) {
        if let Some(block) = self.block.take().filter(|_| !self.is_free.load(Ordering::Acquire)) {
            block.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_of_some_copies_decides() {
        let after = |times: [u64; COPIES_TIMED as usize]| {
            let copies = Copies::default();
            (0..).zip(times).for_each(|(count, ns)| copies.note(count, ns));
            assert_eq!(copies.count.load(Ordering::Relaxed), COPIES_TIMED);
            copies.is_slow(64 << 10)
        };
        assert!(
            !after([900, 900, 40_000, 1200, 1100, 90_000, 1300, 1200]),
            "50 GB/s, where nothing comes between"
        );
        assert!(
            after([1200, 1200, 33_000, 34_000, 33_000, 32_000, 33_000, 33_000]),
            "2 GB/s once the slots are shared"
        );
    }

    #[test]
    fn every_copy_is_whole_whatever_is_decided() {
        let src: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        let copies = Copies::default();
        for turn in 0..2 * COPIES_TIMED {
            if turn == COPIES_TIMED {
                copies.shortest_ns.store(u64::MAX / CHEAP_BYTES_PER_NS, Ordering::Relaxed);
            }
            let mut dst = vec![0; src.len()];
            // SAFETY: two vectors of the same length.
            unsafe { copies.copy(dst.as_mut_ptr(), src.as_ptr(), src.len()) };
            assert_eq!(dst, src);
        }
    }
}
