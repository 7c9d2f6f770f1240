//! Operations in flight, as Python sees them.
#![forbid(unsafe_code)]

use crate::device::{DeviceOutput, OnDevice};
use crate::errors;
use crate::output::Output;
use crate::torch;
use carole::error::Error;
use carole::runtime::{self, Completion, Outcome, OutputTensor, Running};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyType};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a wait goes without looking at Python's signals.
pub const SIGNALS_EVERY: Duration = Duration::from_millis(100);

/// What a finished operation is turned into.
pub enum Finish {
    /// Arrays of the caller's kind.
    Arrays {
        /// The arrays that the caller gave for the results.
        outs: Vec<Option<Py<PyAny>>>,
        /// The type of the first input, which says what kind of arrays the caller uses.
        like: Option<Py<PyType>>,
        /// Whether one tensor was given, and not a list.
        single: bool,
        /// Whether received splits belong to the result.
        with_splits: bool,
    },
    /// `(outputs, received_splits, last_joined)` as they are, for bindings written in Python.
    Raw,
    /// The rank that has sent what was received.
    Source,
    /// What a function of Python makes of the raw outcome.
    Made {
        /// The function.
        finish: Py<PyAny>,
        /// Called when the operation has ended, with whether it failed, before the result is made.
        ended: Option<Py<PyAny>>,
    },
    /// A tensor of PyTorch over the one result, which the engine has made.
    NewTensor,
    /// Tensors that are there already.
    Tensors {
        /// The tensor or the list of them.
        result: Py<PyAny>,
    },
}

/// An operation in flight. It must be waited for once; dropped, it finishes by itself and its result is lost.
#[pyclass(frozen, module = "carole._native", weakref)]
pub struct Handle {
    /// `None` where it was over at once: then the outcome is here.
    handle: Option<runtime::Handle>,
    outcome: Mutex<Option<Outcome>>,
    name: Option<String>,
    /// `None` when the outcome has been taken.
    finish: Mutex<Option<Finish>>,
    device: Option<OnDevice>,
}

impl Handle {
    pub fn new(running: Running, name: Option<String>, finish: Finish) -> Handle {
        let (handle, outcome) = match running {
            Running::Started(handle) => (Some(handle), None),
            Running::Done(outcome) => (None, Some(outcome)),
        };
        let (outcome, finish) = (Mutex::new(outcome), Mutex::new(Some(finish)));
        Handle { handle, outcome, name, finish, device: None }
    }

    /// Of tensors on a device.
    pub fn on(mut self, device: Option<OnDevice>) -> Handle {
        self.device = device;
        self
    }

    fn finished(&self) -> bool {
        self.finish.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_none()
    }

    fn take_finish(&self) -> Option<Finish> {
        self.finish.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    fn describe(&self) -> String {
        self.name.as_ref().map_or_else(|| "the operation".to_owned(), |name| format!("'{name}'"))
    }
}

/// Lets go of what finished operations had kept alive. To be called while attached to the interpreter, which
/// the memory's owners belong to.
pub fn release_finished() {
    drop(runtime::released());
}

#[pymethods]
impl Handle {
    /// Whether the operation is over, with or without success. Never blocks.
    fn poll(&self, py: Python<'_>) -> PyResult<bool> {
        release_finished();
        match self.handle {
            Some(handle) if !self.finished() => {
                runtime::poll(handle).map_err(|error| errors::to_python(py, &error))
            }
            _ => Ok(true),
        }
    }

    /// Whether the result was returned already, which is done once.
    #[getter]
    fn taken(&self) -> bool {
        self.finished()
    }

    /// Waits for the operation (for at most `timeout` seconds) and returns its result, once.
    ///
    /// Raises TimeoutError when the time is over, and KeyboardInterrupt within 0.1 s of Ctrl-C; after both the
    /// operation goes on and can be waited for again.
    #[pyo3(signature = (timeout=None))]
    fn wait<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        if self.finished() {
            let message = format!("{} was already waited for: its result is returned once", self.describe());
            return Err(errors::usage(py, &message));
        }
        // Not a number, or beyond what a clock can hold: no limit.
        let limit = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
        let completion = self.complete(py, limit)?;
        self.result(py, completion, errors::to_python)
    }

    /// Horovod's way of waiting: a second call returns None, and what fails is a HorovodInternalError.
    pub fn synchronize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if self.finished() {
            return Ok(py.None().into_bound(py));
        }
        let completion = self.complete(py, None)?;
        self.result(py, completion, errors::to_horovod)
    }

    fn __repr__(&self) -> String {
        let state = if self.finished() { "finished" } else { "in flight" };
        format!("<carole handle of {}, {state}>", self.describe())
    }
}

impl Handle {
    /// Turns an outcome into what Python gets.
    fn result<'py>(
        &self,
        py: Python<'py>,
        completion: Completion,
        raise: fn(Python<'_>, &Error) -> PyErr,
    ) -> PyResult<Bound<'py, PyAny>> {
        let finish = self.take_finish();
        let mut stream = None;
        if let (Some(device), Ok(Outcome { arrives: Some(arrives), .. })) = (&self.device, &completion.result)
        {
            stream = device.hold(py, arrives)?;
        }
        drop(completion.keep);
        if let Some(Finish::Made { ended: Some(ended), .. }) = &finish {
            ended.bind(py).call1((completion.result.is_err(),))?;
        }
        let outcome = completion.result.map_err(|error| raise(py, &error))?;
        match finish {
            Some(Finish::Tensors { result }) => Ok(result.into_bound(py)),
            Some(Finish::NewTensor) => new_tensor(py, outcome),
            Some(Finish::Arrays { outs, like, single, with_splits }) => {
                arrays(py, outcome, stream, outs, like.as_ref(), single, with_splits)
            }
            Some(Finish::Raw) => raw(py, outcome, stream),
            Some(Finish::Source) => Ok(outcome.source.map(|rank| rank.0).into_pyobject(py)?.into_any()),
            Some(Finish::Made { finish, .. }) => finish.bind(py).call1((raw(py, outcome, stream)?,)),
            None => {
                let message = format!("{} was waited for by two threads", self.describe());
                Err(errors::usage(py, &message))
            }
        }
    }

    /// Waits in short turns, so that signals are noticed; the interpreter is free meanwhile.
    fn complete(&self, py: Python<'_>, limit: Option<Duration>) -> PyResult<Completion> {
        // What has ended already is taken without letting go of the interpreter.
        let Some(handle) = self.handle else {
            let outcome = self.outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            return Ok(Completion { result: Ok(outcome.unwrap_or_default()), keep: None });
        };
        if runtime::poll(handle).is_ok_and(|over| over) {
            return Ok(runtime::wait(handle, Some(Duration::ZERO)));
        }
        release_finished();
        let started = Instant::now();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
            let turn = left.map_or(SIGNALS_EVERY, |left| left.min(SIGNALS_EVERY));
            let completion = py.detach(|| runtime::wait(handle, Some(turn)));
            let Err(Error::Timeout(_)) = &completion.result else { return Ok(completion) };
            py.check_signals()?;
            if limit.is_some_and(|limit| started.elapsed() >= limit) {
                let limit = limit.unwrap_or_default().as_secs_f64();
                let reason = runtime::explain(handle).map_or(String::new(), |reason| format!(": {reason}"));
                let message = format!(
                    "{} was not finished after {limit} s{reason}; it goes on and can be waited for again",
                    self.describe()
                );
                return Err(errors::to_python(py, &Error::Timeout(message)));
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(handle) = self.handle
            && !self.finished()
        {
            // (In a forked child, which inherits the object but not the operation, this does nothing.)
            runtime::abandon(handle);
            // Python drops its objects while attached.
            release_finished();
        }
    }
}

/// The one result, which the engine has made, as a tensor of PyTorch.
pub fn new_tensor(py: Python<'_>, outcome: Outcome) -> PyResult<Bound<'_, PyAny>> {
    match outcome.tensors.into_iter().next() {
        Some(OutputTensor { memory: Some(memory), dtype, shape, .. }) => {
            torch::tensor_over(py, memory, dtype, shape)
        }
        _ => Ok(py.None().into_bound(py)),
    }
}

/// `stream`: one that waits for results on a device; none where they are there.
fn arrays<'py>(
    py: Python<'py>,
    outcome: Outcome,
    stream: Option<u64>,
    outs: Vec<Option<Py<PyAny>>>,
    like: Option<&Py<PyType>>,
    single: bool,
    with_splits: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(last) = outcome.last_joined {
        return Ok(last.0.into_pyobject(py)?.into_any());
    }
    if outcome.tensors.is_empty() {
        return Ok(py.None().into_bound(py));
    }
    let mut outs = outs.into_iter();
    let mut results = Vec::with_capacity(outcome.tensors.len());
    for tensor in outcome.tensors {
        let result = match (outs.next().flatten(), tensor.memory, tensor.on_device) {
            (Some(out), _, _) => out.into_bound(py),
            (None, Some(memory), _) => wrap(py, Output::new(memory, tensor.dtype, tensor.shape), like)?,
            (None, None, Some(memory)) => {
                let arrives = outcome.arrives.clone();
                wrap(py, DeviceOutput::new(memory, tensor.dtype, tensor.shape, arrives, stream), like)?
            }
            (None, None, None) => py.None().into_bound(py),
        };
        results.push(result);
    }
    let result = match results.pop() {
        Some(result) if single && results.is_empty() => result,
        last => {
            results.extend(last);
            PyList::new(py, results)?.into_any()
        }
    };
    if with_splits {
        return Ok((result, outcome.received_splits).into_pyobject(py)?.into_any());
    }
    Ok(result)
}

fn raw(py: Python<'_>, outcome: Outcome, stream: Option<u64>) -> PyResult<Bound<'_, PyAny>> {
    let mut outputs: Vec<Option<Py<PyAny>>> = Vec::with_capacity(outcome.tensors.len());
    for tensor in outcome.tensors {
        outputs.push(match (tensor.memory, tensor.on_device) {
            (Some(memory), _) => {
                Some(Py::new(py, Output::new(memory, tensor.dtype, tensor.shape))?.into_any())
            }
            (None, Some(memory)) => {
                let arrives = outcome.arrives.clone();
                let output = DeviceOutput::new(memory, tensor.dtype, tensor.shape, arrives, stream);
                Some(Py::new(py, output)?.into_any())
            }
            (None, None) => None,
        });
    }
    let last = outcome.last_joined.map(|rank| rank.0);
    Ok((outputs, outcome.received_splits, last).into_pyobject(py)?.into_any())
}

/// Which array type the caller gets is decided in Python, where NumPy is an optional import.
pub fn wrap<'py>(
    py: Python<'py>,
    output: impl IntoPyObject<'py, Error: Into<PyErr>>,
    like: Option<&Py<PyType>>,
) -> PyResult<Bound<'py, PyAny>> {
    static WRAP: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let wrap =
        WRAP.get_or_try_init(py, || Ok::<_, PyErr>(py.import("carole._arrays")?.getattr("wrap")?.unbind()))?;
    wrap.bind(py).call1((output, like))
}
