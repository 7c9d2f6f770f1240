//! The memory of a simulated rank's tensors.

use carole::memory::Region;
use carole::transport::board::{Block, BoardMemory};
use std::sync::Arc;

/// Memory of a tensor, which lives until its cluster is judged.
pub enum Buffer {
    /// Of this rank alone.
    Own(Vec<u8>),
    /// Of its board's arena, and how many bytes of it are the tensor's.
    Lent(Block, usize),
}

impl Buffer {
    pub fn own(bytes: Vec<u8>) -> Buffer {
        Buffer::Own(bytes)
    }

    /// These bytes, in the arena of a board if it has room.
    pub fn new(board: Option<&Arc<BoardMemory>>, bytes: Vec<u8>) -> Buffer {
        let Some(Ok(block)) = board.map(|board| Block::take_for_tensor(board, bytes.len())) else {
            return Buffer::Own(bytes);
        };
        // SAFETY: the block has room for so many bytes, and is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), block.as_ptr(), bytes.len()) };
        Buffer::Lent(block, bytes.len())
    }

    pub fn region(&self) -> Region {
        let (start, len) = match self {
            Buffer::Own(bytes) => (bytes.as_ptr().cast_mut(), bytes.len()),
            Buffer::Lent(block, len) => (block.as_ptr(), *len),
        };
        // SAFETY: the node keeps the buffer until the cluster is judged, and what it owns does not move.
        unsafe { Region::new(start, len as u64) }
    }

    pub fn bytes(&self) -> &[u8] {
        let region = self.region();
        // SAFETY: the bytes are there, and no engine of the cluster, which runs in this thread, moves meanwhile.
        unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len() as usize) }
    }
}
