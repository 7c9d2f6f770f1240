//! Where bytes are. The one place in which a name of memory becomes an address.
//!
//! A run (one schedule in flight) sees its memory as a small table of *regions*: the inputs and outputs of
//! its tensors, and its scratch. A [`Piece`] names bytes of one region by number. Layouts made of pieces are
//! computed once per shape and reused by every run of that shape; only the table of addresses changes.

use crate::limits::{SPARE_BLOCK_BYTES_MIN, SPARE_BLOCKS_MAX, SPARE_BYTES_MAX};
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Some bytes of one region of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Index into the run's table.
    pub region: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes; never 0 inside a [`PieceRange`].
    pub len: u64,
}

/// A shared list of pieces, and which of them are meant.
#[derive(Clone, Debug)]
pub struct PieceRange {
    /// The list that a layout made.
    pub list: Arc<[Piece]>,
    /// First piece.
    pub start: u32,
    /// One past the last piece.
    pub end: u32,
}

impl PieceRange {
    /// The pieces.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.list[self.start as usize..self.end as usize]
    }
    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces().iter().map(|p| p.len).sum()
    }
}

/// Memory that somebody promised to keep alive and unaliased until the run that uses it is over.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    address: NonNull<u8>,
    len: u64,
}

// SAFETY: a region is an address that its maker promised to keep valid on any thread; access is
// serialised by the engine's baton.
unsafe impl Send for Region {}
// SAFETY: as above; a shared region can only be asked for its address.
unsafe impl Sync for Region {}

impl Region {
    /// A region of `len` bytes at `address`.
    ///
    /// # Safety
    /// Until every run whose table holds it has been forgotten, the bytes must stay allocated, and nobody
    /// else may write them (or read them, if the run writes them).
    pub unsafe fn new(address: *mut u8, len: u64) -> Region {
        Region {
            address: NonNull::new(address).unwrap_or(NonNull::dangling()),
            len: if address.is_null() { 0 } else { len },
        }
    }
    /// A region without bytes.
    #[must_use]
    pub fn none() -> Region {
        Region { address: NonNull::dangling(), len: 0 }
    }
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The first byte; for whoever knows that the promise of [`Region::new`] still holds.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }
}

/// A run in flight, as its memory is known by. A slot and a generation: a late use of a slot that has been
/// given to another run is caught.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RunId {
    /// Index.
    pub slot: u32,
    /// How often the slot has been used.
    pub generation: u32,
}

/// The tables of all runs in flight.
#[derive(Default)]
pub struct Memory {
    runs: Vec<Table>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Table {
    generation: u32,
    live: bool,
    regions: Vec<Region>,
}

impl Memory {
    /// Registers a run with these regions. Reuses a slot (and its capacity) where one is free.
    pub fn register(&mut self, regions: impl IntoIterator<Item = Region>) -> RunId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.runs.push(Table::default());
            (self.runs.len() - 1) as u32
        });
        let table = &mut self.runs[slot as usize];
        table.generation += 1;
        table.live = true;
        table.regions.clear();
        table.regions.extend(regions);
        RunId { slot, generation: table.generation }
    }

    /// Forgets a run: its memory is the owner's again.
    pub fn forget(&mut self, run: RunId) {
        let table = &mut self.runs[run.slot as usize];
        assert!(table.live && table.generation == run.generation, "a run is forgotten once");
        table.live = false;
        self.free.push(run.slot);
    }

    /// The regions of a run.
    #[must_use]
    pub fn regions(&self, run: RunId) -> &[Region] {
        let table = &self.runs[run.slot as usize];
        assert!(table.live && table.generation == run.generation, "memory of a run that is over");
        &table.regions
    }

    /// The address of a piece, checked to lie inside its region.
    #[must_use]
    pub fn address(&self, run: RunId, piece: &Piece) -> *mut u8 {
        let table = &self.runs[run.slot as usize];
        assert!(table.live && table.generation == run.generation, "memory of a run that is over");
        let region = &table.regions[piece.region as usize];
        assert!(
            piece.offset.checked_add(piece.len).is_some_and(|end| end <= region.len),
            "a piece lies inside its region"
        );
        // SAFETY: offset + len <= region.len was just checked, and the region is one allocation.
        unsafe { region.address.as_ptr().add(piece.offset as usize) }
    }
}

/// Bytes that the engine allocated (64-byte aligned). Large ones are kept when they are dropped, and given out
/// again: fresh memory costs a page fault for every 4 KiB, which is slower than to fill it.
#[derive(Debug)]
pub struct OwnedBytes {
    address: *mut u8,
    len: usize,
    /// What there is room for: `len` or more.
    capacity: usize,
    /// What was allocated; `address` is the first aligned one in it.
    block: *mut u8,
}

// SAFETY: the bytes are owned and not shared.
unsafe impl Send for OwnedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for OwnedBytes {}

/// Blocks that nobody uses, oldest first: address and size.
static SPARE: Mutex<VecDeque<(usize, usize)>> = Mutex::new(VecDeque::new());

impl OwnedBytes {
    /// Zeroed bytes, aligned to 64.
    #[must_use]
    pub fn zeroed(len: usize) -> OwnedBytes {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not 0.
        let block = unsafe { std::alloc::alloc_zeroed(layout) };
        if block.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        OwnedBytes::of_block(block, len, len)
    }
    /// The first `len` bytes of a block that has room for `capacity` after the first aligned address.
    fn of_block(block: *mut u8, len: usize, capacity: usize) -> OwnedBytes {
        let address = block.map_addr(|start| start.next_multiple_of(Self::ALIGNMENT));
        OwnedBytes { address, len, capacity, block }
    }

    /// Bytes of any value, aligned to 64, for whoever writes all of them before they are read: from a block that
    /// was dropped, if there is one that is not much too large.
    #[must_use]
    pub fn recycled(len: usize) -> OwnedBytes {
        if len >= SPARE_BLOCK_BYTES_MIN {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |&(_, capacity): &(usize, usize)| (len..=2 * len).contains(&capacity);
            if let Some((block, capacity)) = spare.iter().position(fits).and_then(|at| spare.remove(at)) {
                return OwnedBytes::of_block(std::ptr::with_exposed_provenance_mut(block), len, capacity);
            }
        }
        OwnedBytes::zeroed(len)
    }

    const ALIGNMENT: usize = 64;

    /// Room to align the bytes by hand. Were the allocator asked for the alignment, it would write the zeros itself,
    /// and the engine would be silent for the seconds which that takes for gigabytes; as it is, large blocks are
    /// fresh pages, which the system zeroes one by one when they are first written.
    fn layout(len: usize) -> std::alloc::Layout {
        let room = len.checked_add(Self::ALIGNMENT).expect("lengths are bounded by TENSOR_BYTES_MAX");
        std::alloc::Layout::from_size_align(room, align_of::<u64>())
            .expect("lengths are bounded by TENSOR_BYTES_MAX")
    }
    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.address
    }
    /// The bytes as a region, which is good for as long as the operation that they were made for keeps them.
    #[must_use]
    pub(crate) fn as_region(&self) -> Region {
        // SAFETY: allocated with this length; the operation keeps the value until it has ended, and reads it after.
        unsafe { Region::new(self.address, self.len as u64) }
    }
    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes at `address` are owned and initialised: zeroed once, and only ever written since.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }
}

impl Drop for OwnedBytes {
    fn drop(&mut self) {
        let free = |block: *mut u8, capacity: usize| {
            // SAFETY: allocated with this layout in `zeroed`, and nobody's any more.
            unsafe { std::alloc::dealloc(block, OwnedBytes::layout(capacity)) }
        };
        if !(SPARE_BLOCK_BYTES_MIN..=SPARE_BYTES_MAX).contains(&self.capacity) {
            return free(self.block, self.capacity);
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push_back((self.block.expose_provenance(), self.capacity));
        let mut held: usize = spare.iter().map(|(_, capacity)| capacity).sum();
        while held > SPARE_BYTES_MAX || spare.len() > SPARE_BLOCKS_MAX {
            let Some((block, capacity)) = spare.pop_front() else { break };
            held -= capacity;
            free(std::ptr::with_exposed_provenance_mut(block), capacity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "a piece lies inside its region")]
    fn a_piece_outside_its_region_is_caught() {
        let mut bytes = [0u8; 8];
        let mut memory = Memory::default();
        // SAFETY: `bytes` outlives `memory`.
        let run = memory.register([unsafe { Region::new(bytes.as_mut_ptr(), 8) }]);
        let _ = memory.address(run, &Piece { region: 0, offset: 4, len: 5 });
    }

    #[test]
    fn large_blocks_are_used_again() {
        let len = 150 << 20;
        let block = OwnedBytes::recycled(len);
        let address = block.as_ptr();
        drop(block);
        let again = OwnedBytes::recycled(len - 100);
        assert_eq!((again.as_ptr(), again.as_slice().len()), (address, len - 100));
        let other = OwnedBytes::recycled(len);
        assert_ne!(other.as_ptr(), address, "one block for one owner");
        assert!(OwnedBytes::zeroed(len).as_slice().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn large_blocks_are_not_written_when_they_are_made() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let block = OwnedBytes::zeroed(2 << 30);
        assert!(block.as_ptr().addr().is_multiple_of(64));
        assert_eq!(block.as_slice()[(1 << 30) + 5], 0);
        let more = resident().saturating_sub(before);
        assert!(more < 1 << 30, "{more} bytes were touched");
    }

    #[test]
    #[should_panic(expected = "memory of a run that is over")]
    fn a_late_use_is_caught() {
        let mut memory = Memory::default();
        let run = memory.register([]);
        memory.forget(run);
        memory.register([]);
        let _ = memory.address(run, &Piece { region: 0, offset: 0, len: 1 });
    }
}
