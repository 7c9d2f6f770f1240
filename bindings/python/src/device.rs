//! Arrays on CUDA devices: whose streams make them and wait for results, and memory there that the runtime allocated.

use crate::dlpack;
use crate::errors;
use crate::output::typestr;
use carole::device::cuda;
use carole::error::Error;
use carole::runtime::{DeviceBuffer, Mark};
use carole::types::DType;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::sync::Arc;

/// CUDA's legacy default stream, as both array protocols name it: work of all ordinary streams is ordered with it.
pub const LEGACY: u64 = 1;
/// DLPack's word for "no order is needed".
const NO_ORDER: i64 = -1;

/// Whose stream makes an array on a device, and whose will use it next.
pub struct Source {
    /// The device's number, where it is known.
    pub device: Option<i32>,
    stream: u64,
    next: Next,
}

/// The stream that uses an array when an operation is over.
enum Next {
    /// What a function of Python gives then.
    Told(Py<PyAny>),
    /// What the array's `__cuda_array_interface__` names then.
    Interface(Py<PyAny>),
    /// Nobody says: results are to be there when the operation is over.
    Any,
}

impl Source {
    /// With a function that gives the stream of whoever takes the results.
    pub fn told(device: i32, stream: u64, now: Py<PyAny>) -> Source {
        Source { device: Some(device), stream, next: Next::Told(now) }
    }
    /// Whose interface names the stream.
    pub fn of_interface(device: Option<i32>, stream: u64, array: Py<PyAny>) -> Source {
        Source { device, stream, next: Next::Interface(array) }
    }
    /// That is ordered with the legacy default stream, and says no more.
    pub fn legacy(device: Option<i32>) -> Source {
        Source { device, stream: LEGACY, next: Next::Any }
    }

    fn next(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        match &self.next {
            Next::Told(now) => now.bind(py).call0()?.extract().map(Some),
            Next::Interface(array) => {
                let interface = array.bind(py).getattr("__cuda_array_interface__")?;
                stream_of(&interface).map_err(PyValueError::new_err)
            }
            Next::Any => Ok(None),
        }
    }

    /// Whether another says nothing that this one does not: an array of the same kind that is made on the same stream.
    fn covers(&self, py: Python<'_>, other: &Source) -> bool {
        let alike = match (&self.next, &other.next) {
            (Next::Told(_), Next::Told(_)) | (Next::Any, Next::Any) => true,
            (Next::Interface(a), Next::Interface(b)) => a.bind(py).get_type().is(b.bind(py).get_type()),
            _ => false,
        };
        alike && self.stream == other.stream
    }
}

/// The stream that version 3 of the interface names. 0, which it forbids, can only mean the default stream.
pub fn stream_of(interface: &Bound<'_, PyAny>) -> Result<Option<u64>, String> {
    let Some(stream) = interface.get_item("stream").ok().filter(|stream| !stream.is_none()) else {
        return Ok(None);
    };
    let number = stream.extract::<u64>();
    let number = number.map_err(|_| format!("its __cuda_array_interface__ names the stream {stream}"))?;
    Ok(Some(if number == 0 { LEGACY } else { number }))
}

/// Where the arrays of an operation come from, and who waits for its results.
#[derive(Default)]
pub struct OnDevice {
    sources: Vec<Source>,
}

impl OnDevice {
    /// Adds one more array's source; the reason where it is not on the device of those before.
    pub fn add(&mut self, py: Python<'_>, source: Source) -> Result<(), String> {
        let known = self.device();
        if let (Some(known), Some(device)) = (known, source.device)
            && known != device
        {
            return Err(format!(
                "one array is on CUDA device {known}, another on {device}; a group is on one device"
            ));
        }
        match self.sources.iter_mut().find(|known| known.covers(py, &source)) {
            Some(known) => known.device = known.device.or(source.device),
            None => self.sources.push(source),
        }
        Ok(())
    }

    /// The device's number.
    pub fn device(&self) -> Option<i32> {
        self.sources.iter().find_map(|source| source.device)
    }

    /// The stream of the submission: it is behind all that make the arrays.
    pub fn gather(&self) -> Result<u64, String> {
        let Some((first, rest)) = self.sources.split_first() else { return Ok(LEGACY) };
        for other in rest.iter().filter(|other| other.stream != first.stream) {
            // SAFETY: the streams are those of the arrays' libraries, which keep them.
            let ordered = unsafe {
                cuda::arrival_on(self.device().unwrap_or(0), other.stream)
                    .and_then(|arrival| arrival.mark.0.hold(first.stream))
            };
            ordered.map_err(|cause| cause.to_string())?;
        }
        Ok(first.stream)
    }

    /// Lets the present streams wait for the results; those of the submission too, since memory which is freed is given
    /// out again in their order. Gives the stream that results are then ordered with; none where they are there.
    pub fn hold(&self, py: Python<'_>, arrives: &Mark) -> PyResult<Option<u64>> {
        let failed = |cause| {
            let words = format!("the results have not reached the device: {cause}");
            errors::to_python(py, &Error::Usage(words))
        };
        let (mut held, mut last, mut waits) = (Vec::new(), None, false);
        for source in &self.sources {
            let next = source.next(py)?;
            waits |= next.is_none();
            last = next.or(last);
            for stream in [Some(source.stream), next].into_iter().flatten() {
                if !held.contains(&stream) {
                    // SAFETY: the streams are those of the arrays' libraries, which keep them.
                    unsafe { arrives.0.hold(stream) }.map_err(failed)?;
                    held.push(stream);
                }
            }
        }
        if waits {
            py.detach(|| arrives.0.block(None)).map_err(failed)?;
            return Ok(None);
        }
        Ok(last)
    }
}

/// A result in memory of a CUDA device that the runtime allocated. `cupy.asarray(output)` and
/// `torch.from_dlpack(output)` see it without a copy, and the memory lives as long as the last of them.
#[pyclass(frozen, module = "carole._native")]
pub struct DeviceOutput {
    memory: Arc<DeviceBuffer>,
    dtype: DType,
    shape: Vec<u64>,
    /// When the result is there; none where it is.
    arrives: Option<Mark>,
    /// A stream that waits for it; none where it is there.
    stream: Option<u64>,
}

impl DeviceOutput {
    pub fn new(
        memory: DeviceBuffer,
        dtype: DType,
        shape: Vec<u64>,
        arrives: Option<Mark>,
        stream: Option<u64>,
    ) -> DeviceOutput {
        DeviceOutput { memory: Arc::new(memory), dtype, shape, arrives, stream }
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
        DeviceOutput {
            memory: Arc::clone(&self.memory),
            dtype: DType::U8,
            shape: vec![self.memory.len],
            arrives: self.arrives.clone(),
            stream: self.stream,
        }
    }
    /// Numba's CUDA array interface, version 3: the stream is one that waits for the result, None where it is there.
    /// bfloat16 shows as two bytes without a type.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", typestr(self.dtype))?;
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("data", (self.memory.address, false))?;
        interface.set_item("strides", py.None())?;
        interface.set_item("stream", self.stream.map(|stream| stream.max(LEGACY)))?;
        Ok(interface)
    }
    /// DLPack: a capsule that shares the memory. `stream` is the one that will use it, and waits for the result.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let here = self.__dlpack_device__();
        if copy == Some(true) || dl_device.is_some_and(|device| device != here) {
            let words = format!("this memory is on CUDA device {} and is lent without a copy", here.1);
            return Err(PyBufferError::new_err(words));
        }
        if stream == Some(0) {
            return Err(PyValueError::new_err("stream=0 may mean two streams of CUDA: pass 1 or 2"));
        }
        if let (Some(arrives), true) = (&self.arrives, stream != Some(NO_ORDER)) {
            let stream = stream.map_or(LEGACY, |stream| stream.cast_unsigned());
            // SAFETY: DLPack's consumer passes a live stream of this device, or a number of a default stream.
            let held = unsafe { arrives.0.hold(stream) };
            held.map_err(|cause| errors::to_python(py, &Error::Usage(cause.to_string())))?;
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let data = std::ptr::with_exposed_provenance_mut(self.memory.address as usize);
        dlpack::lend(py, Arc::clone(&self.memory), here, data, self.dtype, &self.shape, versioned)
    }
    /// DLPack: CUDA, and the device's number.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::CUDA, self.memory.device)
    }
    fn __repr__(&self) -> String {
        format!("<carole output {}{:?} on CUDA device {}>", self.dtype.name(), self.shape, self.memory.device)
    }
}
