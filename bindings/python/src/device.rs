//! Tensors on CUDA devices: whose streams wait for results, and memory there that the runtime allocated.

use crate::errors;
use crate::output::typestr;
use carole::error::Error;
use carole::runtime::{DeviceBuffer, Mark};
use carole::types::DType;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::sync::Arc;

/// Where the tensors of an operation come from, and who waits for its results.
pub struct OnDevice {
    stream: u64,
    /// Gives the stream of whoever takes the results.
    now: Py<PyAny>,
}

impl OnDevice {
    pub fn new(stream: u64, now: Py<PyAny>) -> OnDevice {
        OnDevice { stream, now }
    }

    /// Lets the present stream wait for the results; that of the submission too, since memory which is freed is given
    /// out again in its order.
    pub fn hold(&self, py: Python<'_>, arrives: &Mark) -> PyResult<()> {
        let now: u64 = self.now.bind(py).call0()?.extract()?;
        for stream in [Some(self.stream), Some(now).filter(|now| *now != self.stream)].into_iter().flatten() {
            // SAFETY: the streams are those of the tensors' framework, which keeps them.
            let held = unsafe { arrives.0.hold(stream) };
            held.map_err(|cause| {
                let words = format!("the results have not reached the device: {cause}");
                errors::to_python(py, &Error::Usage(words))
            })?;
        }
        Ok(())
    }
}

/// A result in memory of a CUDA device that the runtime allocated.
#[pyclass(frozen, module = "carole._native")]
pub struct DeviceOutput {
    memory: Arc<DeviceBuffer>,
    dtype: DType,
    shape: Vec<u64>,
}

impl DeviceOutput {
    pub fn new(memory: DeviceBuffer, dtype: DType, shape: Vec<u64>) -> DeviceOutput {
        DeviceOutput { memory: Arc::new(memory), dtype, shape }
    }
}

#[pymethods]
impl DeviceOutput {
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
    /// The number of bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.memory.len
    }
    /// The device's number.
    #[getter]
    fn device(&self) -> i32 {
        self.memory.device
    }
    /// The same memory as a flat array of uint8.
    fn as_uint8(&self) -> DeviceOutput {
        DeviceOutput { memory: Arc::clone(&self.memory), dtype: DType::U8, shape: vec![self.memory.len] }
    }
    /// Numba's CUDA array interface, version 2: whoever takes it uses the stream that waits for the results.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 2)?;
        interface.set_item("typestr", typestr(self.dtype))?;
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("data", (self.memory.address, false))?;
        interface.set_item("strides", py.None())?;
        Ok(interface)
    }
}
