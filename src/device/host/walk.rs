//! Several lists of pieces, cut at different places, walked in lock step.
#![forbid(unsafe_code)]

use crate::memory::{Memory, Piece, PieceRange, RunId};

/// How far a list of pieces has been walked.
#[derive(Clone, Copy, Default, Debug)]
pub(in crate::device) struct Position {
    /// The piece.
    piece: usize,
    /// Bytes of it that are done.
    done: u64,
}

impl Position {
    /// Bytes left in the current piece; none at the end of the list.
    pub(in crate::device) fn left(&self, pieces: &[Piece]) -> Option<u64> {
        pieces.get(self.piece).map(|piece| piece.len - self.done)
    }

    /// The address of the next `len` bytes, which must be left in the current piece; moves past them.
    pub(in crate::device) fn take(
        &mut self,
        pieces: &[Piece],
        len: u64,
        memory: &Memory,
        run: RunId,
    ) -> *mut u8 {
        let piece = &pieces[self.piece];
        let address =
            memory.address(run, &Piece { region: piece.region, offset: piece.offset + self.done, len });
        self.done += len;
        if self.done == piece.len {
            *self = Position { piece: self.piece + 1, done: 0 };
        }
        address
    }
}

/// Calls `f` with the addresses and the length of each longest run of bytes that is in one piece of every
/// range.
pub(super) fn walk<const N: usize>(
    memory: &Memory,
    run: RunId,
    ranges: [&PieceRange; N],
    mut f: impl FnMut([*mut u8; N], usize),
) {
    let lists = ranges.map(PieceRange::pieces);
    let mut positions = [Position::default(); N];
    loop {
        let lefts: [Option<u64>; N] = std::array::from_fn(|i| positions[i].left(lists[i]));
        let Some(len) = lefts.iter().flatten().copied().min() else { return };
        assert!(lefts.iter().all(Option::is_some), "operands hold equally many bytes");
        assert!(len > 0, "no piece is empty");
        let addresses = std::array::from_fn(|i| positions[i].take(lists[i], len, memory, run));
        f(addresses, len as usize);
    }
}
