//! What CPython's stable ABI has only since 3.10, though every CPython since 3.7 has it unchanged: functions that take
//! their arguments as an array (`METH_FASTCALL`), and a string's bytes without a copy. A wheel for 3.9 declares them.

use crate::torch;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

const METH_FASTCALL: c_int = 0x80;

unsafe extern "C" {
    fn PyUnicode_AsUTF8AndSize(object: *mut ffi::PyObject, size: *mut isize) -> *const c_char;
}

/// The text of a string; `None` for anything else, and for one that UTF-8 cannot hold.
pub fn text<'a>(object: &'a Bound<'_, PyAny>) -> Option<&'a str> {
    let mut size = 0isize;
    // SAFETY: the object is alive; where it is a string, the bytes are cached in it and live as long as it.
    unsafe {
        let start = PyUnicode_AsUTF8AndSize(object.as_ptr(), &raw mut size);
        if start.is_null() {
            drop(PyErr::take(object.py()));
            return None;
        }
        std::str::from_utf8(std::slice::from_raw_parts(start.cast::<u8>(), size as usize)).ok()
    }
}

type FastCall =
    unsafe extern "C" fn(*mut ffi::PyObject, *const *mut ffi::PyObject, isize) -> *mut ffi::PyObject;

/// `PyMethodDef` with the one kind of function that is used here.
#[repr(C)]
struct Method {
    name: *const c_char,
    function: FastCall,
    flags: c_int,
    doc: *const c_char,
}

// SAFETY: it is never written, and what it points to is constant.
unsafe impl Sync for Method {}

static START: Method = Method {
    name: c"start".as_ptr(),
    function: start,
    flags: METH_FASTCALL,
    doc: c"Starts a collective of tensors of PyTorch; None where the general way is to be taken.".as_ptr(),
};

static RUN: Method = Method {
    name: c"run".as_ptr(),
    function: run,
    flags: METH_FASTCALL,
    doc: c"A collective of a tensor of PyTorch; None where the general way is to be taken.".as_ptr(),
};

/// Adds the functions to the module.
pub fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for (name, method) in [("start", &raw const START), ("run", &raw const RUN)] {
        let definition = method.cast_mut().cast::<ffi::PyMethodDef>();
        // SAFETY: the struct has the layout of PyMethodDef, lives for ever and is not written by CPython.
        let function = unsafe {
            let made = ffi::PyCFunction_NewEx(definition, std::ptr::null_mut(), std::ptr::null_mut());
            Bound::from_owned_ptr_or_err(module.py(), made)?
        };
        module.add(name, function)?;
    }
    Ok(())
}

unsafe extern "C" fn start(
    _module: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: isize,
) -> *mut ffi::PyObject {
    // SAFETY: what CPython passes is passed on.
    unsafe {
        call(arguments, count, |py, arguments| {
            torch::start(py, arguments)?.map(|handle| Ok(Bound::new(py, handle)?.into_any())).transpose()
        })
    }
}

unsafe extern "C" fn run(
    _module: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: isize,
) -> *mut ffi::PyObject {
    // SAFETY: what CPython passes is passed on.
    unsafe { call(arguments, count, torch::run) }
}

/// # Safety
/// To be called by CPython, attached, with `count` arguments.
unsafe fn call(
    arguments: *const *mut ffi::PyObject,
    count: isize,
    function: for<'py> fn(Python<'py>, &torch::Arguments<'py>) -> PyResult<Option<Bound<'py, PyAny>>>,
) -> *mut ffi::PyObject {
    // SAFETY: CPython calls us attached.
    let py = unsafe { Python::assume_attached() };
    let result = catch_unwind(AssertUnwindSafe(|| {
        if count != 11 {
            let message = format!("11 arguments are taken, and {count} were given");
            return Err(pyo3::exceptions::PyTypeError::new_err(message));
        }
        // SAFETY: CPython passes `count` objects that are alive during the call; a `Bound` is such a pointer, and by
        // reference it owns nothing.
        let arguments = unsafe { &*arguments.cast::<torch::Arguments<'_>>() };
        function(py, arguments)
    }));
    match result {
        Ok(Ok(Some(result))) => result.into_ptr(),
        Ok(Ok(None)) => py.None().into_ptr(),
        Ok(Err(error)) => {
            error.restore(py);
            std::ptr::null_mut()
        }
        Err(_) => {
            errors_of_ours().restore(py);
            std::ptr::null_mut()
        }
    }
}

fn errors_of_ours() -> PyErr {
    pyo3::exceptions::PyRuntimeError::new_err("a bug of Carole: the call panicked; its text is on stderr")
}
