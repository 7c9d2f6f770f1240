//! From what C gave to what the runtime takes: every code checked, every pointer looked at once.

use crate::abi::*;
use runtime::error::{Error, Result};
use runtime::limits;
use runtime::runtime::TensorArg;
use runtime::types::{Collective, DType, JoinAverage, ReduceOp};
use std::ffi::{CStr, c_char};

/// `count` elements at `pointer`, which may be null only when there are none.
///
/// # Safety
/// A pointer that is not null holds `count` elements for as long as the result is used.
pub unsafe fn slice<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(Error::Usage(format!("{what} is NULL, but {count} elements of it are announced")));
    }
    if !pointer.is_aligned() {
        return Err(Error::Usage(format!("{what} is not aligned to its type")));
    }
    // SAFETY: not null, aligned, and the caller vouches for the count.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// The text at `pointer`, or `None` for a null pointer.
///
/// # Safety
/// A pointer that is not null holds a string that ends with a zero byte.
pub unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller vouches for the string.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|_| Error::Usage(format!("{what} is not UTF-8")))
}

/// Writes a result where the caller wants it; a null pointer is an error, since the result would be lost.
///
/// # Safety
/// A pointer that is not null can be written.
pub unsafe fn put<T>(pointer: *mut T, value: T, what: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::Usage(format!("{what} is NULL; give a place for the result")));
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { pointer.write(value) };
    Ok(())
}

/// A struct that begins with its size, as far as the caller's version of it reaches; the rest from `defaults`.
///
/// # Safety
/// A pointer that is not null points to a size followed by as many bytes as it says (itself included), and
/// every prefix of `T` that ends on a field is valid.
pub unsafe fn sized<T: Copy>(pointer: *const T, defaults: T, what: &str) -> Result<T> {
    if pointer.is_null() {
        return Ok(defaults);
    }
    // SAFETY: the struct begins with its size.
    let announced = unsafe { pointer.cast::<usize>().read_unaligned() };
    if announced < size_of::<usize>() || announced > 4096 {
        return Err(Error::Usage(format!(
            "{what}: struct_size is {announced}; set it to sizeof the struct before the call"
        )));
    }
    let mut full = defaults;
    let bytes = announced.min(size_of::<T>());
    // SAFETY: both hold at least `bytes` bytes, and a local does not overlap with the caller's memory.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut full).cast::<u8>(), bytes) };
    Ok(full)
}

/// Defaults of an operation.
pub const DEFAULTS: carole_options = carole_options {
    struct_size: size_of::<carole_options>(),
    name: std::ptr::null(),
    prescale: 1.0,
    postscale: 1.0,
    process_set: CAROLE_GLOBAL_SET,
    op: CAROLE_SUM,
    root: 0,
    join_average: CAROLE_JOIN_AVERAGE_SIZE,
    memory: CAROLE_MEMORY_HOST,
    cuda_stream: std::ptr::null_mut(),
};

fn unknown(what: &str, code: u32) -> Error {
    Error::Usage(format!("{code} is no {what}; use the constants of carole.h"))
}

/// The stream of a call whose tensors lie on a device.
pub fn stream(options: &carole_options) -> Result<Option<u64>> {
    match options.memory {
        CAROLE_MEMORY_HOST => Ok(None),
        CAROLE_MEMORY_CUDA => Ok(Some(options.cuda_stream as usize as u64)),
        code => Err(unknown("kind of memory", code)),
    }
}

/// The element type with this code.
pub fn dtype(code: u32) -> Result<DType> {
    u8::try_from(code).ok().and_then(DType::from_code).ok_or_else(|| unknown("element type", code))
}

/// The operation with this code.
pub fn op(code: u32) -> Result<ReduceOp> {
    u8::try_from(code).ok().and_then(ReduceOp::from_code).ok_or_else(|| unknown("reduce operation", code))
}

/// The collective with this code; those on process sets have functions of their own.
pub fn collective(code: u32) -> Result<Collective> {
    u8::try_from(code)
        .ok()
        .and_then(Collective::from_code)
        .filter(|c| !matches!(c, Collective::AddSet | Collective::RemoveSet))
        .ok_or_else(|| unknown("collective", code))
}

/// How Average counts joined ranks.
pub fn join_average(code: u32) -> Result<JoinAverage> {
    match code {
        CAROLE_JOIN_AVERAGE_SIZE => Ok(JoinAverage::Size),
        CAROLE_JOIN_AVERAGE_PRESENT => Ok(JoinAverage::Present),
        _ => Err(unknown("way to average under join", code)),
    }
}

/// One tensor.
///
/// # Safety
/// Its pointers are as `carole.h` says.
pub unsafe fn tensor<'a>(tensor: &carole_tensor) -> Result<TensorArg<'a>> {
    if tensor.dimensions as usize > limits::DIMENSIONS_MAX {
        return Err(Error::Usage(format!(
            "a tensor has {} dimensions; the most is {}",
            tensor.dimensions,
            limits::DIMENSIONS_MAX
        )));
    }
    let dtype = dtype(tensor.dtype)?;
    // SAFETY: the caller vouches for the shape.
    let shape = unsafe { slice(tensor.shape, tensor.dimensions as usize, "shape") }?;
    Ok(TensorArg { input: tensor.input.cast(), output: tensor.output.cast(), dtype, shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_every_code_of_the_runtime() {
        let dtypes = [
            (CAROLE_UINT8, "uint8"),
            (CAROLE_INT8, "int8"),
            (CAROLE_UINT16, "uint16"),
            (CAROLE_INT16, "int16"),
            (CAROLE_INT32, "int32"),
            (CAROLE_INT64, "int64"),
            (CAROLE_FLOAT16, "float16"),
            (CAROLE_FLOAT32, "float32"),
            (CAROLE_FLOAT64, "float64"),
            (CAROLE_BOOL, "bool"),
            (CAROLE_BFLOAT16, "bfloat16"),
            (CAROLE_UINT32, "uint32"),
            (CAROLE_UINT64, "uint64"),
            (CAROLE_COMPLEX64, "complex64"),
            (CAROLE_COMPLEX128, "complex128"),
        ];
        assert_eq!(dtypes.len(), DType::ALL.len(), "an element type is missing in carole.h");
        for (code, name) in dtypes {
            assert_eq!(dtype(code).expect("known").name(), name);
        }
        let ops = [
            (CAROLE_AVERAGE, "average"),
            (CAROLE_SUM, "sum"),
            (CAROLE_ADASUM, "adasum"),
            (CAROLE_MIN, "min"),
            (CAROLE_MAX, "max"),
            (CAROLE_PRODUCT, "product"),
            (CAROLE_BITAND, "bitand"),
            (CAROLE_BITOR, "bitor"),
        ];
        assert_eq!(ops.len(), ReduceOp::ALL.len(), "an operation is missing in carole.h");
        for (code, name) in ops {
            assert_eq!(op(code).expect("known").name(), name);
        }
        let collectives = [
            (CAROLE_ALLREDUCE, "allreduce"),
            (CAROLE_ALLGATHER, "allgather"),
            (CAROLE_BROADCAST, "broadcast"),
            (CAROLE_REDUCESCATTER, "reducescatter"),
            (CAROLE_ALLTOALL, "alltoall"),
            (CAROLE_REDUCE, "reduce"),
            (CAROLE_GATHER, "gather"),
            (CAROLE_SCATTER, "scatter"),
            (CAROLE_BARRIER, "barrier"),
            (CAROLE_JOIN, "join"),
        ];
        assert_eq!(collectives.len() + 2, Collective::ALL.len(), "a collective is missing in carole.h");
        for (code, name) in collectives {
            assert_eq!(collective(code).expect("known").name(), name);
        }
    }

    #[test]
    fn codes_outside_the_tables_are_refused() {
        for code in [15, 255, 256, u32::MAX] {
            assert!(dtype(code).is_err() && op(code).is_err() && collective(code).is_err());
        }
        assert!(collective(10).is_err(), "process sets have functions of their own");
    }

    #[test]
    fn an_older_struct_is_filled_up_with_defaults() {
        // What a program built against a carole.h without `root` and `join_average` would give.
        let mut given = carole_options { op: CAROLE_MAX, root: 99, ..DEFAULTS };
        given.struct_size = std::mem::offset_of!(carole_options, root);
        // SAFETY: the struct is larger than its announced size.
        let full = unsafe { sized(&raw const given, DEFAULTS, "options") }.expect("valid");
        assert_eq!((full.op, full.root), (CAROLE_MAX, 0));
        given.struct_size = 0;
        // SAFETY: as above.
        assert!(unsafe { sized(&raw const given, DEFAULTS, "options") }.is_err());
    }
}
