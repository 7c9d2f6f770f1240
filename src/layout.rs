//! Which bytes of which tensors a chunk stands for. Fusion is a layout, not a buffer: a batch of many
//! tensors is a list of extents, and schedules never learn of it.
//!
//! Each chunk of the input and the output is a list of *extents* (runs of bytes of one region). A *window*
//! is the same share of every chunk, cut at multiples of [`UNIT`] bytes, so that all windows can run the same
//! schedule side by side.
#![forbid(unsafe_code)]

use crate::schedule::{Space, Span};
use std::ops::Range;

/// Windows and even chunks are cut at multiples of this many bytes: a cache line, and a multiple of every
/// element's size.
pub const UNIT: u64 = 64;

/// Some bytes of one region of a run (input `i` is region `2 i`, output `i` is region `2 i + 1`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Which region.
    pub region: u32,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The region of tensor `i`'s input.
#[must_use]
pub fn input_region(tensor: usize) -> u32 {
    2 * tensor as u32
}

/// The region of tensor `i`'s output.
#[must_use]
pub fn output_region(tensor: usize) -> u32 {
    2 * tensor as u32 + 1
}

/// The region of the scratch memory of a batch of `tensors`.
#[must_use]
pub fn scratch_region(tensors: usize) -> u32 {
    2 * tensors as u32
}

/// Where every chunk of a batch lies.
#[derive(Clone, Debug)]
pub struct Layout {
    input: Vec<Vec<Extent>>,
    output: Vec<Vec<Extent>>,
    /// The length of each chunk: that of its input or its output, whichever exists here.
    lengths: Vec<u64>,
    tensors: usize,
    /// Scratch is cut where the data is cut, so that each piece is one tensor (Adasum).
    cut_scratch: bool,
}

impl Layout {
    /// Tensors laid end to end and cut into `chunks` even chunks; input and output alike (allreduce, reduce,
    /// broadcast). `bytes` holds each tensor's length.
    #[must_use]
    pub fn even(bytes: &[u64], chunks: u32, cut_scratch: bool) -> Layout {
        let total: u64 = bytes.iter().sum();
        let mut input = Vec::with_capacity(chunks as usize);
        let mut output = Vec::with_capacity(chunks as usize);
        let mut lengths = Vec::with_capacity(chunks as usize);
        let mut walk = Walk { bytes, tensor: 0, offset: 0 };
        for chunk in 0..chunks {
            let range = share(total, chunk, chunks);
            lengths.push(range.end - range.start);
            let extents: Vec<Extent> = walk.take(range.end - range.start);
            output.push(extents.iter().map(|e| Extent { region: e.region + 1, ..*e }).collect());
            input.push(extents);
        }
        Layout { input, output, lengths, tensors: bytes.len(), cut_scratch }
    }

    /// One chunk per member, given as lists of extents; a chunk that does not exist on this side is empty.
    /// `lengths` holds the length of every chunk, also of those that exist only elsewhere.
    #[must_use]
    pub fn blocks(
        input: Vec<Vec<Extent>>,
        output: Vec<Vec<Extent>>,
        lengths: Vec<u64>,
        tensors: usize,
    ) -> Layout {
        assert_eq!(input.len(), lengths.len(), "one input list per chunk");
        assert_eq!(output.len(), lengths.len(), "one output list per chunk");
        Layout { input, output, lengths, tensors, cut_scratch: false }
    }

    /// Chunks.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.lengths.len() as u32
    }

    /// The longest chunk.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// The distance between two chunks of scratch, for `windows` windows.
    #[must_use]
    pub fn scratch_stride(&self, windows: u32) -> u64 {
        self.longest().div_ceil(UNIT).div_ceil(u64::from(windows)) * UNIT
    }

    /// Appends the extents of a span in one window. `slot` says which copy of the scratch the window uses,
    /// `scratch_chunks` how many chunks a copy has.
    pub fn resolve(&self, span: &Span, cut: Cut, into: &mut Vec<Extent>) {
        for (i, chunk) in span.chunks.clone().enumerate() {
            let like = span.of as usize + i;
            match span.space {
                Space::Input => window_of(&self.input[chunk as usize], cut, into),
                Space::Output => window_of(&self.output[chunk as usize], cut, into),
                Space::Scratch => self.resolve_scratch(chunk, like, cut, into),
            }
        }
    }

    fn resolve_scratch(&self, chunk: u32, like: usize, cut: Cut, into: &mut Vec<Extent>) {
        let stride = self.scratch_stride(cut.windows);
        let base = (u64::from(cut.slot) * u64::from(cut.scratch_chunks) + u64::from(chunk)) * stride;
        let region = scratch_region(self.tensors);
        if !self.cut_scratch {
            let range = share(self.lengths[like], cut.window, cut.windows);
            push(into, Extent { region, offset: base, len: range.end - range.start });
            return;
        }
        assert_eq!(cut.windows, 1, "scratch that is cut by tensors has one window");
        let mut offset = base;
        for extent in &self.output[like] {
            into.push(Extent { region, offset, len: extent.len });
            offset += extent.len;
        }
    }
}

/// Which window, of how many, and where its scratch is.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// The window.
    pub window: u32,
    /// Windows in all.
    pub windows: u32,
    /// Which copy of the scratch the window uses.
    pub slot: u32,
    /// Chunks in one copy of the scratch.
    pub scratch_chunks: u32,
}

/// The `i`-th of `n` nearly equal shares of `len` bytes, cut at multiples of [`UNIT`].
#[must_use]
pub fn share(len: u64, i: u32, n: u32) -> Range<u64> {
    let units = len.div_ceil(UNIT);
    let at = |k: u32| ((u128::from(units) * u128::from(k) / u128::from(n)) as u64 * UNIT).min(len);
    at(i)..at(i + 1)
}

/// Rows of member `m` when `rows` are dealt to `n` members: the lower members get one more.
#[must_use]
pub fn dealt_rows(rows: u64, m: u64, n: u64) -> Range<u64> {
    let (each, more) = (rows / n, rows % n);
    let start = m * each + m.min(more);
    start..start + each + u64::from(m < more)
}

/// Appends one window's share of a chunk.
fn window_of(extents: &[Extent], cut: Cut, into: &mut Vec<Extent>) {
    let len = extents.iter().map(|e| e.len).sum();
    let range = share(len, cut.window, cut.windows);
    let mut position = 0;
    for extent in extents {
        let start = range.start.max(position);
        let end = range.end.min(position + extent.len);
        if start < end {
            push(
                into,
                Extent { region: extent.region, offset: extent.offset + start - position, len: end - start },
            );
        }
        position += extent.len;
    }
}

/// Appends an extent unless it is empty.
fn push(into: &mut Vec<Extent>, extent: Extent) {
    if extent.len > 0 {
        into.push(extent);
    }
}

/// Walks over tensors laid end to end.
struct Walk<'a> {
    bytes: &'a [u64],
    tensor: usize,
    offset: u64,
}

impl Walk<'_> {
    fn take(&mut self, mut len: u64) -> Vec<Extent> {
        let mut extents = Vec::new();
        while len > 0 {
            let here = (self.bytes[self.tensor] - self.offset).min(len);
            push(&mut extents, Extent { region: input_region(self.tensor), offset: self.offset, len: here });
            self.offset += here;
            len -= here;
            if self.offset == self.bytes[self.tensor] {
                self.tensor += 1;
                self.offset = 0;
            }
        }
        extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(window: u32, windows: u32) -> Cut {
        Cut { window, windows, slot: 0, scratch_chunks: 1 }
    }

    proptest! {
        /// All windows of all chunks together are every byte of every tensor, exactly once.
        #[test]
        fn every_byte_once(bytes in prop::collection::vec(0u64..5000, 1..9), chunks in 1u32..9, windows in 1u32..6) {
            let layout = Layout::even(&bytes, chunks, false);
            let mut seen: Vec<Vec<u8>> = bytes.iter().map(|&b| vec![0; b as usize]).collect();
            for chunk in 0..chunks {
                for window in 0..windows {
                    let mut extents = Vec::new();
                    let span = Span { space: Space::Output, chunks: chunk..chunk + 1, of: chunk };
                    layout.resolve(&span, cut(window, windows), &mut extents);
                    let mut scratch = Vec::new();
                    let span = Span { space: Space::Scratch, chunks: 0..1, of: chunk };
                    layout.resolve(&span, cut(window, windows), &mut scratch);
                    let len: u64 = extents.iter().map(|e| e.len).sum();
                    prop_assert_eq!(len, scratch.iter().map(|e| e.len).sum::<u64>());
                    prop_assert!(len <= layout.scratch_stride(windows));
                    for extent in extents {
                        prop_assert_eq!(extent.region % 2, 1);
                        for byte in extent.offset..extent.offset + extent.len {
                            seen[extent.region as usize / 2][byte as usize] += 1;
                        }
                    }
                }
            }
            prop_assert!(seen.iter().flatten().all(|&n| n == 1));
        }
    }

    #[test]
    fn lower_members_get_one_row_more() {
        let rows: Vec<_> = (0..4).map(|m| dealt_rows(10, m, 4)).collect();
        assert_eq!(rows, [0..3, 3..6, 6..8, 8..10]);
    }

    #[test]
    fn lengths_beyond_32_bits_are_cut_without_loss() {
        let bytes = [(1u64 << 31) + 5, 0, (1 << 33) + 3, 7];
        let total: u64 = bytes.iter().sum();
        for (chunks, windows) in [(1, 1), (2, 3), (3, 2051), (8, 5)] {
            let layout = Layout::even(&bytes, chunks, false);
            let mut next = vec![0u64; bytes.len()];
            let mut seen = 0;
            for chunk in 0..chunks {
                let mut extents = Vec::new();
                for window in 0..windows {
                    let span = Span { space: Space::Input, chunks: chunk..chunk + 1, of: 0 };
                    layout.resolve(&span, cut(window, windows), &mut extents);
                }
                for extent in extents {
                    let tensor = extent.region as usize / 2;
                    assert_eq!(extent.offset, next[tensor], "{chunks} chunks, {windows} windows");
                    next[tensor] += extent.len;
                    seen += extent.len;
                }
            }
            assert_eq!(seen, total);
            assert_eq!(next, bytes);
        }
        assert_eq!(dealt_rows((1 << 33) + 1, 0, 2), 0..(1 << 32) + 1);
    }

    #[test]
    fn scratch_of_adasum_is_cut_by_tensors() {
        let layout = Layout::even(&[8, 0, 24], 1, true);
        let mut extents = Vec::new();
        layout.resolve(&Span { space: Space::Scratch, chunks: 0..1, of: 0 }, cut(0, 1), &mut extents);
        assert_eq!(extents.iter().map(|e| (e.offset, e.len)).collect::<Vec<_>>(), [(0, 8), (8, 24)]);
    }
}
