//! Devices copy and reduce bytes in one place. One per kind of memory: host and CUDA.

pub mod host;
pub mod accelerator;
pub mod cuda;

use crate::error::Cause;
use crate::memory::{Memory, PieceRange, RunId};
use crate::types::{DType, ReduceOp};

/// Names one step of one window of one run, in every completion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token {
    /// The run.
    pub run: RunId,
    /// The window.
    pub window: u32,
    /// The step of the schedule (for point-to-point messages: 0).
    pub step: u32,
}

/// How values are combined: the pair that selects a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Reduction {
    /// Element type.
    pub dtype: DType,
    /// Operation; [`ReduceOp::Average`] combines as Sum.
    pub op: ReduceOp,
}

/// The last multiplication of a reduction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Finish {
    /// 1 for all operations but Average.
    pub divisor: u32,
    /// Postscale.
    pub post: f64,
}

impl Finish {
    /// Changes nothing.
    pub const NOTHING: Finish = Finish { divisor: 1, post: 1.0 };

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.divisor == 1 && self.post == 1.0
    }
}

/// Work within one place. All piece ranges of one order hold equally many bytes (`srcs` each as many as `dst`).
#[derive(Clone, Debug)]
pub enum DeviceOrder {
    /// `dst = src`.
    Copy {
        /// Where the result goes.
        dst: PieceRange,
        /// What is read.
        src: PieceRange,
    },
    /// `dst = src * factor`, rounded once.
    Scale {
        /// Where the result goes.
        dst: PieceRange,
        /// What is read.
        src: PieceRange,
        /// The type of the elements.
        dtype: DType,
        /// What every element is multiplied with.
        factor: f64,
    },
    /// `dst = a ⊕ b`, `a` first.
    Reduce {
        /// Where the result goes.
        dst: PieceRange,
        /// The left operand.
        a: PieceRange,
        /// The right operand.
        b: PieceRange,
        /// Operation and type.
        reduction: Reduction,
    },
    /// The canonical tree over `srcs` in a wide accumulator, with prescale and finish, rounded once.
    ReduceMany {
        /// Where the result goes.
        dst: PieceRange,
        /// The operands, in the order of their ranks.
        srcs: Vec<PieceRange>,
        /// Operation and type.
        reduction: Reduction,
        /// What every operand is multiplied with first.
        pre: f64,
        /// What the sum is scaled with last.
        finish: Finish,
    },
    /// Adasum, piece by piece: each piece of `dst`, `a` and `b` is one whole tensor.
    Combine {
        /// Where the result goes.
        dst: PieceRange,
        /// The left operand.
        a: PieceRange,
        /// The right operand.
        b: PieceRange,
        /// The type of the elements.
        dtype: DType,
    },
    /// `dst = dst * post / divisor`, rounded once (integers: floor).
    Finish {
        /// Where the result goes.
        dst: PieceRange,
        /// The type of the elements.
        dtype: DType,
        /// What the sum is scaled with last.
        finish: Finish,
    },
    /// `dst` = the identity of the operation.
    Identity {
        /// Where the result goes.
        dst: PieceRange,
        /// Operation and type.
        reduction: Reduction,
    },
}

/// Copies and reduces bytes in one place.
pub trait Device: Send {
    /// Starts an order. A device that completes at once (host) returns `Ok(true)`; one that completes later
    /// returns `Ok(false)` and tells through [`Device::progress`].
    fn post(&mut self, token: Token, order: &DeviceOrder, memory: &Memory) -> Result<bool, Cause>;
    /// Appends what completed since the last call.
    fn progress(&mut self, done: &mut Vec<Token>) -> Result<(), Cause>;
}
