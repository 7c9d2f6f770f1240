//! The memory of a board, and what lies where in it.

use super::arena::Arena;
use crate::error::Cause;
use crate::limits::{BOARD_ARENA_BYTES, BOARD_NICHES_BYTES, BOARD_SEATS, BOARD_SLOT_BYTES, BOARD_SLOTS};
use crate::transport::shm::{Budget, Share, sealed};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"carole\x00\x05");
/// The words in front of the slots.
const HEAD_BYTES: usize = 4096;
/// What is memory from the beginning; the arena follows.
pub const BOARD_BYTES: usize = NICHES_AT + BOARD_SEATS * BOARD_NICHES_BYTES;
/// Behind the slots of all seats: their niches.
const NICHES_AT: usize = HEAD_BYTES + BOARD_SEATS * BOARD_SLOTS * BOARD_SLOT_BYTES;
/// The arena of a board within a process.
const ARENA_BYTES_WITHIN: usize = 1 << 20;
/// Two cache lines: the hardware fetches them in pairs.
pub const LINE_BYTES: usize = 128;
/// Words of a seat, each on lines of its own. The last line holds several: what the owner offers of its device.
const SEAT_WORDS: usize = 7;
const SEATS_AT: usize = 4 * LINE_BYTES;
const ASLEEP_AT: usize = 2 * LINE_BYTES;

const _: () = {
    assert!(SEATS_AT + BOARD_SEATS * SEAT_WORDS * LINE_BYTES <= HEAD_BYTES);
    assert!(BOARD_SLOT_BYTES.is_multiple_of(4096));
};

const WORDS: [u64; 2] = [MAGIC, BOARD_BYTES as u64];

/// Memory that one rank owns and all ranks of its host map. It holds words, which are atomics, and bytes of
/// payload, which are only ever reached through raw pointers: a peer may write them at any time, and what it
/// writes against the protocol spoils the payload that it takes part in anyway.
pub struct BoardMemory {
    base: NonNull<u8>,
    /// All that is mapped, the arena included.
    len: usize,
    kind: Kind,
    /// On the owner's side.
    arena: Option<Arena>,
}

enum Kind {
    /// With what it takes of the owner's budget.
    Mapped(Option<Share>),
    /// Of the simulator's ranks, which share a process.
    Heap(crate::memory::OwnedBytes),
}

// SAFETY: the memory lives as long as the value; words are atomics, bytes are reached through raw pointers by
// whoever the protocol gives them to.
unsafe impl Send for BoardMemory {}
// SAFETY: as above.
unsafe impl Sync for BoardMemory {}

impl BoardMemory {
    /// Makes and maps a board within a budget: unnamed, committed (but for its arena) and sealed. The descriptor is
    /// for the peers.
    pub fn create(budget: &Budget) -> Result<(OwnedFd, Arc<BoardMemory>), Cause> {
        let share = budget.take(BOARD_BYTES as u64)?;
        let fd = sealed::create("carole-board", BOARD_BYTES, BOARD_ARENA_BYTES, &WORDS)?;
        let mut board = BoardMemory::open(&fd, Some(share))?;
        let own = fd.try_clone().map_err(|e| Cause::System(format!("duplicating a descriptor: {e}")))?;
        board.arena = Some(Arena::new(BOARD_BYTES, board.len, Some((own, budget.clone()))));
        Ok((fd, Arc::new(board)))
    }

    /// Maps a peer's board, after making sure that it is one.
    pub fn map(fd: &OwnedFd) -> Result<Arc<BoardMemory>, Cause> {
        BoardMemory::open(fd, None).map(Arc::new)
    }

    fn open(fd: &OwnedFd, share: Option<Share>) -> Result<BoardMemory, Cause> {
        let (base, len) = sealed::map(fd, BOARD_BYTES, BOARD_ARENA_BYTES)?;
        let board = BoardMemory { base, len, kind: Kind::Mapped(share), arena: None };
        for (at, expected) in WORDS.iter().enumerate() {
            let found = board.word(8 * at).load(Ordering::Acquire);
            if found != *expected {
                return Err(Cause::Misbehaved(format!(
                    "a board that has {found:#x} where {expected:#x} belongs"
                )));
            }
        }
        Ok(board)
    }

    /// A board within this process, for ranks that share it.
    #[must_use]
    pub fn within_process() -> Arc<BoardMemory> {
        let len = BOARD_BYTES + ARENA_BYTES_WITHIN;
        let bytes = crate::memory::OwnedBytes::zeroed(len);
        let base = NonNull::new(bytes.as_ptr()).expect("an allocation has an address");
        let arena = Some(Arena::new(BOARD_BYTES, len, None));
        Arc::new(BoardMemory { base, len, kind: Kind::Heap(bytes), arena })
    }

    /// What the owner knows about the arena; none on a peer's side.
    pub(super) fn arena(&self) -> Option<&Arena> {
        self.arena.as_ref()
    }

    /// Whether the arena is mapped here.
    #[must_use]
    pub fn has_arena(&self) -> bool {
        self.len > BOARD_BYTES
    }

    /// The word at a byte of the board; none where no word can lie.
    pub(super) fn word_at(&self, at: usize) -> Option<&AtomicU64> {
        let fits = at.is_multiple_of(8) && at.checked_add(8).is_some_and(|end| end <= self.len);
        // SAFETY: inside the memory, aligned, alive as long as `self`; where words lie nothing else is accessed.
        fits.then(|| unsafe { &*self.base.as_ptr().add(at).cast::<AtomicU64>() })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < HEAD_BYTES, "words lie in the head of a board");
        self.word_at(at).expect("the head is mapped")
    }

    /// The first of `len` bytes of the board; none where they do not lie on it.
    #[must_use]
    pub fn bytes_at(&self, at: usize, len: usize) -> Option<*mut u8> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len);
        // SAFETY: inside the memory, as just checked.
        fits.then(|| unsafe { self.base.as_ptr().add(at) })
    }

    /// Where in the arena bytes of this process lie; none where they lie elsewhere.
    #[must_use]
    pub fn find(&self, address: *const u8, len: u64) -> Option<u64> {
        let at = address.addr().checked_sub(self.base.as_ptr().addr())? as u64;
        let inside =
            at >= BOARD_BYTES as u64 && at.checked_add(len).is_some_and(|end| end <= self.len as u64);
        let is_lent = self.arena.as_ref().is_some_and(|arena| !arena.is_closed());
        (inside && is_lent).then_some(at)
    }

    /// The first of `len` bytes at a place of the arena that its owner has told; none where they cannot lie there.
    pub(super) fn lent_at(&self, at: u64, len: u64) -> Option<*mut u8> {
        let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
        (at >= BOARD_BYTES).then(|| self.bytes_at(at, len))?
    }

    /// Peers may go on with what has failed here: the tensors of the arena become memory of this process alone, at the
    /// same addresses and with the same values, and no other is lent any more.
    pub fn take_back(&self) {
        if let Some(arena) = &self.arena {
            // SAFETY: the arena's tensors lie in this board's mapping, at these places.
            arena.close(|at, bytes| unsafe { sealed::detach(self.base.as_ptr().add(at), bytes) });
        }
    }

    /// Whether the owner sleeps, and is to be woken when something is published beside the links. The owner writes it.
    pub fn asleep(&self) -> &AtomicU64 {
        self.word(ASLEEP_AT)
    }

    /// Where the counters of a seat lie, and where its slots.
    pub(super) fn seat_at(seat: usize) -> (usize, usize) {
        assert!(seat < BOARD_SEATS, "a board has BOARD_SEATS seats");
        let words = SEATS_AT + (seat * SEAT_WORDS + 1) * LINE_BYTES;
        (words, HEAD_BYTES + seat * BOARD_SLOTS * BOARD_SLOT_BYTES)
    }

    /// Where the niches of a seat lie.
    pub(super) fn niches_at(seat: usize) -> usize {
        assert!(seat < BOARD_SEATS, "a board has BOARD_SEATS seats");
        NICHES_AT + seat * BOARD_NICHES_BYTES
    }

    /// Which process set has the seat: its number and one; 0 while nobody has.
    pub fn holder(&self, seat: usize) -> &AtomicU64 {
        assert!(seat < BOARD_SEATS, "a board has BOARD_SEATS seats");
        self.word(SEATS_AT + seat * SEAT_WORDS * LINE_BYTES)
    }
}

impl Drop for BoardMemory {
    fn drop(&mut self) {
        if let Kind::Mapped(_) = self.kind {
            // SAFETY: mapped by `open` with this length, and nobody holds the board any more.
            unsafe { sealed::unmap(self.base, self.len) };
        }
    }
}

impl std::fmt::Debug for BoardMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.kind {
            Kind::Mapped(Some(_)) => "shared, own",
            Kind::Mapped(None) => "shared, a peer's",
            Kind::Heap(bytes) => {
                if bytes.as_slice().is_empty() {
                    "empty"
                } else {
                    "within a process"
                }
            }
        };
        write!(f, "board ({kind})")
    }
}
