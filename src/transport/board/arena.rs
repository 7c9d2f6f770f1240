//! The part of a board of which its owner takes blocks when it needs them: address space of which only what is in
//! use is memory. All ranks of the host map it from the beginning, so that a block needs no new mapping and no
//! descriptor that travels: its place on the board is all that peers must know.

use super::memory::BoardMemory;
use crate::error::Cause;
use crate::transport::shm::{Budget, Share, sealed};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks begin at pages, so that those that are given back are no memory any more.
const PAGE_BYTES: usize = 4096;

/// What the owner knows about its arena: which parts are free, and where memory comes from.
pub struct Arena {
    free: Mutex<BTreeMap<usize, usize>>,
    /// The descriptor to commit by and the budget to pay from; none within a process.
    backing: Option<(OwnedFd, Budget)>,
}

impl Arena {
    /// An arena from byte `start` of the board to `end`, all free.
    pub fn new(start: usize, end: usize, backing: Option<(OwnedFd, Budget)>) -> Arena {
        let all = (end > start).then_some((start, end - start));
        Arena { free: Mutex::new(all.into_iter().collect()), backing }
    }

    fn reserve(&self, bytes: usize) -> Option<usize> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, len) = free.iter().map(|(&at, &len)| (at, len)).find(|&(_, len)| len >= bytes)?;
        free.remove(&at);
        if len > bytes {
            free.insert(at + bytes, len - bytes);
        }
        Some(at)
    }

    fn give_back(&self, at: usize, bytes: usize) {
        if let Some((fd, _)) = &self.backing {
            sealed::discard(fd, at, bytes);
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut bytes) = (at, bytes);
        if let Some((&before, &len)) = free.range(..at).next_back()
            && before + len == at
        {
            free.remove(&before);
            (at, bytes) = (before, len + bytes);
        }
        if let Some(len) = free.remove(&(at + bytes)) {
            bytes += len;
        }
        free.insert(at, bytes);
    }
}

/// Bytes of the owner's arena, zeroed when they were taken. Given back when it is dropped.
pub struct Block {
    board: Arc<BoardMemory>,
    at: usize,
    bytes: usize,
    /// Whether peers may still look at it when it is dropped, so that it stays as it is for as long as the board.
    is_left: bool,
    _share: Option<Share>,
}

impl Block {
    /// Takes a block of at least `bytes` bytes of an arena that this process owns.
    pub fn take(board: &Arc<BoardMemory>, bytes: usize) -> Result<Block, Cause> {
        let arena =
            board.arena().ok_or_else(|| Cause::System("this board has no blocks to give".to_owned()))?;
        let bytes = bytes.max(1).next_multiple_of(PAGE_BYTES);
        let share = arena.backing.as_ref().map(|(_, budget)| budget.take(bytes as u64)).transpose()?;
        let at = arena.reserve(bytes).ok_or_else(|| {
            Cause::System(format!(
                "shared memory exhausted: no room for {bytes} bytes in the address space of this rank's board; \
                 free tensors in shared memory that are not needed any more"
            ))
        })?;
        let block = Block { board: Arc::clone(board), at, bytes, is_left: false, _share: share };
        match &arena.backing {
            Some((fd, _)) => {
                sealed::commit(fd, at, bytes)?;
                // SAFETY: the block's own bytes, in the board's mapping.
                unsafe { sealed::populate(block.as_ptr(), bytes) };
            }
            // SAFETY: the block's own bytes.
            None => unsafe { block.as_ptr().write_bytes(0, bytes) },
        }
        Ok(block)
    }

    /// Drops it without giving it back: peers may still look at it.
    pub fn leave(mut self) {
        self.is_left = true;
    }

    /// Where it begins on its board.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has none; no block is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The first byte, at a multiple of the page size.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.board.bytes_at(self.at, self.bytes).expect("a block lies in its arena")
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(arena) = self.board.arena().filter(|_| !self.is_left) {
            arena.give_back(self.at, self.bytes);
        }
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:#x} of a board", self.bytes, self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_whole_again() {
        let arena = Arena::new(4096, 4096 * 11, None);
        let places: Vec<usize> = (0..5).map(|_| arena.reserve(8192).unwrap()).collect();
        assert_eq!(places, [4096, 12288, 20480, 28672, 36864]);
        assert_eq!(arena.reserve(4096), None);
        for at in [12288, 28672, 20480, 4096, 36864] {
            arena.give_back(at, 8192);
        }
        assert_eq!(arena.free.lock().unwrap().iter().collect::<Vec<_>>(), [(&4096, &40960)]);
    }
}
