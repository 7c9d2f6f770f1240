//! What a kernel is launched with: its name, and its arguments as `kernels/form.cuh` declares them.
#![forbid(unsafe_code)]

use super::table;
use crate::device::{Finish, Reduction};
use crate::types::{DType, ReduceOp};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Words of the table of rows that travel with a launch.
pub const INLINE_WORDS: usize = 384;
/// Words of the longest table; what needs more rows takes several launches. One row fits, however many
/// operands it has.
pub const TABLE_WORDS_MAX: usize = 1 << 18;
const _: () = assert!(crate::limits::RANKS_MAX + 3 <= TABLE_WORDS_MAX);

/// Units (of vectors) of a tile.
const TILE_UNITS: u64 = 1024;
/// Elements of a chunk of a scalar product.
pub(super) const CHUNK: u64 = 1024;
/// Sums of a chunk.
pub(super) const PARTS: u64 = 8;
/// Sums that are merged at a time.
pub(super) const FOLD: u64 = 32;
/// Bytes of one sum: a·b, a·a, b·b.
pub(super) const PRODUCTS_BYTES: u64 = 24;

/// A kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kernel {
    /// Bytes as they are.
    Copy,
    /// A pattern over and over.
    Fill,
    /// Scale, or what is done last to a sum.
    Map(DType),
    /// Conversion, with a factor.
    Cast {
        /// The type that is read.
        from: DType,
        /// The type that is written.
        to: DType,
    },
    /// Two operands.
    Reduce(Reduction),
    /// Many operands in the canonical tree.
    ReduceMany(Reduction),
    /// The leaves of Adasum's scalar products.
    Dots(DType),
    /// Merges neighbouring sums.
    Fold,
    /// Adasum's weighted sum.
    Combine(DType),
}

/// A source file compiled with one definition; the driver loads it when one of its kernels is first used.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Module {
    /// `copy.cu`.
    Copy,
    /// `map.cu`.
    Map,
    /// `adasum.cu`.
    Adasum,
    /// `reduce.cu` for one type.
    Reduce(DType),
}

impl Module {
    /// Every module.
    pub fn all() -> impl Iterator<Item = Module> {
        let reductions = DType::ALL.iter().map(|&dtype| Module::Reduce(dtype));
        [Module::Copy, Module::Map, Module::Adasum].into_iter().chain(reductions)
    }
    /// The name of its file in `kernels/ptx`, without the ending.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Module::Reduce(dtype) => format!("reduce_{dtype:?}"),
            other => other.source().trim_end_matches(".cu").to_owned(),
        }
    }
    /// The file in `kernels` that it is made from.
    #[must_use]
    pub fn source(self) -> &'static str {
        match self {
            Module::Copy => "copy.cu",
            Module::Map => "map.cu",
            Module::Adasum => "adasum.cu",
            Module::Reduce(_) => "reduce.cu",
        }
    }
    /// What is defined while it is compiled.
    #[must_use]
    pub fn definition(self) -> Option<String> {
        match self {
            Module::Reduce(dtype) => Some(format!("MODULE_{dtype:?}")),
            _ => None,
        }
    }
}

impl Kernel {
    /// Every kernel, as the table has them.
    #[must_use]
    pub fn all() -> Vec<Kernel> {
        let mut all = vec![Kernel::Copy, Kernel::Fill, Kernel::Fold];
        all.extend(table::types("ELEMENT").map(|(dtype, _)| Kernel::Map(dtype)));
        all.extend(table::casts().map(|(from, to)| Kernel::Cast { from, to }));
        for (dtype, _) in table::types("REAL") {
            all.extend([Kernel::Dots(dtype), Kernel::Combine(dtype)]);
        }
        for table::Row { dtype, op, .. } in table::reductions() {
            let reduction = Reduction { dtype, op };
            all.extend([Kernel::Reduce(reduction), Kernel::ReduceMany(reduction)]);
        }
        all
    }
    /// Its name in the module.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Kernel::Copy => "copy".to_owned(),
            Kernel::Fill => "fill".to_owned(),
            Kernel::Fold => "fold".to_owned(),
            Kernel::Map(dtype) => format!("map_{dtype:?}"),
            Kernel::Cast { from, to } => format!("cast_{from:?}_{to:?}"),
            Kernel::Reduce(Reduction { dtype, op }) => format!("reduce_{dtype:?}_{op:?}"),
            Kernel::ReduceMany(Reduction { dtype, op }) => format!("reduce_many_{dtype:?}_{op:?}"),
            Kernel::Dots(dtype) => format!("dots_{dtype:?}"),
            Kernel::Combine(dtype) => format!("combine_{dtype:?}"),
        }
    }
    /// The module that it is in.
    #[must_use]
    pub fn module(self) -> Module {
        match self {
            Kernel::Copy | Kernel::Fill => Module::Copy,
            Kernel::Map(_) | Kernel::Cast { .. } => Module::Map,
            Kernel::Dots(_) | Kernel::Fold | Kernel::Combine(_) => Module::Adasum,
            Kernel::Reduce(reduction) | Kernel::ReduceMany(reduction) => Module::Reduce(reduction.dtype),
        }
    }
    /// Bytes of one of the elements that its rows are counted in.
    #[must_use]
    pub(super) fn element_bytes(self) -> usize {
        match self {
            Kernel::Copy | Kernel::Fill => 1,
            Kernel::Fold => PRODUCTS_BYTES as usize,
            Kernel::Map(dtype) => part_bytes(Reduction { dtype, op: ReduceOp::Sum }),
            Kernel::Cast { from, to } => from.size().min(to.size()),
            Kernel::Reduce(reduction) | Kernel::ReduceMany(reduction) => part_bytes(reduction),
            Kernel::Dots(dtype) | Kernel::Combine(dtype) => dtype.size(),
        }
    }
    /// Elements of one tile.
    #[must_use]
    pub(super) fn tile_elements(self) -> u64 {
        match self {
            Kernel::Dots(_) => u64::from(THREADS) / PARTS * CHUNK,
            Kernel::Fold => u64::from(THREADS) * FOLD,
            other => TILE_UNITS * 16 / other.element_bytes() as u64,
        }
    }
}

/// Bytes of one element as kernels count them: complex numbers are two, but for a product.
pub(super) fn part_bytes(reduction: Reduction) -> usize {
    let parts = if reduction.dtype.is_complex() && reduction.op != ReduceOp::Product { 2 } else { 1 };
    reduction.dtype.size() / parts
}

/// What is done last, made ready for a kernel.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) enum Last {
    #[default]
    Nothing,
    Multiply(f64),
    Divide(u32),
    Shift(u32),
    MultiplyDivide(f64, f64),
}

impl Last {
    /// As the host device does it.
    pub(super) fn new(dtype: DType, finish: Finish) -> Last {
        let Finish { divisor, post } = finish;
        assert!(divisor > 0, "a reduction has at least one operand");
        if finish.is_identity() {
            Last::Nothing
        } else if !dtype.is_integer() {
            Last::Multiply(post / f64::from(divisor))
        } else if post != 1.0 {
            Last::MultiplyDivide(post, f64::from(divisor))
        } else if divisor.is_power_of_two() {
            Last::Shift(divisor.ilog2())
        } else {
            Last::Divide(divisor)
        }
    }
}

/// The arguments of every kernel but its table of rows: the head of `Args` in `kernels/form.cuh`.
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Head {
    /// Tiles of all rows.
    pub tiles: u64,
    /// The address of the table, or 0 where it travels with the launch.
    pub table: u64,
    /// Rows of the table.
    pub rows: u32,
    /// Addresses in a row beside the first.
    pub sources: u32,
    /// What operands are multiplied with first.
    pub pre: f64,
    /// What is done last.
    pub last: u32,
    /// Its divisor or its shift.
    pub last_integer: u32,
    /// Its factor.
    pub last_factor: f64,
    /// Its divisor.
    pub last_divisor: f64,
    /// What is repeated.
    pub pattern: [u8; 16],
}

impl Head {
    pub(super) fn new(sources: u32) -> Head {
        Head { sources, pre: 1.0, ..Head::zeroed() }
    }

    pub(super) fn with_last(self, last: Last) -> Head {
        let (last, last_integer, last_factor, last_divisor) = match last {
            Last::Nothing => (0, 0, 1.0, 1.0),
            Last::Multiply(factor) => (1, 0, factor, 1.0),
            Last::Divide(divisor) => (2, divisor, 1.0, 1.0),
            Last::Shift(bits) => (3, bits, 1.0, 1.0),
            Last::MultiplyDivide(post, divisor) => (4, 0, post, divisor),
        };
        Head { last, last_integer, last_factor, last_divisor, ..self }
    }
}

/// All that a kernel is told.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Args {
    /// All but the rows.
    pub head: Head,
    /// The rows, where they fit.
    pub inlined: [u64; INLINE_WORDS],
}

// A launch's parameters are 4096 bytes on every device.
const _: () = assert!(size_of::<Args>() <= 4096 && size_of::<Head>() == 72);

/// One launch of a plan.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What is launched.
    pub kernel: Kernel,
    /// Its arguments.
    pub head: Head,
    /// Its rows, in the plan's words.
    pub words: Range<usize>,
}

impl Launch {
    /// Whether the rows travel with the launch.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        self.words.len() <= INLINE_WORDS
    }

    /// The arguments: with the rows in them, or with the address to which the caller copied the rows.
    #[must_use]
    pub fn args(&self, words: &[u64], table: u64) -> Args {
        let mut args = Args { head: self.head, inlined: [0; INLINE_WORDS] };
        if self.is_inline() {
            args.inlined[..self.words.len()].copy_from_slice(&words[self.words.clone()]);
        } else {
            assert!(table != 0, "a long table lies somewhere");
            args.head.table = table;
        }
        args
    }
}
