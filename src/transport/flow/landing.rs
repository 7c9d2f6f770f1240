//! Landing space: where small messages wait that came before their receive. Blocks of a fixed size in chains,
//! so that any mixture of lengths fits as long as the credit for it lasts.
#![forbid(unsafe_code)]

use super::frame::misbehaved;
use crate::error::Cause;
use crate::limits::EAGER_CREDIT_BYTES;

/// Bytes of one block; a multiple of every element size.
pub const BLOCK_BYTES: usize = 256;
const NONE: u16 = u16::MAX;

/// What a message of `len` bytes costs in credit.
pub fn landing_cost(len: u64) -> u64 {
    len.next_multiple_of(BLOCK_BYTES as u64)
}

/// The landing space of a link.
pub struct Landing {
    /// Made when the first message lands: many links never need it.
    bytes: Vec<u8>,
    next: Vec<u16>,
    free: u16,
    free_blocks: usize,
}

/// A chain of blocks that holds one message.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    first: u16,
    /// The block at which the next bytes are written.
    at: u16,
    /// Bytes of the message.
    pub len: usize,
    /// Bytes that have landed.
    pub landed: usize,
}

impl Landing {
    pub fn new() -> Landing {
        Landing {
            bytes: Vec::new(),
            next: Vec::new(),
            free: 0,
            free_blocks: EAGER_CREDIT_BYTES / BLOCK_BYTES,
        }
    }

    /// Space for a message.
    pub fn claim(&mut self, len: usize) -> Result<Chain, Cause> {
        let blocks = len.div_ceil(BLOCK_BYTES);
        if blocks > self.free_blocks {
            return Err(misbehaved("more unasked messages than it had credit for"));
        }
        if self.bytes.is_empty() {
            self.bytes = vec![0; EAGER_CREDIT_BYTES];
            self.next = (1..=self.free_blocks as u16).collect();
        }
        self.free_blocks -= blocks;
        let first = self.free;
        let mut last = first;
        for _ in 1..blocks {
            last = self.next[last as usize];
        }
        self.free = std::mem::replace(&mut self.next[last as usize], NONE);
        Ok(Chain { first, at: first, len, landed: 0 })
    }

    /// Where the next bytes of the message land.
    pub fn room(&mut self, chain: &Chain) -> &mut [u8] {
        let within = chain.landed % BLOCK_BYTES;
        let n = (chain.len - chain.landed).min(BLOCK_BYTES - within);
        let start = chain.at as usize * BLOCK_BYTES + within;
        &mut self.bytes[start..start + n]
    }

    /// `n` bytes have landed.
    pub fn landed(&self, chain: &mut Chain, n: usize) {
        chain.landed += n;
        if chain.landed.is_multiple_of(BLOCK_BYTES) && n > 0 && chain.landed < chain.len {
            chain.at = self.next[chain.at as usize];
        }
    }

    /// Shows the bytes of a message, block by block.
    pub fn visit(&self, chain: &Chain, mut show: impl FnMut(&[u8])) {
        let (mut block, mut left) = (chain.first, chain.len);
        while left > 0 {
            let start = block as usize * BLOCK_BYTES;
            let n = left.min(BLOCK_BYTES);
            show(&self.bytes[start..start + n]);
            left -= n;
            block = self.next[block as usize];
        }
    }

    /// Gives the space back.
    pub fn release(&mut self, chain: Chain) {
        let blocks = chain.len.div_ceil(BLOCK_BYTES);
        let mut last = chain.first;
        for _ in 1..blocks {
            last = self.next[last as usize];
        }
        self.next[last as usize] = self.free;
        self.free = chain.first;
        self.free_blocks += blocks;
    }
}

const _: () = assert!(EAGER_CREDIT_BYTES / BLOCK_BYTES < NONE as usize);
