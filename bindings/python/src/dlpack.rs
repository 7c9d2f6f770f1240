//! DLPack, both versions, by hand: eight structs of a stable ABI (dmlc/dlpack, `dlpack.h` 1.1). The names of
//! fields follow that header.

use carole::types::DType;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

const LEGACY: &CStr = c"dltensor";
const LEGACY_USED: &CStr = c"used_dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const VERSIONED_USED: &CStr = c"used_dltensor_versioned";
/// The only major version whose layout is known here.
const MAJOR: u32 = 1;
const FLAG_READ_ONLY: u64 = 1;
/// `kDLCPU`, and `kDLCUDAHost` (page-locked host memory): what the processor can read.
const HOST_DEVICES: [i32; 2] = [1, 3];
/// `kDLCPU`, the first one.
pub const HOST: (i32, i32) = (1, 0);
/// `kDLCUDA`.
pub const CUDA: i32 = 2;
/// That, and `kDLCUDAManaged`.
const CUDA_DEVICES: [i32; 2] = [CUDA, 13];

#[repr(C)]
#[derive(Clone, Copy)]
struct Device {
    device_type: i32,
    device_id: i32,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
pub struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

impl Tensor {
    /// One to be filled in.
    pub const EMPTY: Tensor = Tensor {
        data: std::ptr::null_mut(),
        device: Device { device_type: 0, device_id: 0 },
        ndim: 0,
        dtype: DataType { code: 0, bits: 0, lanes: 0 },
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
}

/// First byte, type and dimensions of a C-contiguous tensor in host memory; `None` for any other.
///
/// # Safety
/// `tensor` is filled in as DLPack says, and its lists live as long as `'a`.
pub unsafe fn contiguous<'a>(tensor: &Tensor) -> Option<(*mut u8, DType, &'a [u64])> {
    let dimensions = usize::try_from(tensor.ndim).ok()?;
    if !HOST_DEVICES.contains(&tensor.device.device_type) {
        return None;
    }
    let (mut shape, mut strides): (&[i64], &[i64]) = (&[], &[]);
    if dimensions > 0 {
        if tensor.shape.is_null() {
            return None;
        }
        // SAFETY: DLPack promises `ndim` values in each list; no strides mean C-contiguous.
        unsafe {
            shape = std::slice::from_raw_parts(tensor.shape, dimensions);
            if !tensor.strides.is_null() {
                strides = std::slice::from_raw_parts(tensor.strides, dimensions);
            }
        }
    }
    if !strides.is_empty() && !shape.contains(&0) {
        let mut expected = 1i64;
        for (&extent, &stride) in shape.iter().zip(strides).rev() {
            // The stride of a dimension of one is never used and may be anything.
            if extent != 1 && stride != expected {
                return None;
            }
            expected = expected.saturating_mul(extent);
        }
    }
    if shape.iter().any(|&n| n < 0) {
        return None;
    }
    // SAFETY: no value is negative, so each is the same number without a sign, of the same size and alignment.
    let shape = unsafe { std::slice::from_raw_parts(shape.as_ptr().cast::<u64>(), shape.len()) };
    let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
    Some((data, dtype_from(tensor.dtype)?, shape))
}

#[repr(C)]
struct Managed {
    dl_tensor: Tensor,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

#[repr(C)]
struct ManagedVersioned {
    major: u32,
    minor: u32,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    dl_tensor: Tensor,
}

/// A tensor lent to us; its deleter runs on drop, which must happen while attached to the interpreter.
pub struct Borrowed {
    managed: Lent,
    device_type: i32,
    /// The first byte.
    pub data: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Strides in elements; `None` where C-contiguous.
    pub strides: Option<Vec<i64>>,
    /// Whether the lender forbids writing; `None` where the protocol is too old to say.
    pub read_only: Option<bool>,
}

enum Lent {
    Legacy(NonNull<Managed>),
    Versioned(NonNull<ManagedVersioned>),
}

// SAFETY: a lent tensor is an address and a deleter that DLPack allows to be called from any thread; ours is
// only dropped while attached to the interpreter.
unsafe impl Send for Borrowed {}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: the capsule was renamed to "used" when it was taken, so this is the only call of the deleter.
        unsafe {
            match self {
                Lent::Legacy(managed) => {
                    if let Some(deleter) = managed.as_ref().deleter {
                        deleter(managed.as_ptr());
                    }
                }
                Lent::Versioned(managed) => {
                    if let Some(deleter) = managed.as_ref().deleter {
                        deleter(managed.as_ptr());
                    }
                }
            }
        }
    }
}

/// The CUDA device that the memory of `object` is on, which has `__dlpack__`; none for memory of the host.
pub fn cuda_device(object: &Bound<'_, PyAny>) -> Result<Option<i32>, String> {
    let Ok(device) = object.call_method0("__dlpack_device__") else { return Ok(None) };
    // The type may be an enumeration of Python's.
    let (device_type, number): (i32, i32) = device.extract().map_err(|error: PyErr| error.to_string())?;
    match device_type {
        host if HOST_DEVICES.contains(&host) => Ok(None),
        cuda if CUDA_DEVICES.contains(&cuda) => Ok(Some(number)),
        other => Err(foreign(other)),
    }
}

fn foreign(device_type: i32) -> String {
    format!(
        "its memory is on a device (DLPack device type {device_type}), and only host memory and CUDA devices are \
         taken; copy it to the host first"
    )
}

/// Borrows the memory of `object`, which has `__dlpack__`: memory of the host, or with a stream, which then waits for
/// whatever makes the values, of a CUDA device.
pub fn borrow(object: &Bound<'_, PyAny>, stream: Option<i64>) -> Result<Borrowed, String> {
    let capsule = capsule_of(object, stream).map_err(|error| {
        format!("its __dlpack__ failed with {error} (a tensor that requires grad must be detached)")
    })?;
    let borrowed = take(&capsule)?;
    let wanted = if stream.is_some() { CUDA_DEVICES } else { HOST_DEVICES };
    match borrowed.device_type {
        found if wanted.contains(&found) => Ok(borrowed),
        found => Err(foreign(found)),
    }
}

fn capsule_of<'py>(object: &Bound<'py, PyAny>, stream: Option<i64>) -> PyResult<Bound<'py, PyAny>> {
    let options = PyDict::new(object.py());
    if let Some(stream) = stream {
        options.set_item("stream", stream)?;
    }
    let newer = options.copy()?;
    newer.set_item("max_version", (MAJOR, 1))?;
    match object.call_method("__dlpack__", (), Some(&newer)) {
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            object.call_method("__dlpack__", (), Some(&options))
        }
        result => result,
    }
}

fn take(capsule: &Bound<'_, PyAny>) -> Result<Borrowed, String> {
    let raw = capsule.as_ptr();
    // SAFETY: the capsule is alive and its name is checked before its pointer is read as that type; the
    // consumer's duty to rename it is met at once, so the deleter is called once, by us.
    unsafe {
        let (managed, tensor, read_only) = if ffi::PyCapsule_IsValid(raw, VERSIONED.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(raw, VERSIONED.as_ptr()).cast::<ManagedVersioned>();
            let managed = NonNull::new(managed).ok_or("its DLPack capsule is empty")?;
            ffi::PyCapsule_SetName(raw, VERSIONED_USED.as_ptr());
            let lent = Lent::Versioned(managed);
            if managed.as_ref().major != MAJOR {
                let major = managed.as_ref().major;
                return Err(format!("its DLPack has major version {major}; {MAJOR} and older are read"));
            }
            let read_only = managed.as_ref().flags & FLAG_READ_ONLY != 0;
            (lent, &managed.as_ref().dl_tensor as *const Tensor, Some(read_only))
        } else if ffi::PyCapsule_IsValid(raw, LEGACY.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(raw, LEGACY.as_ptr()).cast::<Managed>();
            let managed = NonNull::new(managed).ok_or("its DLPack capsule is empty")?;
            ffi::PyCapsule_SetName(raw, LEGACY_USED.as_ptr());
            (Lent::Legacy(managed), &managed.as_ref().dl_tensor as *const Tensor, None)
        } else {
            return Err("its __dlpack__ returned no DLPack capsule".to_owned());
        };
        read(managed, &*tensor, read_only)
    }
}

/// # Safety
/// `tensor` is the tensor that `managed` lends, as its lender filled it.
unsafe fn read(managed: Lent, tensor: &Tensor, read_only: Option<bool>) -> Result<Borrowed, String> {
    let device_type = tensor.device.device_type;
    let dtype = dtype_from(tensor.dtype).ok_or_else(|| {
        let DataType { code, bits, lanes } = tensor.dtype;
        format!("its DLPack type (code {code}, {bits} bits, {lanes} lanes) has no counterpart")
    })?;
    let dimensions = usize::try_from(tensor.ndim).map_err(|_| "its DLPack rank is negative")?;
    let list = |pointer: *mut i64| -> &[i64] {
        if dimensions == 0 || pointer.is_null() {
            return &[];
        }
        // SAFETY: DLPack promises `ndim` values here, and the lender's list lives as long as `managed`.
        unsafe { std::slice::from_raw_parts(pointer, dimensions) }
    };
    let shape = list(tensor.shape)
        .iter()
        .map(|&n| u64::try_from(n).map_err(|_| "a dimension of it is negative".to_owned()))
        .collect::<Result<Vec<u64>, String>>()?;
    let strides = (!tensor.strides.is_null()).then(|| list(tensor.strides).to_vec());
    let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
    Ok(Borrowed { managed, device_type, data, dtype, shape, strides, read_only })
}

impl Borrowed {
    /// Leaves only the loan, which must outlive every use of the memory.
    pub fn into_loan(self) -> Loan {
        Loan { _managed: self.managed }
    }
}

/// Keeps borrowed memory alive.
pub struct Loan {
    _managed: Lent,
}

// SAFETY: as for `Borrowed`.
unsafe impl Send for Loan {}

fn dtype_from(found: DataType) -> Option<DType> {
    DType::ALL.iter().copied().find(|&dtype| dtype_to(dtype) == found)
}

fn dtype_to(dtype: DType) -> DataType {
    let code = match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => 0,
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => 1,
        DType::F16 | DType::F32 | DType::F64 => 2,
        DType::BF16 => 4,
        DType::C64 | DType::C128 => 5,
        DType::Bool => 6,
    };
    DataType { code, bits: (dtype.size() * 8) as u8, lanes: 1 }
}

/// What a lent tensor points to: the lists of dimensions, and the owner of the bytes.
struct Context<T> {
    lists: Vec<i64>,
    _owner: T,
}

/// A capsule that lends `data` on `device` (its type and number), which `owner` keeps alive. The owner is dropped by the consumer, on any
/// thread and perhaps detached from the interpreter: it must not be a Python object.
pub fn lend<'py, T: Send + 'static>(
    py: Python<'py>,
    owner: T,
    (device_type, device_id): (i32, i32),
    data: *mut u8,
    dtype: DType,
    shape: &[u64],
    versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let ndim = shape.len();
    let mut lists: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let mut strides = vec![1i64; ndim];
    for axis in (0..ndim.saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * (shape[axis + 1].max(1) as i64);
    }
    lists.extend(strides);
    let mut context = Box::new(Context { lists, _owner: owner });
    let shape_pointer = context.lists.as_mut_ptr();
    let dl_tensor = Tensor {
        data: data.cast(),
        device: Device { device_type, device_id },
        ndim: ndim as i32,
        dtype: dtype_to(dtype),
        shape: shape_pointer,
        // `wrapping_add`, for with no dimensions there is nothing to point to.
        strides: shape_pointer.wrapping_add(ndim),
        byte_offset: 0,
    };
    let manager_ctx = Box::into_raw(context).cast::<c_void>();
    // SAFETY: the pointers come from boxes that only the matching deleter (or, for a capsule never consumed,
    // its destructor through that deleter) turns back.
    unsafe {
        let raw = if versioned {
            let managed = Box::new(ManagedVersioned {
                major: MAJOR,
                minor: 0,
                manager_ctx,
                deleter: Some(delete_versioned::<T>),
                flags: 0,
                dl_tensor,
            });
            ffi::PyCapsule_New(Box::into_raw(managed).cast(), VERSIONED.as_ptr(), Some(drop_versioned))
        } else {
            let managed = Box::new(Managed { dl_tensor, manager_ctx, deleter: Some(delete_legacy::<T>) });
            ffi::PyCapsule_New(Box::into_raw(managed).cast(), LEGACY.as_ptr(), Some(drop_legacy))
        };
        Bound::from_owned_ptr_or_err(py, raw)
    }
}

unsafe extern "C" fn delete_legacy<T>(managed: *mut Managed) {
    // SAFETY: called once, with the pointer that `lend` made for this `T`.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.manager_ctx.cast::<Context<T>>()));
    }
}

unsafe extern "C" fn delete_versioned<T>(managed: *mut ManagedVersioned) {
    // SAFETY: called once, with the pointer that `lend` made for this `T`.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.manager_ctx.cast::<Context<T>>()));
    }
}

unsafe extern "C" fn drop_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: a capsule that still has its first name was never consumed, so its tensor is still ours.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, LEGACY.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, LEGACY.as_ptr()).cast::<Managed>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `drop_legacy`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast::<ManagedVersioned>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}
