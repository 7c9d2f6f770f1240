//! Orders as launches. An order's operands are lists of pieces, cut at different places; each common run of
//! bytes becomes a row of addresses, and all rows of an order (hundreds of tensors) are one launch.
#![forbid(unsafe_code)]

use super::launch::{CHUNK, FOLD, Head, Kernel, Last, Launch, PARTS, PRODUCTS_BYTES, TABLE_WORDS_MAX};
use crate::device::host::oracle;
use crate::device::host::walk::Position;
use crate::device::{DeviceOrder, Finish, Reduction};
use crate::memory::{Memory, PieceRange, RunId};
use crate::types::{DType, ReduceOp};
use std::borrow::Borrow;

/// The launches of one order, in the order in which a stream takes them. Kept and used again.
#[derive(Default, Debug)]
pub struct Plan {
    launches: Vec<Launch>,
    words: Vec<u64>,
    /// Where in each source a walk stands.
    positions: Vec<Position>,
}

/// Bytes of scratch that the launches of an order need.
#[must_use]
pub fn scratch_bytes(order: &DeviceOrder) -> u64 {
    let DeviceOrder::Combine { dst, dtype, .. } = order else { return 0 };
    let tensors = dst.pieces().iter().map(|piece| piece.len / dtype.size() as u64);
    let mut counts: Vec<u64> = tensors.map(leaves).collect();
    let mut sums = counts.iter().sum::<u64>();
    for _ in 0..passes(&counts) {
        counts.iter_mut().for_each(|count| *count = count.div_ceil(FOLD));
        sums += counts.iter().sum::<u64>();
    }
    sums * PRODUCTS_BYTES
}

/// Sums that a tensor's scalar products begin with.
fn leaves(elements: u64) -> u64 {
    elements.div_ceil(CHUNK) * PARTS
}

/// How often sums are merged until each tensor has one.
fn passes(counts: &[u64]) -> u32 {
    let mut most = counts.iter().copied().max().unwrap_or(1);
    let mut passes = 0;
    while most > 1 {
        most = most.div_ceil(FOLD);
        passes += 1;
    }
    passes
}

impl Plan {
    /// The launches, and the words that their rows lie in.
    #[must_use]
    pub fn launches(&self) -> (&[Launch], &[u64]) {
        (&self.launches, &self.words)
    }

    /// Forgets everything but its capacity.
    pub fn clear(&mut self) {
        self.launches.clear();
        self.words.clear();
    }

    /// Adds the launches of an order. `scratch` is the address of [`scratch_bytes`] bytes that nobody else uses.
    pub fn lower(&mut self, order: &DeviceOrder, run: RunId, memory: &Memory, scratch: u64) {
        let at = (run, memory);
        match order {
            DeviceOrder::Copy { dst, src } => self.copy(at, dst, src),
            DeviceOrder::Scale { dst, src, factor: 1.0, .. } => self.copy(at, dst, src),
            DeviceOrder::Scale { dst, src, dtype, factor } => {
                let head = Head::new(1).with_last(Last::Multiply(*factor));
                self.rows(at, Kernel::Map(*dtype), head, dst, &[src]);
            }
            DeviceOrder::Reduce { dst, a, b, reduction } => {
                let kernel = Kernel::Reduce(combining(*reduction));
                self.rows(at, kernel, Head::new(2), dst, &[a, b]);
            }
            DeviceOrder::ReduceMany { dst, srcs, reduction, pre, finish } => {
                let reduction = combining(*reduction);
                let (kernel, mut head) = match srcs.len() {
                    // Two operands come to the same bits with half the code.
                    2 if *pre == 1.0 && finish.is_identity() => (Kernel::Reduce(reduction), Head::new(2)),
                    count => (Kernel::ReduceMany(reduction), Head::new(count as u32)),
                };
                head.pre = *pre;
                self.rows(at, kernel, head.with_last(Last::new(reduction.dtype, *finish)), dst, srcs);
            }
            DeviceOrder::Combine { dst, a, b, dtype } => self.combine(at, *dtype, [dst, a, b], scratch),
            DeviceOrder::Finish { dst, dtype, finish } => self.finish(at, *dtype, dst, *finish),
            DeviceOrder::Identity { dst, reduction } => self.identity(at, *reduction, dst),
        }
    }

    /// Adds a conversion, with a factor, of the elements of `src`. Both hold equally many, in runs of the same
    /// lengths (`(dst, src, elements)`): a pack or an unpack whose memory has another type than the tensors.
    pub fn convert(
        &mut self,
        from: DType,
        to: DType,
        factor: f64,
        runs: impl IntoIterator<Item = (u64, u64, u64)>,
    ) {
        let last = if factor == 1.0 { Last::Nothing } else { Last::Multiply(factor) };
        let kernel = if from == to { Kernel::Map(from) } else { Kernel::Cast { from, to } };
        self.begin(kernel, Head::new(1).with_last(last));
        for (dst, src, elements) in runs {
            self.row(elements, dst, &[src]);
        }
        self.end();
    }

    fn copy(&mut self, at: (RunId, &Memory), dst: &PieceRange, src: &PieceRange) {
        self.rows(at, Kernel::Copy, Head::new(1), dst, &[src]);
    }

    fn finish(&mut self, at: (RunId, &Memory), dtype: DType, dst: &PieceRange, finish: Finish) {
        if !finish.is_identity() {
            let head = Head::new(1).with_last(Last::new(dtype, finish));
            self.rows(at, Kernel::Map(dtype), head, dst, &[dst]);
        }
    }

    fn identity(&mut self, at: (RunId, &Memory), reduction: Reduction, dst: &PieceRange) {
        let element = oracle::identity(reduction.op, reduction.dtype);
        let mut head = Head::new(0);
        for (byte, value) in head.pattern.iter_mut().zip(element.iter().cycle()) {
            *byte = *value;
        }
        self.rows::<&PieceRange>(at, Kernel::Fill, head, dst, &[]);
    }

    fn combine(&mut self, at: (RunId, &Memory), dtype: DType, ranges: [&PieceRange; 3], scratch: u64) {
        let (run, memory) = at;
        let [dst, a, b] = ranges.map(PieceRange::pieces);
        assert!(dst.len() == a.len() && dst.len() == b.len(), "Adasum's operands are the same tensors");
        let address = |piece| memory.address(run, piece).addr() as u64;
        let elements = |tensor: usize| dst[tensor].len / dtype.size() as u64;

        let mut counts: Vec<u64> = (0..dst.len()).map(|tensor| leaves(elements(tensor))).collect();
        let mut from = scratch;
        self.begin(Kernel::Dots(dtype), Head::new(2));
        let mut sums = from;
        for (tensor, count) in counts.iter().enumerate() {
            assert!(
                dst[tensor].len == a[tensor].len && dst[tensor].len == b[tensor].len,
                "Adasum's operands are whole tensors"
            );
            self.row(elements(tensor), sums, &[address(&a[tensor]), address(&b[tensor])]);
            sums += count * PRODUCTS_BYTES;
        }
        self.end();
        for _ in 0..passes(&counts) {
            self.begin(Kernel::Fold, Head::new(1));
            let (mut read, mut write) = (from, sums);
            from = sums;
            for count in &mut counts {
                self.row(*count, write, &[read]);
                read += *count * PRODUCTS_BYTES;
                *count = count.div_ceil(FOLD);
                write += *count * PRODUCTS_BYTES;
            }
            sums = write;
            self.end();
        }
        self.begin(Kernel::Combine(dtype), Head::new(3));
        for tensor in 0..dst.len() {
            let products = from + tensor as u64 * PRODUCTS_BYTES;
            let sources = [address(&a[tensor]), address(&b[tensor]), products];
            self.row(elements(tensor), address(&dst[tensor]), &sources);
        }
        self.end();
    }

    /// One launch over all common runs of the operands.
    fn rows<R: Borrow<PieceRange>>(
        &mut self,
        at: (RunId, &Memory),
        kernel: Kernel,
        head: Head,
        dst: &PieceRange,
        srcs: &[R],
    ) {
        let (run, memory) = at;
        let element = kernel.element_bytes() as u64;
        let mut positions = std::mem::take(&mut self.positions);
        positions.clear();
        positions.resize(srcs.len(), Position::default());
        self.begin(kernel, head);
        let (pieces, mut position) = (dst.pieces(), Position::default());
        while let Some(left) = position.left(pieces) {
            let mut len = left;
            for (src, position) in srcs.iter().zip(&positions) {
                let left = position.left(src.borrow().pieces()).expect("operands hold equally many bytes");
                len = len.min(left);
            }
            assert!(len > 0 && len.is_multiple_of(element), "a piece holds whole elements");
            let dst = position.take(pieces, len, memory, run).addr() as u64;
            self.start_row(len / element, dst);
            for (src, position) in srcs.iter().zip(&mut positions) {
                let src = position.take(src.borrow().pieces(), len, memory, run).addr() as u64;
                self.words.push(src);
            }
            let unchanged = kernel == Kernel::Copy && self.words.last() == Some(&dst);
            if unchanged {
                self.drop_row();
            }
        }
        let finished = srcs.iter().zip(&positions).all(|(src, p)| p.left(src.borrow().pieces()).is_none());
        assert!(finished, "operands hold equally many bytes");
        self.positions = positions;
        self.end();
    }

    /// Starts a launch.
    fn begin(&mut self, kernel: Kernel, head: Head) {
        let start = self.words.len();
        self.launches.push(Launch { kernel, head, words: start..start });
    }

    fn row(&mut self, elements: u64, dst: u64, srcs: &[u64]) {
        assert!(elements > 0, "no piece is empty");
        self.start_row(elements, dst);
        self.words.extend_from_slice(srcs);
    }

    /// A row's first words: the tiles up to its end, its elements and what is written.
    fn start_row(&mut self, elements: u64, dst: u64) {
        let Launch { kernel, head, words } = self.launches.last().expect("a launch was begun");
        let (kernel, mut head, start) = (*kernel, *head, words.start);
        let stride = 3 + head.sources as usize;
        if self.words.len() - start + stride > TABLE_WORDS_MAX {
            self.close();
            (head.tiles, head.rows) = (0, 0);
            self.begin(kernel, head);
        }
        let head = &mut self.launches.last_mut().expect("a launch was begun").head;
        head.tiles += elements.div_ceil(kernel.tile_elements());
        head.rows += 1;
        self.words.extend([head.tiles, elements, dst]);
    }

    /// Takes the newest row back.
    fn drop_row(&mut self) {
        let launch = self.launches.last_mut().expect("a row was begun");
        let stride = 3 + launch.head.sources as usize;
        self.words.truncate(self.words.len() - stride);
        launch.head.rows -= 1;
        let before = self.words[launch.words.start..].len();
        launch.head.tiles = if before == 0 { 0 } else { self.words[self.words.len() - stride] };
    }

    fn close(&mut self) {
        let end = self.words.len();
        self.launches.last_mut().expect("a launch was begun").words.end = end;
    }

    /// Ends a launch; one without rows is none.
    fn end(&mut self) {
        self.close();
        let last = self.launches.last().expect("a launch was begun");
        if last.head.rows == 0 {
            self.launches.pop();
        }
    }
}

/// Average combines as Sum; its division is the finish.
fn combining(reduction: Reduction) -> Reduction {
    match reduction.op {
        ReduceOp::Average if reduction.dtype != DType::Bool => Reduction { op: ReduceOp::Sum, ..reduction },
        _ => reduction,
    }
}
