//! Codes and structs that cross.
#![forbid(unsafe_code)]

use std::ffi::{c_char, c_void};

/// The version of this interface; `carole_abi_version()` tells the library's. Within one major version (the
/// number in the SONAME) functions and fields are only added.
pub const CAROLE_ABI_VERSION: u32 = 1;

/// The call succeeded.
pub const CAROLE_OK: i32 = 0;
/// Fix the program: this call can never work. Nothing was sent.
pub const CAROLE_ERROR_USAGE: i32 = 1;
/// Fix the tensor: ranks disagree about it. The group goes on.
pub const CAROLE_ERROR_MISMATCH: i32 = 2;
/// A rank failed; carole_reform() goes on with the others. carole_last_culprit() tells which.
pub const CAROLE_ERROR_BROKEN: i32 = 3;
/// The job is over: this rank or another has shut down in an orderly way.
pub const CAROLE_ERROR_SHUTDOWN: i32 = 4;
/// The time allowed is over; the operation stays in flight and can be waited for again.
pub const CAROLE_ERROR_TIMEOUT: i32 = 5;
/// A defect of Carole; please report the words of carole_last_error().
pub const CAROLE_ERROR_INTERNAL: i32 = 6;

/// 8-bit unsigned.
pub const CAROLE_UINT8: u32 = 0;
/// 8-bit signed.
pub const CAROLE_INT8: u32 = 1;
/// 16-bit unsigned.
pub const CAROLE_UINT16: u32 = 2;
/// 16-bit signed.
pub const CAROLE_INT16: u32 = 3;
/// 32-bit signed.
pub const CAROLE_INT32: u32 = 4;
/// 64-bit signed.
pub const CAROLE_INT64: u32 = 5;
/// IEEE half precision; summed in 32 bits.
pub const CAROLE_FLOAT16: u32 = 6;
/// IEEE single precision.
pub const CAROLE_FLOAT32: u32 = 7;
/// IEEE double precision.
pub const CAROLE_FLOAT64: u32 = 8;
/// One byte, 0 or 1.
pub const CAROLE_BOOL: u32 = 9;
/// bfloat16; summed in 32 bits.
pub const CAROLE_BFLOAT16: u32 = 10;
/// 32-bit unsigned.
pub const CAROLE_UINT32: u32 = 11;
/// 64-bit unsigned.
pub const CAROLE_UINT64: u32 = 12;
/// Two 32-bit floats: real, imaginary.
pub const CAROLE_COMPLEX64: u32 = 13;
/// Two 64-bit floats: real, imaginary.
pub const CAROLE_COMPLEX128: u32 = 14;

/// Sum divided by the number of ranks, rounded once; floor division for integers.
pub const CAROLE_AVERAGE: u32 = 0;
/// Sum; integers wrap, bool is *or*.
pub const CAROLE_SUM: u32 = 1;
/// Adaptive summation of gradients.
pub const CAROLE_ADASUM: u32 = 2;
/// Smallest; NaN propagates.
pub const CAROLE_MIN: u32 = 3;
/// Largest; NaN propagates.
pub const CAROLE_MAX: u32 = 4;
/// Product; integers wrap, bool is *and*.
pub const CAROLE_PRODUCT: u32 = 5;
/// Bitwise and, of integers and bool.
pub const CAROLE_BITAND: u32 = 6;
/// Bitwise or, of integers and bool.
pub const CAROLE_BITOR: u32 = 7;

/// Every rank gets the reduction of all inputs.
pub const CAROLE_ALLREDUCE: u32 = 0;
/// Every rank gets all inputs, joined along the first dimension, which may differ.
pub const CAROLE_ALLGATHER: u32 = 1;
/// Every rank gets the root's tensor.
pub const CAROLE_BROADCAST: u32 = 2;
/// Every rank gets its rows of the reduction; the lower ranks get one row more.
pub const CAROLE_REDUCESCATTER: u32 = 3;
/// Rank j gets the j-th split of every rank's rows.
pub const CAROLE_ALLTOALL: u32 = 4;
/// The root gets the reduction.
pub const CAROLE_REDUCE: u32 = 5;
/// The root gets all inputs, joined along the first dimension.
pub const CAROLE_GATHER: u32 = 6;
/// Every rank gets its rows of the root's tensor; the lower ranks get one row more.
pub const CAROLE_SCATTER: u32 = 7;
/// No rank leaves before all have entered.
pub const CAROLE_BARRIER: u32 = 8;
/// This rank has no more data; what the others still run goes on with the identity in its place.
pub const CAROLE_JOIN: u32 = 9;

/// Average divides by the size of the process set.
pub const CAROLE_JOIN_AVERAGE_SIZE: u32 = 0;
/// Average divides by the number of ranks that have not joined.
pub const CAROLE_JOIN_AVERAGE_PRESENT: u32 = 1;

/// Tensors are in the host's memory.
pub const CAROLE_MEMORY_HOST: u32 = 0;
/// All tensors of a call are on one CUDA device.
pub const CAROLE_MEMORY_CUDA: u32 = 1;

/// The process set of all ranks.
pub const CAROLE_GLOBAL_SET: u32 = 0;
/// Wait without a limit.
pub const CAROLE_FOREVER: i64 = -1;

/// One tensor of an operation. Its layout is fixed within a major version, since arrays of it cross.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_tensor {
    /// The first byte of the input (rows one after another). May be NULL when there are no bytes.
    pub input: *const c_void,
    /// Where the output goes: `input` itself for in place, or NULL to let the engine allocate it and hand it
    /// over in the output. For allgather, alltoall and gather NULL is the only choice, since the size is
    /// known only after the ranks have agreed.
    pub output: *mut c_void,
    /// Element type: CAROLE_FLOAT32 and so on.
    pub dtype: u32,
    /// How many dimensions `shape` has; 0 for a scalar.
    pub dimensions: u32,
    /// Dimensions of the input. May be NULL when `dimensions` is 0.
    pub shape: *const u64,
}

/// How an operation is to be done. Fill it with CAROLE_OPTIONS_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_options {
    /// sizeof(carole_options).
    pub struct_size: usize,
    /// The name by which ranks match their operations (UTF-8); NULL matches by order of submission, which is
    /// not safe from several threads at once.
    pub name: *const c_char,
    /// Factor before the reduction; 1 by default.
    pub prescale: f64,
    /// Factor after the reduction; 1 by default.
    pub postscale: f64,
    /// The process set; CAROLE_GLOBAL_SET by default.
    pub process_set: u32,
    /// CAROLE_SUM (the default), CAROLE_AVERAGE and so on; ignored where nothing is reduced.
    pub op: u32,
    /// The root as a global rank, for broadcast, reduce, gather and scatter; 0 by default.
    pub root: u32,
    /// How Average counts ranks that have joined: CAROLE_JOIN_AVERAGE_SIZE by default.
    pub join_average: u32,
    /// Where the tensors lie: CAROLE_MEMORY_HOST by default.
    pub memory: u32,
    /// With CAROLE_MEMORY_CUDA: the stream (a CUstream or cudaStream_t) that has been given what makes the inputs; NULL
    /// is the default stream. The call does not wait for it. Outputs that Carole allocates lie on the device, too, and
    /// waiting for the operation waits for the device.
    pub cuda_stream: *mut c_void,
}

/// One knob and its value, before every other source: {"CAROLE_ALGORITHM", "ring"}.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_knob {
    /// Its name.
    pub name: *const c_char,
    /// Its value.
    pub value: *const c_char,
}

/// A list of ranks.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_ranks {
    /// The ranks.
    pub ranks: *const u32,
    /// How many.
    pub count: usize,
}

/// How to start. All zero but `struct_size` means: everything from the environment.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_init_options {
    /// sizeof(carole_init_options).
    pub struct_size: usize,
    /// Knobs that go before every other source. May be NULL when there are none.
    pub knobs: *const carole_knob,
    /// How many knobs.
    pub knob_count: usize,
    /// Process sets to make at once, the same on every rank. May be NULL when there are none.
    pub process_sets: *const carole_ranks,
    /// How many process sets.
    pub process_set_count: usize,
}

/// Who this process is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct carole_world {
    /// sizeof(carole_world); set it before the call.
    pub struct_size: usize,
    /// This process, among all.
    pub rank: u32,
    /// All processes.
    pub size: u32,
    /// This process, among those on its host.
    pub local_rank: u32,
    /// Processes on its host.
    pub local_size: u32,
    /// Its host, among the hosts that have this local rank.
    pub cross_rank: u32,
    /// Hosts that have this local rank.
    pub cross_size: u32,
    /// 1 when all hosts have equally many processes, else 0.
    pub homogeneous: u32,
}
