//! `carole._native`: the Python binding. Thin on purpose: names, defaults and documentation stand in the Python
//! modules beside it (`python/carole`); here are memory, waiting and errors.
//!
//! - The engine never takes the interpreter's lock: it holds Python objects as opaque keep-alives and gives
//!   them back (`runtime::wait`, `runtime::released`), and they are dropped here, attached.
//! - Every call that can block detaches, and looks at Python's signals every 100 ms.

mod array;
mod device;
mod dlpack;
mod errors;
mod exchange;
mod fastcall;
mod handle;
mod life;
mod output;
mod persistent;
mod pybuffer;
mod submit;
mod torch;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::device::DeviceOutput;
    #[pymodule_export]
    use crate::handle::Handle;
    #[pymodule_export]
    use crate::life::{
        add_process_set, init, is_initialized, launch, news, perf, process_sets, reform, remove_process_set,
        shutdown, stands, world,
    };
    #[pymodule_export]
    use crate::output::{Output, shared_zeros};
    #[pymodule_export]
    use crate::persistent::{Persistent, plan};
    #[pymodule_export]
    use crate::submit::{submit, submit_raw, transfer, transfer_raw};
    #[pymodule_export]
    use crate::torch::{learn_torch, observe};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn fill(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::fastcall::add(module)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
