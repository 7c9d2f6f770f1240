//! The nouns: ranks, types, operations, signatures. Plain data that every floor speaks of.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

/// A process of the job, counted from 0 over all hosts (Horovod's and MPI's *rank*).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Rank(pub u32);

/// A position inside one process set: member `i` is the i-th smallest rank of the set. Schedules and
/// coordinators speak of members; only the engine translates them to ranks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Member(pub u32);

/// A process set. Set 0 holds all ranks. Identifiers are never reused within an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SetId(pub u32);

/// The set of all ranks.
pub const GLOBAL_SET: SetId = SetId(0);

/// One agreement about who takes part. A failure ends the epoch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Epoch(pub u32);

/// The short name that a set's members agreed on for one (name, signature). Never reused within an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct TensorKey(pub u32);

/// A moment, in nanoseconds since some origin of the process (or of the simulation). Machines take it as
/// an argument; only the engine's driver reads a clock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This moment plus `ns` nanoseconds.
    #[must_use]
    pub fn after_ns(self, ns: u64) -> Time {
        Time(self.0.saturating_add(ns))
    }
    /// Nanoseconds from `earlier` to this moment; 0 when it is not later.
    #[must_use]
    pub fn since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

macro_rules! table_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $code,)* }
        impl $name {
            /// Every value, in order of its code.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
            /// The value with this code, which is what crosses the wire and the C ABI.
            #[must_use]
            pub fn from_code(code: u8) -> Option<$name> {
                match code { $($code => Some($name::$variant),)* _ => None }
            }
            /// The code that crosses the wire and the C ABI.
            #[must_use]
            pub fn code(self) -> u8 { self as u8 }
            /// The name that users write and read.
            #[must_use]
            pub fn name(self) -> &'static str { match self { $($name::$variant => $text,)* } }
            /// The value that users write so.
            #[must_use]
            pub fn from_name(name: &str) -> Option<$name> {
                match name { $($text => Some($name::$variant),)* _ => None }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.name()) }
        }
    };
}

table_enum! {
    /// Element types. Codes 0 to 9 are Horovod's.
    DType {
        /// 8-bit unsigned.
        U8 = 0, "uint8";
        /// 8-bit signed.
        I8 = 1, "int8";
        /// 16-bit unsigned.
        U16 = 2, "uint16";
        /// 16-bit signed.
        I16 = 3, "int16";
        /// 32-bit signed.
        I32 = 4, "int32";
        /// 64-bit signed.
        I64 = 5, "int64";
        /// IEEE half precision; summed in f32.
        F16 = 6, "float16";
        /// IEEE single precision.
        F32 = 7, "float32";
        /// IEEE double precision.
        F64 = 8, "float64";
        /// One byte, 0 or 1. Any other byte counts as 1 when read and is never written.
        Bool = 9, "bool";
        /// bfloat16; summed in f32.
        BF16 = 10, "bfloat16";
        /// 32-bit unsigned.
        U32 = 11, "uint32";
        /// 64-bit unsigned.
        U64 = 12, "uint64";
        /// Two f32: real, imaginary.
        C64 = 13, "complex64";
        /// Two f64: real, imaginary.
        C128 = 14, "complex128";
    }
}

impl DType {
    /// Bytes of one element: 1, 2, 4, 8 or 16.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 | DType::Bool => 1,
            DType::U16 | DType::I16 | DType::F16 | DType::BF16 => 2,
            DType::I32 | DType::U32 | DType::F32 => 4,
            DType::I64 | DType::U64 | DType::F64 | DType::C64 => 8,
            DType::C128 => 16,
        }
    }
    /// f16 or bf16: kept in f32 while summed.
    #[must_use]
    pub fn is_half(self) -> bool {
        matches!(self, DType::F16 | DType::BF16)
    }
    /// complex64 or complex128.
    #[must_use]
    pub fn is_complex(self) -> bool {
        matches!(self, DType::C64 | DType::C128)
    }
    /// A real floating-point type.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }
    /// A whole-number type (bool is not one).
    #[must_use]
    pub fn is_integer(self) -> bool {
        !self.is_float() && !self.is_complex() && self != DType::Bool
    }
}

table_enum! {
    /// What is done to the ranks' values. Codes 0 to 5 are Horovod's.
    ReduceOp {
        /// Sum divided by the number of ranks, rounded once; floor division for integers.
        Average = 0, "average";
        /// Sum; integers wrap, bool is *or*.
        Sum = 1, "sum";
        /// Adaptive summation (Maleki et al., "Scaling Distributed Training with Adaptive Summation",
        /// MLSys 2021): orthogonal gradients add, parallel ones average.
        Adasum = 2, "adasum";
        /// Smallest; NaN propagates, -0 < +0.
        Min = 3, "min";
        /// Largest; NaN propagates, -0 < +0.
        Max = 4, "max";
        /// Product; integers wrap, bool is *and*.
        Product = 5, "product";
        /// Bitwise and, of integers and bool.
        BitAnd = 6, "bitand";
        /// Bitwise or, of integers and bool.
        BitOr = 7, "bitor";
    }
}

impl ReduceOp {
    /// Whether this operation is defined for `dtype`; the reason when it is not.
    pub fn accepts(self, dtype: DType) -> Result<(), &'static str> {
        match self {
            ReduceOp::Average if dtype == DType::Bool => {
                Err("Average of bool is not defined; use Sum (or) or Product (and)")
            }
            ReduceOp::Min | ReduceOp::Max if dtype.is_complex() => {
                Err("complex numbers have no order; use Sum or Product")
            }
            ReduceOp::BitAnd | ReduceOp::BitOr if !(dtype.is_integer() || dtype == DType::Bool) => {
                Err("bitwise operations take integers and bool")
            }
            ReduceOp::Adasum if !dtype.is_float() => Err("Adasum takes floating-point tensors"),
            _ => Ok(()),
        }
    }
}

table_enum! {
    /// The kinds of operation that a process set agrees on.
    Collective {
        /// Every rank gets the reduction of all inputs.
        Allreduce = 0, "allreduce";
        /// Every rank gets all inputs, joined along the first dimension, which may differ.
        Allgather = 1, "allgather";
        /// Every rank gets the root's tensor.
        Broadcast = 2, "broadcast";
        /// Every rank gets its rows of the reduction; the lower ranks get one row more.
        Reducescatter = 3, "reducescatter";
        /// Rank j gets the j-th split of every rank's rows.
        Alltoall = 4, "alltoall";
        /// The root gets the reduction.
        Reduce = 5, "reduce";
        /// The root gets all inputs, joined along the first dimension.
        Gather = 6, "gather";
        /// Every rank gets its rows of the root's tensor; the lower ranks get one row more.
        Scatter = 7, "scatter";
        /// No rank leaves before all have entered.
        Barrier = 8, "barrier";
        /// This rank has no more data; it takes part in what the others still run with the identity.
        Join = 9, "join";
        /// A new process set, identified by its ranks.
        AddSet = 10, "add_process_set";
        /// The end of a process set.
        RemoveSet = 11, "remove_process_set";
    }
}

impl Collective {
    /// Whether a reduction takes place, so that op and scale matter.
    #[must_use]
    pub fn reduces(self) -> bool {
        matches!(self, Collective::Allreduce | Collective::Reducescatter | Collective::Reduce)
    }
    /// Whether the first dimension may differ between ranks and travels as call data.
    #[must_use]
    pub fn has_free_rows(self) -> bool {
        matches!(self, Collective::Allgather | Collective::Alltoall | Collective::Gather)
    }
    /// Whether the first dimension is special, so that a scalar counts as one row.
    #[must_use]
    pub fn has_rows(self) -> bool {
        self.has_free_rows() || matches!(self, Collective::Reducescatter | Collective::Scatter)
    }
    /// Whether a root is named.
    #[must_use]
    pub fn has_root(self) -> bool {
        matches!(self, Collective::Broadcast | Collective::Reduce | Collective::Gather | Collective::Scatter)
    }
}

/// Factors before and after the reduction; (1, 1) means none.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scale {
    /// Every input is multiplied by this first.
    pub pre: f64,
    /// The result is multiplied by this.
    pub post: f64,
}

impl Default for Scale {
    fn default() -> Self {
        Scale { pre: 1.0, post: 1.0 }
    }
}

/// Where a tensor's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Place {
    /// Ordinary memory.
    #[default]
    Host,
    /// Memory of a CUDA device. (No device implements it yet; ranks that differ in it are told.)
    Cuda,
}

/// Type and shape of one tensor, as agreed. The first dimension is 0 where it may differ between ranks
/// ([`Collective::has_free_rows`]).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TensorSignature {
    /// Element type.
    pub dtype: DType,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<u64>,
}

impl TensorSignature {
    /// Elements in one row: the product of all dimensions but the first.
    #[must_use]
    pub fn row_elements(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }
    /// All elements (with the first dimension as it stands here).
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Everything about an operation that must be the same on every rank. A grouped operation is one
/// operation with several tensors: it completes or fails as a unit.
#[derive(Clone, PartialEq, Debug)]
pub struct Signature {
    /// What is to be done.
    pub collective: Collective,
    /// How values are combined ([`ReduceOp::Sum`] where nothing is reduced).
    pub op: ReduceOp,
    /// Factors before and after.
    pub scale: Scale,
    /// The root as a global rank; `Rank(0)` where there is none. For [`Collective::RemoveSet`] the number of the set.
    pub root: Rank,
    /// Where the tensors are.
    pub place: Place,
    /// How Average counts ranks that have joined.
    pub join_average: JoinAverage,
    /// The tensors; for [`Collective::AddSet`] and [`Collective::RemoveSet`] none.
    pub tensors: Vec<TensorSignature>,
    /// The ranks of the set to add or remove; empty otherwise.
    pub ranks: Vec<Rank>,
}

/// How Average counts ranks that have joined.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum JoinAverage {
    /// Divide by the size of the set, as Horovod does.
    #[default]
    Size,
    /// Divide by the number of ranks that contributed.
    Present,
}

/// Shared signatures: the response cache hands them out without copying.
pub type SharedSignature = Arc<Signature>;
