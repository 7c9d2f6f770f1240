//! Memory that the engine allocated, lent to Python without a copy.

use crate::dlpack;
use crate::errors;
use carole::error::Error;
use carole::runtime::{self, OwnedBytes, SharedBytes};
use carole::types::DType;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use std::sync::Arc;

/// A result in memory that the engine allocated. `numpy.asarray(output)` and `torch.from_dlpack(output)` see
/// it without a copy, and the memory lives as long as the last of them.
#[pyclass(frozen, module = "carole._native")]
pub struct Output {
    memory: Bytes,
    dtype: DType,
    shape: Vec<u64>,
}

/// Whose memory it is.
#[derive(Clone)]
enum Bytes {
    /// A result.
    Engine(Arc<OwnedBytes>),
    /// A tensor's, which the ranks of the host share.
    Shared(Arc<SharedBytes>),
}

impl Bytes {
    fn as_ptr(&self) -> *mut u8 {
        match self {
            Bytes::Engine(memory) => memory.as_ptr(),
            Bytes::Shared(memory) => memory.as_ptr(),
        }
    }
    fn len(&self) -> usize {
        match self {
            Bytes::Engine(memory) => memory.as_slice().len(),
            Bytes::Shared(memory) => memory.len(),
        }
    }
}

/// Zeros in memory that the ranks of this host share.
#[pyfunction]
pub fn shared_zeros(py: Python<'_>, shape: Vec<u64>, dtype: &str) -> PyResult<Output> {
    let known =
        DType::from_name(dtype).ok_or_else(|| Error::usage(format!("'{dtype}' is no type of tensors")));
    let made = known.and_then(|dtype| {
        let elements = shape.iter().try_fold(dtype.size() as u64, |all, n| all.checked_mul(*n));
        let bytes =
            elements.and_then(|bytes| usize::try_from(bytes).ok()).filter(|n| *n <= isize::MAX as usize);
        let bytes =
            bytes.ok_or_else(|| Error::usage(format!("a tensor of shape {shape:?} fits no memory")))?;
        Ok((runtime::allocate(bytes)?, dtype))
    });
    let (memory, dtype) = made.map_err(|error| errors::to_python(py, &error))?;
    Ok(Output { memory: Bytes::Shared(Arc::new(memory)), dtype, shape })
}

impl Output {
    pub fn new(memory: OwnedBytes, dtype: DType, shape: Vec<u64>) -> Output {
        Output::over(Arc::new(memory), dtype, shape)
    }
    /// Over memory that others hold, too.
    pub fn over(memory: Arc<OwnedBytes>, dtype: DType, shape: Vec<u64>) -> Output {
        Output { memory: Bytes::Engine(memory), dtype, shape }
    }
}

#[pymethods]
impl Output {
    /// The dimensions.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }
    /// The element type's name, such as "float32".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }
    /// Whether the other ranks of this host see the memory.
    #[getter]
    fn is_shared(&self) -> bool {
        matches!(&self.memory, Bytes::Shared(memory) if memory.is_shared())
    }
    /// The number of bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.memory.len()
    }
    /// The address of the first byte.
    #[getter]
    fn address(&self) -> usize {
        self.memory.as_ptr().expose_provenance()
    }
    /// A copy of the bytes.
    fn tobytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        // SAFETY: so many bytes lie there for as long as `self` lives; that nobody writes them meanwhile is the duty of
        // Python code, as with every buffer.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.memory.len()) };
        PyBytes::new(py, bytes)
    }
    /// The same memory as a flat array of uint8, which every framework's DLPack can read.
    fn as_uint8(&self) -> Output {
        let shape = vec![self.memory.len() as u64];
        Output { memory: self.memory.clone(), dtype: DType::U8, shape }
    }
    /// NumPy's array interface, version 3. bfloat16 shows as two bytes without a type.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", typestr(self.dtype))?;
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("data", (self.address(), false))?;
        Ok(interface)
    }
    /// DLPack: a capsule that shares the memory.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = stream;
        if copy == Some(true) || dl_device.is_some_and(|device| device != dlpack::HOST) {
            let message = "this memory is on the host and is lent without a copy";
            return Err(pyo3::exceptions::PyBufferError::new_err(message));
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let owner = self.memory.clone();
        dlpack::lend(py, owner, dlpack::HOST, self.memory.as_ptr(), self.dtype, &self.shape, versioned)
    }
    /// DLPack: host memory.
    fn __dlpack_device__(&self) -> (i32, i32) {
        dlpack::HOST
    }
    fn __repr__(&self) -> String {
        format!("<carole output {}{:?}>", self.dtype.name(), self.shape)
    }
}

pub fn typestr(dtype: DType) -> &'static str {
    const LITTLE: bool = cfg!(target_endian = "little");
    match dtype {
        DType::Bool => "|b1",
        DType::U8 => "|u1",
        DType::I8 => "|i1",
        DType::U16 => {
            if LITTLE {
                "<u2"
            } else {
                ">u2"
            }
        }
        DType::I16 => {
            if LITTLE {
                "<i2"
            } else {
                ">i2"
            }
        }
        DType::U32 => {
            if LITTLE {
                "<u4"
            } else {
                ">u4"
            }
        }
        DType::I32 => {
            if LITTLE {
                "<i4"
            } else {
                ">i4"
            }
        }
        DType::U64 => {
            if LITTLE {
                "<u8"
            } else {
                ">u8"
            }
        }
        DType::I64 => {
            if LITTLE {
                "<i8"
            } else {
                ">i8"
            }
        }
        DType::F16 => {
            if LITTLE {
                "<f2"
            } else {
                ">f2"
            }
        }
        DType::BF16 => "|V2",
        DType::F32 => {
            if LITTLE {
                "<f4"
            } else {
                ">f4"
            }
        }
        DType::F64 => {
            if LITTLE {
                "<f8"
            } else {
                ">f8"
            }
        }
        DType::C64 => {
            if LITTLE {
                "<c8"
            } else {
                ">c8"
            }
        }
        DType::C128 => {
            if LITTLE {
                "<c16"
            } else {
                ">c16"
            }
        }
    }
}
