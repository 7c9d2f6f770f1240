//! DLPack's table of functions (`DLPackExchangeAPI`, dlpack.h 1.3), which torch offers from 2.10 on: the view of a
//! tensor by one call of C, without a capsule and without an allocation.

use crate::dlpack::{self, Tensor};
use carole::types::DType;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_int, c_void};

const NAME: &CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;

#[repr(C)]
struct Header {
    major: u32,
    minor: u32,
    prev_api: *const Header,
}

/// The beginning of the table, in the header's order; what follows is not used here.
#[repr(C)]
struct Api {
    header: Header,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync: Option<View>,
}

type View = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// The function of a class that views its objects.
pub struct Exchange {
    view: View,
}

/// What an object holds, as long as nobody resizes it.
pub struct Seen<'a> {
    /// The first byte.
    pub data: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: &'a [u64],
}

impl Exchange {
    /// The table of a class, where it has one whose layout is known here.
    pub fn of(class: &Bound<'_, PyAny>) -> Option<Exchange> {
        let capsule = class.getattr("__dlpack_c_exchange_api__").ok()?;
        // SAFETY: the capsule is alive (the class holds it, and classes of C stay), its name says what it points
        // to, and all tables of one major version begin alike.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule.as_ptr(), NAME.as_ptr()) != 1 {
                return None;
            }
            let mut header =
                ffi::PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr()).cast_const().cast::<Header>();
            // A newer table may bring an older one along.
            while (*header).major != MAJOR {
                header = (*header).prev_api;
                if header.is_null() {
                    return None;
                }
            }
            let view = (*header.cast::<Api>()).dltensor_from_py_object_no_sync?;
            Some(Exchange { view })
        }
    }

    /// Views an object of the class; `None` unless it is a C-contiguous array in host memory.
    pub fn view<'a>(&self, object: &'a Bound<'_, PyAny>) -> Option<Seen<'a>> {
        let mut tensor = Tensor::EMPTY;
        // SAFETY: the object is an instance of the class that the table belongs to, and alive; we are attached.
        let code = unsafe { (self.view)(object.as_ptr().cast(), &raw mut tensor) };
        if code != 0 {
            // The general way will meet the same obstacle, and tell of it.
            drop(PyErr::take(object.py()));
            return None;
        }
        // SAFETY: the function filled the struct in; its lists are the object's own, and live as long as it.
        unsafe { dlpack::contiguous(&tensor) }.map(|(data, dtype, shape)| Seen { data, dtype, shape })
    }
}
