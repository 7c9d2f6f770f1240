//! The memory of a board, and what lies where in it.

use crate::device::accelerator::{OFFER_WORDS, Offer};
use crate::error::Cause;
use crate::limits::{BOARD_SEATS, BOARD_SLOT_BYTES, BOARD_SLOTS};
use crate::transport::shm::{Budget, Share, sealed};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"carole\x00\x03");
/// The words in front of the slots.
const HEAD_BYTES: usize = 4096;
/// All of it.
pub const BOARD_BYTES: usize = HEAD_BYTES + BOARD_SEATS * BOARD_SLOTS * BOARD_SLOT_BYTES;
/// Two cache lines: the hardware fetches them in pairs.
const LINE_BYTES: usize = 128;
/// Words of a seat, each on lines of its own. The last line holds several: what the owner offers of its device.
const SEAT_WORDS: usize = 7;
/// Words of a line.
const LINE_WORDS: usize = LINE_BYTES / 8;
const SEATS_AT: usize = 4 * LINE_BYTES;

const _: () = {
    assert!(SEATS_AT + BOARD_SEATS * SEAT_WORDS * LINE_BYTES <= HEAD_BYTES);
    assert!(BOARD_SLOT_BYTES.is_multiple_of(4096));
    assert!(OFFER_WORDS < LINE_WORDS);
};

/// Stages of a tick on devices; see [`super::device`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// What the others need is in the owner's slot.
    Packed,
    /// The owner's part of the vector is reduced.
    Reduced,
    /// The owner needs nothing more of the others' slots.
    Taken,
}

const WORDS: [u64; 2] = [MAGIC, BOARD_BYTES as u64];

/// Memory that one rank owns and all ranks of its host map. It holds words, which are atomics, and bytes of
/// payload, which are only ever reached through raw pointers: a peer may write them at any time, and what it
/// writes against the protocol spoils the payload that it takes part in anyway.
pub struct BoardMemory {
    base: NonNull<u8>,
    kind: Kind,
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
    /// Makes and maps a board within a budget: unnamed, committed and sealed. The descriptor is for the peers.
    pub fn create(budget: &Budget) -> Result<(OwnedFd, Arc<BoardMemory>), Cause> {
        let share = budget.take(BOARD_BYTES as u64)?;
        let fd = sealed::create("carole-board", BOARD_BYTES, &WORDS)?;
        let board = BoardMemory::open(&fd, Some(share))?;
        Ok((fd, board))
    }

    /// Maps a peer's board, after making sure that it is one.
    pub fn map(fd: &OwnedFd) -> Result<Arc<BoardMemory>, Cause> {
        BoardMemory::open(fd, None)
    }

    fn open(fd: &OwnedFd, share: Option<Share>) -> Result<Arc<BoardMemory>, Cause> {
        let base = sealed::map(fd, BOARD_BYTES)?;
        let board = BoardMemory { base, kind: Kind::Mapped(share) };
        for (at, expected) in WORDS.iter().enumerate() {
            let found = board.word(8 * at).load(Ordering::Acquire);
            if found != *expected {
                return Err(Cause::Misbehaved(format!(
                    "a board that has {found:#x} where {expected:#x} belongs"
                )));
            }
        }
        Ok(Arc::new(board))
    }

    /// A board within this process, for ranks that share it.
    #[must_use]
    pub fn within_process() -> Arc<BoardMemory> {
        let bytes = crate::memory::OwnedBytes::zeroed(BOARD_BYTES);
        let base = NonNull::new(bytes.as_ptr()).expect("an allocation has an address");
        Arc::new(BoardMemory { base, kind: Kind::Heap(bytes) })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at < HEAD_BYTES, "words lie in the head of a board");
        // SAFETY: inside the memory, aligned, alive as long as `self`; never accessed but as an atomic.
        unsafe { &*self.base.as_ptr().add(at).cast::<AtomicU64>() }
    }

    fn seat_word(&self, seat: usize, word: usize) -> &AtomicU64 {
        assert!(seat < BOARD_SEATS, "a board has BOARD_SEATS seats");
        self.word(SEATS_AT + (seat * SEAT_WORDS + word) * LINE_BYTES)
    }

    /// Which process set has the seat: its number and one; 0 while nobody has.
    pub fn holder(&self, seat: usize) -> &AtomicU64 {
        self.seat_word(seat, 0)
    }

    /// Ticks whose payload the owner has put into its slots.
    pub fn posted(&self, seat: usize) -> &AtomicU64 {
        self.seat_word(seat, 1)
    }

    /// Ticks for which the owner needs nothing more of the others' slots.
    pub fn taken(&self, seat: usize) -> &AtomicU64 {
        self.seat_word(seat, 2)
    }

    /// Ticks of the owner's device that have come past a stage.
    pub fn device_ticks(&self, seat: usize, stage: Stage) -> &AtomicU64 {
        self.seat_word(seat, 3 + stage as usize)
    }

    /// A word of the line that says what the owner offers of its device; the first one says whether it does.
    fn offer_word(&self, seat: usize, word: usize) -> &AtomicU64 {
        assert!(seat < BOARD_SEATS && word < LINE_WORDS, "an offer lies on its line");
        self.word(SEATS_AT + (seat * SEAT_WORDS + SEAT_WORDS - 1) * LINE_BYTES + 8 * word)
    }

    /// The owner says how its device's memory is opened.
    pub fn make_offer(&self, seat: usize, offer: &Offer) {
        for (at, word) in offer.0.iter().enumerate() {
            self.offer_word(seat, 1 + at).store(*word, Ordering::Relaxed);
        }
        self.offer_word(seat, 0).store(1, Ordering::Release);
    }

    /// How the owner's device memory is opened, once it has said so.
    pub fn offer(&self, seat: usize) -> Option<Offer> {
        let made = self.offer_word(seat, 0).load(Ordering::Acquire) == 1;
        made.then(|| Offer(std::array::from_fn(|at| self.offer_word(seat, 1 + at).load(Ordering::Relaxed))))
    }

    /// The first byte of a slot.
    pub fn slot(&self, seat: usize, slot: usize) -> *mut u8 {
        assert!(seat < BOARD_SEATS && slot < BOARD_SLOTS, "slots lie on their board");
        let at = HEAD_BYTES + (seat * BOARD_SLOTS + slot) * BOARD_SLOT_BYTES;
        // SAFETY: inside the memory, as just checked.
        unsafe { self.base.as_ptr().add(at) }
    }
}

impl Drop for BoardMemory {
    fn drop(&mut self) {
        if let Kind::Mapped(_) = self.kind {
            // SAFETY: mapped by `map` with this length, and nobody holds the board any more.
            unsafe { sealed::unmap(self.base, BOARD_BYTES) };
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
