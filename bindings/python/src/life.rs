//! Beginning and end, process sets, and the commands.
#![forbid(unsafe_code)]

use crate::errors;
use crate::handle::release_finished;
use carole::error::Error;
use carole::runtime::{self, Options};
use carole::types::{Rank, SetId};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ffi::OsString;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Joins the job.
#[pyfunction]
pub fn init(py: Python<'_>, knobs: Vec<(String, String)>, process_sets: Vec<Vec<u32>>) -> PyResult<()> {
    let process_sets = process_sets.into_iter().map(ranks).collect();
    let options = Options { knobs, process_sets };
    interruptible(py, "carole-init", move || runtime::init(&options))
}

/// Leaves the job.
#[pyfunction]
pub fn shutdown(py: Python<'_>) -> PyResult<()> {
    let result = py.detach(runtime::shutdown);
    release_finished();
    result.map_err(|error| errors::to_python(py, &error))
}

/// Forms the next epoch with those that are left.
#[pyfunction]
pub fn reform(py: Python<'_>) -> PyResult<()> {
    interruptible(py, "carole-reform", || runtime::reform().map(drop))
}

/// What has changed about the workers of an elastic job: (some wait to be let in, some are to leave).
#[pyfunction]
pub fn news(py: Python<'_>) -> PyResult<(bool, bool)> {
    let news = runtime::news().map_err(|error| errors::to_python(py, &error))?;
    Ok((news.added, news.removed))
}

/// Whether an allreduce of this name is done without agreement by now.
#[pyfunction]
pub fn stands(py: Python<'_>, set: u32, name: &str) -> PyResult<bool> {
    runtime::stands(SetId(set), name).map_err(|error| errors::to_python(py, &error))
}

/// Whether this process has joined a job.
#[pyfunction]
pub fn is_initialized() -> bool {
    runtime::is_initialized()
}

/// Who this process is.
#[pyfunction]
pub fn world(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let world = runtime::world().map_err(|error| errors::to_python(py, &error))?;
    let dict = PyDict::new(py);
    dict.set_item("rank", world.rank)?;
    dict.set_item("size", world.size)?;
    dict.set_item("local_rank", world.local_rank)?;
    dict.set_item("local_size", world.local_size)?;
    dict.set_item("cross_rank", world.cross_rank)?;
    dict.set_item("cross_size", world.cross_size)?;
    dict.set_item("is_homogeneous", world.homogeneous)?;
    dict.set_item("epoch", runtime::epoch().map_err(|error| errors::to_python(py, &error))?)?;
    Ok(dict)
}

type SetTuple = (u32, Vec<u32>, Option<u32>);

/// All process sets: (identifier, ranks, this rank's position or None).
#[pyfunction]
pub fn process_sets(py: Python<'_>) -> PyResult<Vec<SetTuple>> {
    let sets = runtime::process_sets().map_err(|error| errors::to_python(py, &error))?;
    Ok(sets.into_iter().map(|s| (s.id.0, s.ranks.iter().map(|rank| rank.0).collect(), s.me)).collect())
}

/// Makes a process set and returns its identifier.
#[pyfunction]
pub fn add_process_set(py: Python<'_>, members: Vec<u32>) -> PyResult<u32> {
    let members = ranks(members);
    interruptible(py, "carole-add-set", move || runtime::add_process_set(&members)).map(|id| id.0)
}

/// Ends a process set.
#[pyfunction]
pub fn remove_process_set(py: Python<'_>, set: u32) -> PyResult<bool> {
    interruptible(py, "carole-remove-set", move || runtime::remove_process_set(SetId(set)))
}

/// `carolerun`.
#[pyfunction]
pub fn launch(py: Python<'_>, arguments: Vec<OsString>) -> i32 {
    py.detach(|| carole::launch::main(arguments))
}

/// `carole-perf`.
#[pyfunction]
pub fn perf(py: Python<'_>, arguments: Vec<OsString>) -> i32 {
    py.detach(|| carole::perf::main(arguments))
}

fn ranks(ranks: Vec<u32>) -> Vec<Rank> {
    ranks.into_iter().map(Rank).collect()
}

/// Runs a call of the runtime that waits for other ranks and has no timeout of its own on a thread of its
/// own, so that Ctrl-C ends the wait for it. (The call itself then ends by its own limits.)
fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    name: &str,
    call: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> PyResult<T> {
    let (sender, receiver) = sync_channel(1);
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // The receiver is gone only after an interrupt, and then nobody asks for the result.
        let _ = sender.send(call());
    });
    thread.map_err(|error| errors::usage(py, &format!("no thread could be started: {error}")))?;
    let receiver = std::sync::Mutex::new(receiver);
    loop {
        let received = py.detach(|| {
            let receiver = receiver.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            receiver.recv_timeout(Duration::from_millis(100))
        });
        match received {
            Ok(result) => {
                release_finished();
                return result.map_err(|error| errors::to_python(py, &error));
            }
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(errors::usage(py, "a bug of Carole: the call panicked; its text is on stderr"));
            }
        }
    }
}
