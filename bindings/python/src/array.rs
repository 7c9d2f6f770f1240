//! Anything that holds numbers, seen as address, type and shape: by the buffer protocol, by
//! `__array_interface__` (which alone tells of NumPy's bfloat16), or by DLPack; on a CUDA device by
//! `__cuda_array_interface__` (which tells of streams from version 3 on) or by DLPack.
#![forbid(unsafe_code)]

use crate::device::{self, LEGACY, Source};
use crate::dlpack;
use crate::pybuffer;
use carole::device::cuda;
use carole::types::DType;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What keeps the memory where it is.
pub enum Keep {
    /// An exported buffer.
    Buffer { _export: pybuffer::Export },
    /// The object itself.
    Object { _object: Py<PyAny> },
    /// A DLPack loan.
    Loan { _loan: dlpack::Loan },
}

/// A C-contiguous array.
pub struct Array {
    /// The first byte.
    pub data: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Whether it must not be written.
    pub read_only: bool,
    /// Of an array on a CUDA device: whose streams make and use it.
    pub source: Option<Source>,
}

/// Views `object`, for as long as the second part lives; the reason when that cannot be done.
pub fn view(object: &Bound<'_, PyAny>) -> Result<(Array, Keep), String> {
    let result = view_any(object);
    result.map_err(|reason| format!("{} cannot be used: {reason}", describe(object)))
}

fn describe(object: &Bound<'_, PyAny>) -> String {
    let name = object.get_type().fully_qualified_name().map(|name| name.to_string());
    format!("an object of type {}", name.unwrap_or_else(|_| "unknown".to_owned()))
}

fn view_any(object: &Bound<'_, PyAny>) -> Result<(Array, Keep), String> {
    let mut refusal = None;
    if pybuffer::has_buffer(object) {
        match pybuffer::export(object) {
            Ok(export) => match view_buffer(object, export) {
                Ok(array) => return Ok(array),
                // A type that the buffer protocol cannot tell may be told by the next protocol.
                Err(Refusal::Type(reason)) => refusal = Some(reason),
                Err(Refusal::Layout(reason)) => return Err(reason),
            },
            Err(error) => refusal = Some(format!("its buffer is refused with {error}")),
        }
    }
    if let Ok(interface) = object.getattr("__array_interface__") {
        return view_interface(object, &interface, "__array_interface__");
    }
    if object.hasattr("__dlpack__").unwrap_or(false) {
        return match dlpack::cuda_device(object)? {
            None => view_dlpack(object, None),
            Some(device) => view_cuda(object, Some(device)),
        };
    }
    if object.hasattr("__cuda_array_interface__").unwrap_or(false) {
        return view_cuda(object, None);
    }
    Err(refusal.unwrap_or_else(|| {
        "it has neither the buffer protocol, __array_interface__, __cuda_array_interface__ nor __dlpack__; \
         make it an array, for example with numpy.asarray(x)"
            .to_owned()
    }))
}

enum Refusal {
    Type(String),
    Layout(String),
}

fn view_buffer(object: &Bound<'_, PyAny>, export: pybuffer::Export) -> Result<(Array, Keep), Refusal> {
    if export.is_indirect() {
        return Err(Refusal::Layout(not_contiguous()));
    }
    let dtype = export.dtype().map_err(Refusal::Type)?;
    let shape = export.shape();
    check_contiguous(&shape, export.strides().as_deref(), dtype.size()).map_err(Refusal::Layout)?;
    let (data, read_only) = (export.data(), export.read_only() || is_jax(object));
    Ok((Array { data, dtype, shape, read_only, source: None }, Keep::Buffer { _export: export }))
}

/// Views what lies on a CUDA device; `device` is its number, where DLPack has told it.
fn view_cuda(object: &Bound<'_, PyAny>, device: Option<i32>) -> Result<(Array, Keep), String> {
    if let Some(device) = device
        && root_module(object) == "torch"
    {
        // torch's own stream, which it orders its tensors by; to itself there is no order.
        let (stream, now) = torch_streams(object).map_err(|error| error.to_string())?;
        return view_dlpack(object, Some((-1, Source::told(device, stream, now))));
    }
    let interface = object.getattr("__cuda_array_interface__").ok();
    let version = interface.as_ref().and_then(|interface| interface.get_item("version").ok()?.extract().ok());
    match (interface, device) {
        // Before version 3 the interface does not tell which stream makes the values.
        (Some(interface), None) => view_cuda_interface(object, &interface, device),
        (Some(interface), _) if version.is_some_and(|version: i64| version >= 3) => {
            view_cuda_interface(object, &interface, device)
        }
        (_, device) => view_dlpack(object, Some((LEGACY as i64, Source::legacy(device)))),
    }
}

fn view_cuda_interface(
    object: &Bound<'_, PyAny>,
    interface: &Bound<'_, PyAny>,
    device: Option<i32>,
) -> Result<(Array, Keep), String> {
    if interface.get_item("mask").is_ok_and(|mask| !mask.is_none()) {
        return Err("it is masked; pass its values without the mask".to_owned());
    }
    let (mut array, keep) = view_interface(object, interface, "__cuda_array_interface__")?;
    let bytes = array.shape.iter().product::<u64>() as usize * array.dtype.size();
    let found = match device {
        None if bytes > 0 => {
            let number = cuda::number_of(array.data.addr() as u64).map_err(|cause| cause.to_string())?;
            Some(number.ok_or("its __cuda_array_interface__ names memory that is on no CUDA device")?)
        }
        // Without values there is no address to ask about; whoever made it works on its device.
        None => cuda::current_number(),
        known => known,
    };
    array.source = Some(match device::stream_of(interface)? {
        Some(stream) => Source::of_interface(found, stream, object.clone().unbind()),
        None => Source::legacy(found),
    });
    Ok((array, keep))
}

/// The stream that torch works on now, and what gives that of later.
fn torch_streams(object: &Bound<'_, PyAny>) -> PyResult<(u64, Py<PyAny>)> {
    let streams = object.py().import("carole._arrays")?.getattr("cuda_streams")?.call1((object,))?;
    let (stream, now, _): (u64, Py<PyAny>, i32) = streams.extract()?;
    Ok((stream, now))
}

/// `name`: that of the attribute which gave `interface`.
fn view_interface(
    object: &Bound<'_, PyAny>,
    interface: &Bound<'_, PyAny>,
    name: &str,
) -> Result<(Array, Keep), String> {
    let text = |error: PyErr| format!("its {name} is not as NumPy defines it ({error})");
    let interface = interface.cast::<PyDict>().map_err(|_| format!("its {name} is not a dict"))?;
    let field = |field: &str| interface.get_item(field).map_err(text);
    let missing = |field: &str| format!("its {name} has no '{field}'");
    let typestr: String = field("typestr")?.ok_or_else(|| missing("typestr"))?.extract().map_err(text)?;
    let foreign = if cfg!(target_endian = "little") { '>' } else { '<' };
    if typestr.starts_with(foreign) {
        let remedy = "pass x.astype(x.dtype.newbyteorder('='))";
        return Err(format!("its bytes are in foreign order ('{typestr}'); {remedy}"));
    }
    let dtype = dtype_of_typestr(object, &typestr)
        .ok_or_else(|| format!("its element type '{typestr}' has no counterpart ({})", dtype_name(object)))?;
    let shape: Vec<u64> = field("shape")?.ok_or_else(|| missing("shape"))?.extract().map_err(text)?;
    let (address, read_only): (usize, bool) = field("data")?
        .ok_or_else(|| missing("data"))?
        .extract()
        .map_err(|_| format!("its {name} gives no address"))?;
    let strides = field("strides")?.filter(|strides| !strides.is_none());
    let strides: Option<Vec<i64>> = strides.map(|s| s.extract()).transpose().map_err(text)?;
    check_contiguous(&shape, strides.as_deref(), dtype.size())?;
    let data = std::ptr::with_exposed_provenance_mut(address);
    let array = Array { data, dtype, shape, read_only, source: None };
    Ok((array, Keep::Object { _object: object.clone().unbind() }))
}

/// `cuda`: of memory on a CUDA device, the stream to give to DLPack, and the source.
fn view_dlpack(object: &Bound<'_, PyAny>, cuda: Option<(i64, Source)>) -> Result<(Array, Keep), String> {
    let (stream, source) = cuda.map_or((None, None), |(stream, source)| (Some(stream), Some(source)));
    let borrowed = dlpack::borrow(object, stream)?;
    let strides = borrowed.strides.as_ref();
    let size = borrowed.dtype.size();
    let bytes: Option<Vec<i64>> =
        strides.map(|strides| strides.iter().map(|&n| n.saturating_mul(size as i64)).collect());
    check_contiguous(&borrowed.shape, bytes.as_deref(), size)?;
    // Before version 1 the protocol could not say "read only"; JAX's arrays are immutable all the same.
    let read_only = borrowed.read_only.unwrap_or(false) || is_jax(object);
    let (data, dtype, shape) = (borrowed.data, borrowed.dtype, borrowed.shape.clone());
    Ok((Array { data, dtype, shape, read_only, source }, Keep::Loan { _loan: borrowed.into_loan() }))
}

fn not_contiguous() -> String {
    "it is not C-contiguous; pass np.ascontiguousarray(x) (for torch: x.contiguous())".to_owned()
}

fn check_contiguous(shape: &[u64], strides: Option<&[i64]>, size: usize) -> Result<(), String> {
    let Some(strides) = strides else { return Ok(()) };
    if strides.len() != shape.len() {
        return Err("its shape and strides differ in length".to_owned());
    }
    if shape.contains(&0) {
        return Ok(());
    }
    let mut expected = size as i64;
    for (&extent, &stride) in shape.iter().zip(strides).rev() {
        // The stride of a dimension of one is never used and may be anything.
        if extent != 1 && stride != expected {
            return Err(not_contiguous());
        }
        expected = expected.saturating_mul(extent as i64);
    }
    Ok(())
}

/// JAX promises that arrays never change, so they are inputs only.
fn is_jax(object: &Bound<'_, PyAny>) -> bool {
    matches!(root_module(object).as_str(), "jax" | "jaxlib")
}

/// The library that an object's type belongs to.
fn root_module(object: &Bound<'_, PyAny>) -> String {
    let module = object.get_type().module().map(|name| name.to_string()).unwrap_or_default();
    module.split('.').next().unwrap_or_default().to_owned()
}

fn dtype_name(object: &Bound<'_, PyAny>) -> String {
    let name = object.getattr("dtype").and_then(|dtype| dtype.getattr("name"));
    name.and_then(|name| name.extract()).unwrap_or_default()
}

fn dtype_of_typestr(object: &Bound<'_, PyAny>, typestr: &str) -> Option<DType> {
    Some(match typestr.get(1..)? {
        "b1" => DType::Bool,
        "u1" => DType::U8,
        "i1" => DType::I8,
        "u2" => DType::U16,
        "i2" => DType::I16,
        "u4" => DType::U32,
        "i4" => DType::I32,
        "u8" => DType::U64,
        "i8" => DType::I64,
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        "c8" => DType::C64,
        "c16" => DType::C128,
        // ml_dtypes registers bfloat16 with NumPy as two bytes of nothing known.
        "V2" if dtype_name(object) == "bfloat16" => DType::BF16,
        _ => return None,
    })
}
