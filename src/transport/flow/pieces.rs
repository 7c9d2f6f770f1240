//! The one place of the flow where pieces of a run's memory become bytes.

use super::checksum::Checksum;
use crate::device::{Reduction, host};
use crate::error::Cause;
use crate::memory::{Memory, PieceRange, RunId};
use crate::transport::Pipe;
use std::io::IoSlice;

/// Bytes that are reduced before the pipe gets their room back: the peer goes on writing meanwhile.
const REDUCE_BYTES: usize = 16 << 10;

/// A position in a list of pieces.
#[derive(Clone, Copy, Default, Debug)]
pub struct Cursor {
    piece: u32,
    within: u64,
}

impl Cursor {
    /// The position `offset` bytes into `range`.
    pub fn at(range: &PieceRange, offset: u64) -> Cursor {
        let mut cursor = Cursor::default();
        cursor.advance(range, offset);
        cursor
    }

    /// Goes `n` bytes further, which must be there.
    pub fn advance(&mut self, range: &PieceRange, n: u64) {
        let pieces = range.pieces();
        self.within += n;
        while let Some(piece) = pieces.get(self.piece as usize)
            && self.within >= piece.len
        {
            self.within -= piece.len;
            self.piece += 1;
        }
        assert!(
            self.within == 0 || (self.piece as usize) < pieces.len(),
            "a position lies inside its pieces"
        );
    }

    /// The address of the next bytes, and how many of at most `limit` lie there in a row.
    pub fn chunk(&self, memory: &Memory, run: RunId, range: &PieceRange, limit: usize) -> (*mut u8, usize) {
        let piece = &range.pieces()[self.piece as usize];
        let n = (piece.len - self.within).min(limit as u64) as usize;
        let address = memory.address(run, piece);
        // SAFETY: `within` < `piece.len`, and Memory::address has checked that the piece lies in its region.
        (unsafe { address.add(self.within as usize) }, n)
    }

    /// The region in which the next bytes lie.
    pub fn region(&self, range: &PieceRange) -> u32 {
        range.pieces()[self.piece as usize].region
    }

    /// Appends the next `len` bytes to `parts` as slices, as far as there is room; returns how many bytes they are.
    pub fn gather<'a>(
        mut self,
        memory: &'a Memory,
        run: RunId,
        range: &PieceRange,
        len: usize,
        parts: &mut [IoSlice<'a>],
    ) -> (usize, usize) {
        let (mut bytes, mut used) = (0, 0);
        while bytes < len && used < parts.len() {
            let (address, n) = self.chunk(memory, run, range, len - bytes);
            // SAFETY: the region's maker keeps these bytes alive and unwritten while the run lives, and the
            // slices end with the call of Pipe::write, within which nothing else touches the run's memory.
            parts[used] = IoSlice::new(unsafe { std::slice::from_raw_parts(address, n) });
            self.advance(range, n as u64);
            bytes += n;
            used += 1;
        }
        (used, bytes)
    }

    /// Takes the next `len` bytes into a checksum.
    pub fn sum(mut self, memory: &Memory, run: RunId, range: &PieceRange, len: usize, sum: &mut Checksum) {
        let mut done = 0;
        while done < len {
            let (address, n) = self.chunk(memory, run, range, len - done);
            // SAFETY: as in `gather`, for the length of this call.
            sum.update(unsafe { std::slice::from_raw_parts(address, n) });
            self.advance(range, n as u64);
            done += n;
        }
    }

    /// Copies the next bytes out.
    pub fn copy(mut self, memory: &Memory, run: RunId, range: &PieceRange, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let (address, n) = self.chunk(memory, run, range, out.len() - done);
            // SAFETY: as in `gather`, for the length of this copy; `out` is the flow's own memory.
            unsafe { std::ptr::copy_nonoverlapping(address, out[done..].as_mut_ptr(), n) };
            self.advance(range, n as u64);
            done += n;
        }
    }
}

/// Where received bytes go.
#[derive(Debug)]
pub struct Target {
    pub dst: PieceRange,
    pub combine: Option<Combine>,
}

/// How received bytes are combined with what is here.
#[derive(Debug)]
pub struct Combine {
    pub with: PieceRange,
    pub reduction: Reduction,
    pub incoming_first: bool,
}

/// A position in a target.
#[derive(Clone, Copy, Default, Debug)]
pub struct TargetCursor {
    dst: Cursor,
    with: Cursor,
}

impl TargetCursor {
    pub fn at(target: &Target, offset: u64) -> TargetCursor {
        TargetCursor {
            dst: Cursor::at(&target.dst, offset),
            with: target.combine.as_ref().map_or(Cursor::default(), |c| Cursor::at(&c.with, offset)),
        }
    }

    /// Takes up to `limit` bytes of the message from `pipe`, and says how many. 0: nothing can be done yet. What
    /// is taken goes into `sum`, too.
    pub fn take(
        &mut self,
        target: &Target,
        pipe: &mut dyn Pipe,
        memory: &Memory,
        run: RunId,
        limit: usize,
        sum: Option<&mut Checksum>,
    ) -> Result<usize, Cause> {
        if target.combine.is_some() {
            let shown = pipe.peek()?;
            let n = shown.len().min(limit).min(REDUCE_BYTES);
            let n = self.put(target, &shown[..n], memory, run);
            if let Some(sum) = sum {
                sum.update(&shown[..n]);
            }
            pipe.consume(n);
            return Ok(n);
        }
        let (address, n) = self.dst.chunk(memory, run, &target.dst, limit);
        // SAFETY: the region's maker gives these bytes to this run alone while it lives; the slice ends here.
        let into = unsafe { std::slice::from_raw_parts_mut(address, n) };
        let n = pipe.read(into)?;
        if let Some(sum) = sum {
            sum.update(&into[..n]);
        }
        self.dst.advance(&target.dst, n as u64);
        Ok(n)
    }

    /// Puts the next `bytes` of the message where they belong, and says how many were taken: of a reduction
    /// only whole elements.
    pub fn put(&mut self, target: &Target, bytes: &[u8], memory: &Memory, run: RunId) -> usize {
        let size = target.combine.as_ref().map_or(1, |c| c.reduction.dtype.size());
        let whole = bytes.len() - bytes.len() % size;
        let mut done = 0;
        while done < whole {
            let (dst, mut n) = self.dst.chunk(memory, run, &target.dst, whole - done);
            let incoming = bytes[done..].as_ptr();
            match &target.combine {
                // SAFETY: `n` bytes are there on both sides; `bytes` is a pipe's or the landing's memory, which
                // never overlaps a run's.
                None => unsafe { std::ptr::copy_nonoverlapping(incoming, dst, n) },
                Some(c) => {
                    let (with, m) = self.with.chunk(memory, run, &c.with, n);
                    n = m;
                    let with = with.cast_const();
                    let (a, b) = if c.incoming_first { (incoming, with) } else { (with, incoming) };
                    // SAFETY: `n` bytes are there behind all three addresses, `n` is a multiple of the element
                    // (pieces of a reduction are, which post has checked), and `with` is `dst` or apart from it.
                    unsafe { host::reduce(c.reduction, dst, a, b, n) };
                    self.with.advance(&c.with, n as u64);
                }
            }
            self.dst.advance(&target.dst, n as u64);
            done += n;
        }
        whole
    }
}
