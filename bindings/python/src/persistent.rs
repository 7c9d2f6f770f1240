//! Planned collectives, as Python sees them.

use crate::errors;
use crate::handle::{SIGNALS_EVERY, wrap};
use crate::output::Output;
use crate::submit::{Call, arguments, outs_for, refuse_by, view_all};
use carole::error::Error;
use carole::runtime;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyType};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A collective that was planned once and can be started many times.
#[pyclass(frozen, module = "carole._native", weakref)]
pub struct Persistent {
    /// `None` when it was closed.
    plan: Mutex<Option<Arc<runtime::Persistent>>>,
    /// What every run returns: the same arrays.
    result: Py<PyAny>,
    what: String,
}

/// Plans an operation on arrays, and waits until the other members have planned the same.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a private call with one caller, cheaper than a dict")]
pub fn plan<'py>(
    py: Python<'py>,
    collective: u8,
    tensors: Vec<Bound<'py, PyAny>>,
    outs: Option<Vec<Option<Bound<'py, PyAny>>>>,
    single: bool,
    name: Option<&str>,
    set: u32,
    op: &Bound<'py, PyAny>,
    pre: &Bound<'py, PyAny>,
    post: &Bound<'py, PyAny>,
    root: &Bound<'py, PyAny>,
    splits: Option<&Bound<'py, PyAny>>,
    refused: Option<&str>,
) -> PyResult<Persistent> {
    let size = pyo3::types::PyString::new(py, "size").into_any();
    let (join_average, waits) = (&size, true);
    let call = Call { collective, name, set, op, pre, post, root, join_average, splits, waits };
    let refuse = |reason: &str| {
        // SAFETY: a refused request names no memory.
        refuse_by(py, &call, reason, |request| unsafe { runtime::plan(request, None) }.map(drop))
    };
    if let Some(reason) = refused {
        return Err(refuse(reason));
    }
    let understood = call.understand().map_err(|reason| refuse(&reason))?;
    let outs = outs_for(outs, tensors.len()).map_err(|reason| refuse(&reason))?;
    let views = view_all(py, &tensors, &outs, &understood, set).map_err(|reason| refuse(&reason))?;
    if views.device.is_some() {
        let reason =
            "persistent collectives are of arrays in host memory; use the ordinary ones on a CUDA device";
        return Err(refuse(reason));
    }
    let arguments = arguments(&views.inputs, &views.outputs);
    let request = call.request(&understood, &arguments, None);
    let keep: Box<dyn std::any::Any + Send> = Box::new(views.keeps);
    // The addresses in the request are of memory that `keep` holds where it is.
    let request = Planned(&request);
    let mut interrupted = None;
    let planned = py.detach(|| {
        let request = request;
        let mut go_on = || {
            interrupted = Python::attach(|py| py.check_signals().err());
            interrupted.is_none()
        };
        // SAFETY: `keep` holds all memory for as long as the plan lives; that Python code does not write inputs or
        // touch outputs while it is under way is its documented duty.
        unsafe { runtime::plan_while(request.0, Some(keep), &mut go_on) }
    });
    if let Some(signal) = interrupted {
        return Err(signal);
    }
    let planned = planned.map_err(|error| errors::to_python(py, &error))?;
    let like = tensors.first().map(|tensor| tensor.get_type().unbind());
    let result = results(py, &planned, outs, like.as_ref(), single, splits.is_some())?;
    let what = "persistent collective".to_owned();
    let what = name.map_or(what, |name| format!("persistent '{name}'"));
    Ok(Persistent { plan: Mutex::new(Some(Arc::new(planned))), result: result.unbind(), what })
}

/// A request that crosses into a detached section.
struct Planned<'a>(&'a runtime::Request<'a>);

// SAFETY: its addresses are only handed to the runtime, from the same thread.
unsafe impl Send for Planned<'_> {}

/// The arrays that hold the results of every run.
fn results<'py>(
    py: Python<'py>,
    plan: &runtime::Persistent,
    outs: Vec<Option<Bound<'py, PyAny>>>,
    like: Option<&Py<PyType>>,
    single: bool,
    with_splits: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let mut outs = outs.into_iter();
    let mut arrays = Vec::with_capacity(plan.outputs().len());
    for output in plan.outputs() {
        arrays.push(match (outs.next().flatten(), &output.memory) {
            (Some(out), _) => out,
            (None, Some(memory)) => {
                wrap(py, Output::over(Arc::clone(memory), output.dtype, output.shape.clone()), like)?
            }
            (None, None) => py.None().into_bound(py),
        });
    }
    let result = match single {
        true => arrays.pop().unwrap_or_else(|| py.None().into_bound(py)),
        false => PyList::new(py, arrays)?.into_any(),
    };
    match with_splits {
        true => Ok((result, plan.received_splits().to_vec()).into_pyobject(py)?.into_any()),
        false => Ok(result),
    }
}

#[pymethods]
impl Persistent {
    /// Starts it; `wait` must be called before it is started again.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        let plan = self.plan(py)?;
        // SAFETY: see `plan`.
        unsafe { plan.begin(false) }.map_err(|error| errors::to_python(py, &error))
    }

    /// Whether the last start is over. Never blocks.
    fn poll(&self, py: Python<'_>) -> PyResult<bool> {
        self.plan(py)?.poll().map_err(|error| errors::to_python(py, &error))
    }

    /// Waits for the last start (for at most `timeout` seconds), and returns the arrays with the result: the same
    /// ones each time.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        let plan = self.plan(py)?;
        let limit = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
        self.complete(py, &plan, limit)
    }

    /// Starts it and waits for it.
    fn __call__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let plan = self.plan(py)?;
        // SAFETY: see `plan`.
        unsafe { plan.begin(true) }.map_err(|error| errors::to_python(py, &error))?;
        self.complete(py, &plan, None)
    }

    /// The arrays with the result.
    #[getter]
    fn result(&self, py: Python<'_>) -> Py<PyAny> {
        self.result.clone_ref(py)
    }

    /// Whether starts go through memory that all members map, without any agreement.
    #[getter]
    fn is_direct(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.plan(py)?.is_direct())
    }

    /// Gives it up, and the memory that it holds. Waits for what is under way.
    fn close(&self, py: Python<'_>) {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Where another thread still waits for it, the last to let go of it does this.
        let plan = plan.and_then(Arc::into_inner);
        // What it had kept belongs to Python, and is dropped here, attached.
        drop(py.detach(|| plan.map(runtime::Persistent::close)));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, pyo3::types::PyTuple>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        format!("<carole {}>", self.what)
    }
}

impl Persistent {
    fn plan(&self, py: Python<'_>) -> PyResult<Arc<runtime::Persistent>> {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        plan.clone().ok_or_else(|| errors::usage(py, &format!("{} was closed; plan it again", self.what)))
    }

    /// Waits in short turns, so that signals are noticed; the interpreter is free meanwhile.
    fn complete(
        &self,
        py: Python<'_>,
        plan: &runtime::Persistent,
        limit: Option<Duration>,
    ) -> PyResult<Py<PyAny>> {
        let started = limit.map(|limit| (limit, Instant::now()));
        loop {
            let left = started.map(|(limit, since)| limit.saturating_sub(since.elapsed()));
            let turn = left.map_or(SIGNALS_EVERY, |left| left.min(SIGNALS_EVERY));
            match py.detach(|| plan.wait(Some(turn))) {
                Ok(()) => return Ok(self.result.clone_ref(py)),
                Err(Error::Timeout(words)) => {
                    py.check_signals()?;
                    if started.is_some_and(|(limit, since)| since.elapsed() >= limit) {
                        return Err(errors::to_python(py, &Error::Timeout(words)));
                    }
                }
                Err(error) => return Err(errors::to_python(py, &error)),
            }
        }
    }
}
