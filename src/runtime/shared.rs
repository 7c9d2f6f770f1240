//! Tensors that live in shared memory from the start.
#![forbid(unsafe_code)]

use super::OwnedBytes;
use crate::error::{Error, Result};
use crate::limits::TENSOR_BYTES_MAX;
use crate::transport::board::{Block, BoardMemory};
use std::sync::Arc;

/// Memory for tensors, zeroed, at a multiple of 64 bytes. It stays valid when the job is over.
#[derive(Debug)]
pub struct SharedBytes {
    memory: Place,
    len: usize,
}

#[derive(Debug)]
enum Place {
    Shared(Block),
    Private(OwnedBytes),
}

impl SharedBytes {
    pub(super) fn new(board: Option<&Arc<BoardMemory>>, len: usize) -> Result<SharedBytes> {
        if len as u64 > TENSOR_BYTES_MAX {
            return Err(Error::usage(format!("a tensor has at most {TENSOR_BYTES_MAX} bytes, not {len}")));
        }
        let memory = match board.filter(|board| board.has_arena()) {
            Some(board) => {
                let block = Block::take_for_tensor(board, len);
                Place::Shared(block.map_err(|cause| Error::usage(format!("{len} bytes: {cause}")))?)
            }
            None => Place::Private(OwnedBytes::zeroed(len)),
        };
        Ok(SharedBytes { memory, len })
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        match &self.memory {
            Place::Shared(block) => block.as_ptr(),
            Place::Private(bytes) => bytes.as_ptr(),
        }
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the other ranks of this host see it. They do not where they exchange over TCP or MPI, nor any more when
    /// an epoch has broken while it was reduced.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(&self.memory, Place::Shared(block) if block.is_lent())
    }
}
