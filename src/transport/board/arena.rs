//! The part of a board of which its owner takes blocks when it needs them: address space of which only what is in
//! use is memory. All ranks of the host map it from the beginning, so that a block needs no new mapping and no
//! descriptor that travels: its place on the board is all that peers must know.

use super::memory::BoardMemory;
use crate::error::Cause;
use crate::transport::shm::{Budget, Share, sealed};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks begin at pages, so that those that are given back are no memory any more.
const PAGE_BYTES: usize = 4096;

/// What the owner knows about its arena: which parts are free, and where memory comes from.
pub struct Arena {
    /// Parts by where they begin, and how long they are.
    free: Mutex<BTreeMap<usize, usize>>,
    /// Blocks that hold tensors of users, likewise.
    tensors: Mutex<BTreeMap<usize, usize>>,
    /// Whether the tensors are memory of this process alone by now.
    closed: AtomicBool,
    /// The descriptor to commit by and the budget to pay from; none within a process.
    backing: Option<(OwnedFd, Budget)>,
    /// The process that gives and takes: a forked child has the same blocks, and must not give them back.
    owner: u32,
}

impl Arena {
    /// An arena from byte `start` of the board to `end`, all free.
    pub fn new(start: usize, end: usize, backing: Option<(OwnedFd, Budget)>) -> Arena {
        let all = (end > start).then_some((start, end - start));
        let free = Mutex::new(all.into_iter().collect());
        let (tensors, closed) = (Mutex::default(), AtomicBool::new(false));
        Arena { free, tensors, closed, backing, owner: std::process::id() }
    }

    fn is_own(&self) -> bool {
        self.owner == std::process::id()
    }

    /// Whether tensors of it are not lent any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Lends no more, after `detach` has made the tensors private.
    pub(super) fn close(&self, detach: impl Fn(usize, usize) -> Result<(), Cause>) {
        let tensors = lock(&self.tensors);
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        // Within a process there is nobody to be kept out.
        let Some((fd, _)) = &self.backing else { return };
        for (&at, &bytes) in tensors.iter() {
            match detach(at, bytes) {
                Ok(()) => sealed::discard(fd, at, bytes),
                Err(cause) => crate::log::warn(format_args!(
                    "a tensor of {bytes} bytes stays in shared memory, where ranks that were lost may still write: {cause}"
                )),
            }
        }
    }

    fn reserve(&self, bytes: usize) -> Option<usize> {
        let mut free = lock(&self.free);
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
        let mut free = lock(&self.free);
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
    /// Whether it holds a tensor of a user.
    is_tensor: bool,
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
        let block =
            Block { board: Arc::clone(board), at, bytes, is_left: false, is_tensor: false, _share: share };
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

    /// Takes a block for a tensor of a user, which is lent to the peers while batches are under way. A forked child has
    /// it, too: data loaders hold on to what they were forked with.
    pub fn take_for_tensor(board: &Arc<BoardMemory>, bytes: usize) -> Result<Block, Cause> {
        let mut block = Block::take(board, bytes)?;
        let arena = board.arena().expect("a block was taken of it");
        let mut tensors = lock(&arena.tensors);
        if arena.is_closed() {
            return Err(Cause::System("the job that this rank has shared memory with is over".to_owned()));
        }
        if arena.backing.is_some() {
            // SAFETY: the block's own pages, in the board's mapping.
            unsafe { sealed::set_inherited(block.as_ptr(), block.bytes, true) };
        }
        tensors.insert(block.at, block.bytes);
        block.is_tensor = true;
        Ok(block)
    }

    /// Drops it without giving it back: peers may still look at it.
    pub fn leave(mut self) {
        self.is_left = true;
    }

    /// Whether it is still memory of its board.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        self.board.arena().is_some_and(|arena| !arena.is_closed())
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
        let Some(arena) = self.board.arena().filter(|arena| arena.is_own() && !self.is_left) else { return };
        if self.is_tensor {
            let mut tensors = lock(&arena.tensors);
            tensors.remove(&self.at);
            if arena.backing.is_some() {
                if arena.is_closed() {
                    // Its place is not part of the board any more, and stays so; the memory is given back.
                    // SAFETY: nobody else has this block, and whole pages of it are private memory.
                    return unsafe { sealed::empty(self.as_ptr(), self.bytes) };
                }
                // SAFETY: the block's own pages, in the board's mapping.
                unsafe { sealed::set_inherited(self.as_ptr(), self.bytes, false) };
            }
        }
        arena.give_back(self.at, self.bytes);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn what_is_taken_back_is_private_and_keeps_its_values() {
        let (fd, own) = BoardMemory::create(&Budget::new(1 << 30)).unwrap();
        let theirs = BoardMemory::map(&fd).unwrap();
        let block = Block::take_for_tensor(&own, 10_000).unwrap();
        let at = own.find(block.as_ptr(), 10_000).unwrap();
        let seen = theirs.bytes_at(at as usize, 10_000).unwrap();
        let (first, last) = (block.as_ptr(), block.as_ptr().wrapping_add(9_999));
        // SAFETY: the block's own bytes, here and in the peer's mapping.
        unsafe {
            (*first, *last) = (1, 2);
            assert_eq!((*seen, *seen.add(9_999)), (1, 2));
            own.take_back();
            *seen = 7;
            assert_eq!((*first, *last), (1, 2), "a peer does not reach it any more");
            *last = 3;
            assert_eq!(*seen.add(9_999), 0, "nor sees it");
        }
        assert_eq!(own.find(block.as_ptr(), 10_000), None);
        assert!(Block::take_for_tensor(&own, 1).is_err(), "a board that is closed lends nothing");
        drop(block);
    }

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
