//! The core's errors as Python exceptions. The classes live in `carole._errors`, since a class with two
//! bases (`UsageError` is a `ValueError`, too) cannot be declared from here.
#![forbid(unsafe_code)]

use carole::error::{Cause, Error};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    static MODULE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let module =
        MODULE.get_or_try_init(py, || Ok::<_, PyErr>(py.import("carole._errors")?.into_any().unbind()))?;
    module.bind(py).getattr(name)
}

/// A usage error that was found here, in the binding.
pub fn usage(py: Python<'_>, message: &str) -> PyErr {
    to_python(py, &Error::usage(message))
}

/// The exception for an error: the class follows the remedy, and `BrokenError` carries culprit and epoch.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    match build(py, error) {
        Ok(exception) => PyErr::from_value(exception),
        Err(failure) => failure,
    }
}

/// As [`to_python`], but what failed in flight is a `HorovodInternalError` that the error of ours is the cause of.
pub fn to_horovod(py: Python<'_>, error: &Error) -> PyErr {
    let cause = to_python(py, error);
    if matches!(error, Error::Usage(_) | Error::Timeout(_)) {
        return cause;
    }
    let made = class(py, "HorovodInternalError").and_then(|class| class.call1((error.to_string(),)));
    match made {
        Ok(exception) => {
            let exception = PyErr::from_value(exception);
            exception.set_cause(py, Some(cause));
            exception
        }
        Err(failure) => failure,
    }
}

fn build<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let name = match error {
        Error::Usage(_) => "UsageError",
        Error::Mismatch(_) => "MismatchError",
        Error::Broken(_) => "BrokenError",
        Error::Shutdown(_) => "ShutdownError",
        Error::Timeout(_) => "TimeoutError",
    };
    let class = class(py, name)?;
    let class = class.cast::<PyType>().map_err(PyErr::from)?;
    let exception = class.call1((error.to_string(),))?;
    match error {
        Error::Broken(broken) => {
            exception.setattr("culprit", broken.culprit.map(|rank| rank.0))?;
            exception.setattr("epoch", broken.epoch.0)?;
            exception.setattr("excluded", matches!(broken.cause, Cause::Excluded { .. }))?;
        }
        Error::Mismatch(mismatch) => exception.setattr("tensor", &mismatch.tensor)?,
        Error::Shutdown(rank) => exception.setattr("rank", rank.map(|rank| rank.0))?,
        Error::Usage(_) | Error::Timeout(_) => {}
    }
    Ok(exception)
}
