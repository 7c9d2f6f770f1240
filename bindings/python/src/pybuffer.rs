//! The buffer protocol. Python froze it into the stable ABI only with 3.11, but every CPython since 3.3 has
//! exported these two functions and this struct unchanged, so a wheel for 3.9 declares them itself.

use carole::types::DType;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_char, c_int, c_void};

const FULL_READ_ONLY: c_int = 0x0018 | 0x0100 | 0x0004;

#[repr(C)]
struct RawBuffer {
    buf: *mut c_void,
    obj: *mut ffi::PyObject,
    len: isize,
    itemsize: isize,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut ffi::PyObject, view: *mut RawBuffer, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut RawBuffer);
    fn PyObject_CheckBuffer(object: *mut ffi::PyObject) -> c_int;
}

/// An exported buffer; released on drop, which must happen while attached to the interpreter.
pub struct Export {
    // Boxed, since exporters may point `shape` into the struct itself.
    raw: Box<RawBuffer>,
}

// SAFETY: the struct is only read, and only released while attached (see `Drop`).
unsafe impl Send for Export {}

impl Drop for Export {
    fn drop(&mut self) {
        // Attaching is free where the caller holds the interpreter, as every path of ours does; at interpreter
        // shutdown there is nothing left to release to.
        Python::try_attach(|_| {
            // SAFETY: filled by a successful PyObject_GetBuffer and released once.
            unsafe { PyBuffer_Release(&mut *self.raw) }
        });
    }
}

/// Whether `object` has the buffer protocol.
pub fn has_buffer(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: the object is alive.
    unsafe { PyObject_CheckBuffer(object.as_ptr()) == 1 }
}

/// Asks `object` for its buffer, with strides and format, for reading.
pub fn export(object: &Bound<'_, PyAny>) -> PyResult<Export> {
    // SAFETY: an all-zero Py_buffer is what the call expects; it is boxed, so it does not move.
    unsafe {
        let mut raw: Box<RawBuffer> = Box::new(std::mem::zeroed());
        if PyObject_GetBuffer(object.as_ptr(), &mut *raw, FULL_READ_ONLY) != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(Export { raw })
    }
}

impl Export {
    /// The first byte.
    pub fn data(&self) -> *mut u8 {
        self.raw.buf.cast()
    }
    /// Whether the exporter forbids writing.
    pub fn read_only(&self) -> bool {
        self.raw.readonly != 0
    }
    /// Dimensions.
    pub fn shape(&self) -> Vec<u64> {
        if self.raw.ndim == 0 {
            return Vec::new();
        }
        if self.raw.shape.is_null() {
            return vec![(self.raw.len / self.raw.itemsize.max(1)) as u64];
        }
        // SAFETY: the exporter promised `ndim` values, valid until the release.
        unsafe { std::slice::from_raw_parts(self.raw.shape, self.raw.ndim as usize) }
            .iter()
            .map(|&n| n as u64)
            .collect()
    }
    /// Strides in bytes; `None` where C-contiguous.
    pub fn strides(&self) -> Option<Vec<i64>> {
        if self.raw.strides.is_null() || self.raw.ndim == 0 {
            return None;
        }
        // SAFETY: as for `shape`.
        let strides = unsafe { std::slice::from_raw_parts(self.raw.strides, self.raw.ndim as usize) };
        Some(strides.iter().map(|&n| n as i64).collect())
    }
    /// Whether rows are reached through pointers (PIL-style arrays), which we cannot read.
    pub fn is_indirect(&self) -> bool {
        !self.raw.suboffsets.is_null()
    }
    /// The element type, or the format that has no counterpart.
    pub fn dtype(&self) -> Result<DType, String> {
        let format = if self.raw.format.is_null() {
            "B"
        } else {
            // SAFETY: a string with an end, valid until the release.
            unsafe { CStr::from_ptr(self.raw.format) }.to_str().unwrap_or("?")
        };
        dtype_of_format(format, self.raw.itemsize as usize)
            .ok_or_else(|| format!("its element format '{format}' has no counterpart"))
    }
}

/// Formats are those of Python's `struct`, plus NumPy's `Z` for complex.
fn dtype_of_format(format: &str, size: usize) -> Option<DType> {
    let little = cfg!(target_endian = "little");
    let code = match format.as_bytes().first()? {
        b'@' | b'=' => &format[1..],
        b'<' if little => &format[1..],
        b'>' | b'!' if !little => &format[1..],
        _ => format,
    };
    match (code, size) {
        ("?", 1) => Some(DType::Bool),
        ("e", 2) => Some(DType::F16),
        ("f", 4) => Some(DType::F32),
        ("d", 8) => Some(DType::F64),
        ("Zf", 8) => Some(DType::C64),
        ("Zd", 16) => Some(DType::C128),
        ("b" | "h" | "i" | "l" | "q" | "n", _) => match size {
            1 => Some(DType::I8),
            2 => Some(DType::I16),
            4 => Some(DType::I32),
            8 => Some(DType::I64),
            _ => None,
        },
        ("B" | "c" | "H" | "I" | "L" | "Q" | "N", _) => match size {
            1 => Some(DType::U8),
            2 => Some(DType::U16),
            4 => Some(DType::U32),
            8 => Some(DType::U64),
            _ => None,
        },
        _ => None,
    }
}
