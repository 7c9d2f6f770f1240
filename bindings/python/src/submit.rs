//! From Python's arguments to a request. What cannot be accepted is announced as refused, so that the other
//! ranks learn the reason and do not wait.

use crate::array::{self, Array, Keep};
use crate::device::{OnDevice, Source};
use crate::errors;
use crate::handle::{Finish, Handle, release_finished};
use carole::runtime::{self, Request, Running, TensorArg};
use carole::types::{Collective, DType, JoinAverage, Rank, ReduceOp, Scale, SetId};
use pyo3::prelude::*;
use std::any::Any;

/// Arguments that all entries share, as Python gave them.
pub(crate) struct Call<'a, 'py> {
    pub(crate) collective: u8,
    pub(crate) name: Option<&'a str>,
    pub(crate) set: u32,
    pub(crate) op: &'a Bound<'py, PyAny>,
    pub(crate) pre: &'a Bound<'py, PyAny>,
    pub(crate) post: &'a Bound<'py, PyAny>,
    pub(crate) root: &'a Bound<'py, PyAny>,
    pub(crate) join_average: &'a Bound<'py, PyAny>,
    pub(crate) splits: Option<&'a Bound<'py, PyAny>>,
    /// Whether the caller waits at once, so that no other thread need be woken to drive.
    pub(crate) waits: bool,
}

/// The same arguments, understood.
pub(crate) struct Understood {
    collective: Collective,
    op: ReduceOp,
    scale: Scale,
    root: Rank,
    join_average: JoinAverage,
    splits: Vec<u64>,
}

/// Submits an operation on arrays.
#[pyfunction]
#[pyo3(signature = (collective, tensors, outs, single, name, set, op, pre, post, root, join_average, splits, refused=None, waits=false))]
#[expect(clippy::too_many_arguments, reason = "a private call with one caller, cheaper than a dict")]
pub fn submit<'py>(
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
    join_average: &Bound<'py, PyAny>,
    splits: Option<&Bound<'py, PyAny>>,
    refused: Option<&str>,
    waits: bool,
) -> PyResult<Handle> {
    let call = Call { collective, name, set, op, pre, post, root, join_average, splits, waits };
    release_finished();
    if let Some(reason) = refused {
        return Err(refuse(py, &call, reason));
    }
    let understood = call.understand().map_err(|reason| refuse(py, &call, &reason))?;
    let outs = outs_for(outs, tensors.len()).map_err(|reason| refuse(py, &call, &reason))?;
    let views =
        view_all(py, &tensors, &outs, &understood, set).map_err(|reason| refuse(py, &call, &reason))?;
    let place = views.place().map_err(|reason| refuse(py, &call, &reason))?;
    let arguments = arguments(&views.inputs, &views.outputs);
    let handle = call.post(py, &understood, &arguments, Box::new(views.keeps), place)?;
    let like = tensors.first().map(|tensor| tensor.get_type().unbind());
    let outs = outs.into_iter().map(|out| out.map(Bound::unbind)).collect();
    let with_splits = splits.is_some();
    let finish = Finish::Arrays { outs, like, single, with_splits };
    Ok(Handle::new(handle, name.map(str::to_owned), finish).on(views.device))
}

/// Submits an operation on memory that the caller vouches for: each tensor is (input address, output address or
/// 0, type code, shape), and `keep` keeps all of them alive. The handle gives what `finish` makes of the raw outcome
/// (without it: the raw outcome); `ended` is called before, with whether the operation failed. Tensors on a CUDA device
/// come with `streams`: the stream that makes them (as a number), what gives the stream that is to wait for the results
/// when they are taken, and the device's number.
#[pyfunction]
#[pyo3(signature = (collective, tensors, keep, name, set, op, pre, post, root, splits, refused=None, waits=false, finish=None, ended=None, streams=None))]
#[expect(clippy::too_many_arguments, reason = "a private call with one caller, cheaper than a dict")]
pub fn submit_raw<'py>(
    py: Python<'py>,
    collective: u8,
    tensors: Vec<(usize, usize, u8, Vec<u64>)>,
    keep: Py<PyAny>,
    name: Option<&str>,
    set: u32,
    op: &Bound<'py, PyAny>,
    pre: &Bound<'py, PyAny>,
    post: &Bound<'py, PyAny>,
    root: &Bound<'py, PyAny>,
    splits: Option<&Bound<'py, PyAny>>,
    refused: Option<&str>,
    waits: bool,
    finish: Option<Py<PyAny>>,
    ended: Option<Py<PyAny>>,
    streams: Option<(u64, Py<PyAny>, i32)>,
) -> PyResult<Handle> {
    let finish = finish.map_or(Finish::Raw, |finish| Finish::Made { finish, ended });
    let size = pyo3::types::PyString::new(py, "size").into_any();
    let place = streams.as_ref().map(|(stream, _, device)| (*stream, Some(*device)));
    let device = streams.map(|streams| told(py, streams));
    let call = Call { collective, name, set, op, pre, post, root, join_average: &size, splits, waits };
    release_finished();
    if let Some(reason) = refused {
        return Err(refuse(py, &call, reason));
    }
    let understood = call.understand().map_err(|reason| refuse(py, &call, &reason))?;
    let mut arguments = Vec::with_capacity(tensors.len());
    for (input, output, code, shape) in &tensors {
        let dtype = DType::from_code(*code)
            .ok_or_else(|| refuse(py, &call, &format!("the type code {code} is unknown")))?;
        arguments.push(TensorArg {
            input: std::ptr::with_exposed_provenance(*input),
            output: std::ptr::with_exposed_provenance_mut(*output),
            dtype,
            shape,
        });
    }
    let handle = call.post(py, &understood, &arguments, Box::new(keep), place)?;
    Ok(Handle::new(handle, name.map(str::to_owned), finish).on(device))
}

/// Arrays of a framework that says which stream it works on.
fn told(py: Python<'_>, (stream, now, device): (u64, Py<PyAny>, i32)) -> OnDevice {
    let mut place = OnDevice::default();
    place.add(py, Source::told(device, stream, now)).expect("the first is where it is");
    place
}

/// Sends to, or receives from, one rank; or receives from any, where `peer` is None: then the handle gives the rank.
#[pyfunction]
#[pyo3(signature = (sending, tensor, peer, tag, set))]
pub fn transfer<'py>(
    py: Python<'py>,
    sending: bool,
    tensor: Bound<'py, PyAny>,
    peer: &Bound<'py, PyAny>,
    tag: &Bound<'py, PyAny>,
    set: u32,
) -> PyResult<Handle> {
    release_finished();
    let end = if sending { "dest" } else { "source" };
    let refusal = |message: String| errors::usage(py, &message);
    let peer = match peer.is_none() && !sending {
        true => None,
        false => Some(
            peer.extract::<u32>()
                .map(Rank)
                .map_err(|_| refusal(format!("{end}={} is not a rank; ranks count from 0", text(peer))))?,
        ),
    };
    let tag = tag
        .extract::<u32>()
        .map_err(|_| refusal(format!("tag={} is not a whole number from 0 to 2**32 - 1", text(tag))))?;
    let (mut array, keep) = array::view(&tensor).map_err(|reason| errors::usage(py, &reason))?;
    let device = array.source.take().map(|source| {
        let mut place = OnDevice::default();
        place.add(py, source).map(|()| place)
    });
    let device = device.transpose().map_err(|reason| errors::usage(py, &reason))?;
    let stream = device.as_ref().map(OnDevice::gather).transpose();
    let stream = stream.map_err(|reason| errors::usage(py, &reason))?;
    if !sending && array.read_only {
        return Err(errors::usage(py, "recv writes into its array, and this one is read-only"));
    }
    let shape = array.shape.clone();
    let argument = TensorArg {
        input: if sending { array.data } else { std::ptr::null() },
        output: if sending { std::ptr::null_mut() } else { writable(array.data) },
        dtype: array.dtype,
        shape: &shape,
    };
    let keep: Option<Box<dyn Any + Send>> = Some(Box::new(keep));
    // SAFETY: `keep` holds the memory where it is until the operation has an outcome (and the streams that may use it
    // next wait for the results); that Python code does not write it meanwhile is its documented duty.
    let handle = unsafe { move_message(sending, peer, SetId(set), tag, argument, stream, keep) };
    let handle = handle.map_err(|error| errors::to_python(py, &error))?;
    let outs = if sending { Vec::new() } else { vec![Some(tensor.unbind())] };
    let finish = match peer {
        Some(_) => Finish::Arrays { outs, like: None, single: true, with_splits: false },
        None => Finish::Source,
    };
    Ok(Handle::new(Running::Started(handle), None, finish).on(device))
}

/// # Safety
/// As [`runtime::send`] and [`runtime::recv`].
unsafe fn move_message(
    sending: bool,
    peer: Option<Rank>,
    set: SetId,
    tag: u32,
    tensor: TensorArg<'_>,
    stream: Option<u64>,
    keep: Option<Box<dyn Any + Send>>,
) -> carole::error::Result<runtime::Handle> {
    // SAFETY: the caller's promise.
    unsafe {
        match peer {
            Some(peer) if sending => runtime::send(set, peer, tag, tensor, stream, keep),
            Some(peer) => runtime::recv(set, peer, tag, tensor, stream, keep),
            None => runtime::recv_any(set, tag, tensor, stream, keep),
        }
    }
}

/// Sends or receives bytes that lie on a CUDA device and that the caller vouches for. The handle of a receive from any
/// rank, where `peer` is None, gives the rank.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a private call with one caller, cheaper than a dict")]
pub fn transfer_raw(
    py: Python<'_>,
    sending: bool,
    address: usize,
    nbytes: u64,
    keep: Py<PyAny>,
    peer: Option<u32>,
    tag: u32,
    set: u32,
    streams: (u64, Py<PyAny>, i32),
) -> PyResult<Handle> {
    release_finished();
    let stream = streams.0;
    let shape = [nbytes];
    let memory: *mut u8 = std::ptr::with_exposed_provenance_mut(address);
    let argument = TensorArg { input: memory, output: memory, dtype: DType::U8, shape: &shape };
    let keep: Option<Box<dyn Any + Send>> = Some(Box::new(keep));
    // SAFETY: as in `transfer`; the streams that may use the memory next wait for the results.
    let handle =
        unsafe { move_message(sending, peer.map(Rank), SetId(set), tag, argument, Some(stream), keep) };
    let handle = handle.map_err(|error| errors::to_python(py, &error))?;
    let finish = if peer.is_some() { Finish::Raw } else { Finish::Source };
    Ok(Handle::new(Running::Started(handle), None, finish).on(Some(told(py, streams))))
}

impl<'a> Call<'a, '_> {
    pub(crate) fn understand(&self) -> Result<Understood, String> {
        let collective = Collective::from_code(self.collective)
            .ok_or_else(|| format!("the collective {} is unknown", self.collective))?;
        let op = self.op.extract::<u8>().ok().and_then(ReduceOp::from_code).ok_or_else(|| {
            format!("op={} is none of Average, Sum, Adasum, Min, Max, Product, BitAnd, BitOr", text(self.op))
        })?;
        let factor = |value: &Bound<'_, PyAny>, which: &str| {
            value.extract::<f64>().map_err(|_| format!("{which}={} is not a number", text(value)))
        };
        let scale =
            Scale { pre: factor(self.pre, "prescale_factor")?, post: factor(self.post, "postscale_factor")? };
        let root = self
            .root
            .extract::<u32>()
            .map_err(|_| format!("root={} is not a rank; ranks count from 0", text(self.root)))?;
        let join_average = match self.join_average.extract::<String>().as_deref() {
            Ok("size") => JoinAverage::Size,
            Ok("present") => JoinAverage::Present,
            _ => {
                let found = text(self.join_average);
                return Err(format!("join_average={found} is neither \"size\" nor \"present\""));
            }
        };
        let splits = self.splits.map(splits_from).transpose()?.unwrap_or_default();
        Ok(Understood { collective, op, scale, root: Rank(root), join_average, splits })
    }

    /// `place`: of tensors on a CUDA device, the stream that makes them and the device's number.
    pub(crate) fn request<'b>(
        &'b self,
        understood: &'b Understood,
        tensors: &'b [TensorArg<'b>],
        place: Option<(u64, Option<i32>)>,
    ) -> Request<'b>
    where
        'a: 'b,
    {
        Request {
            name: self.name,
            set: SetId(self.set),
            collective: understood.collective,
            op: understood.op,
            scale: understood.scale,
            root: understood.root,
            join_average: understood.join_average,
            tensors,
            splits: &understood.splits,
            stream: place.map(|(stream, _)| stream),
            device: place.and_then(|(_, device)| device),
            refused: None,
        }
    }

    fn post(
        &self,
        py: Python<'_>,
        understood: &Understood,
        tensors: &[TensorArg<'_>],
        keep: Box<dyn Any + Send>,
        place: Option<(u64, Option<i32>)>,
    ) -> PyResult<Running> {
        let request = self.request(understood, tensors, place);
        // SAFETY: `keep` holds all memory where it is until the operation has an outcome (and the streams that may use
        // it next wait for the results); that Python code does not write inputs or touch outputs meanwhile is its
        // documented duty.
        let running = unsafe {
            if self.waits {
                runtime::run(&request, || Some(keep))
            } else {
                runtime::submit(&request, Some(keep)).map(Running::Started)
            }
        };
        running.map_err(|error| errors::to_python(py, &error))
    }
}

/// Tells the other ranks that this one could not accept the call, and makes the exception for this one.
fn refuse(py: Python<'_>, call: &Call<'_, '_>, reason: &str) -> PyErr {
    let submit = |request: &Request<'_>| {
        // SAFETY: a refused request names no memory.
        unsafe { runtime::submit(request, None) }.map(runtime::abandon)
    };
    refuse_by(py, call, reason, submit)
}

/// The same, by what submits such a call.
pub(crate) fn refuse_by(
    py: Python<'_>,
    call: &Call<'_, '_>,
    reason: &str,
    submit: impl FnOnce(&Request<'_>) -> carole::error::Result<()>,
) -> PyErr {
    let Some(collective) = Collective::from_code(call.collective) else { return errors::usage(py, reason) };
    let (name, set) = (call.name, SetId(call.set));
    let request = Request { name, set, collective, refused: Some(reason), ..Request::default() };
    match submit(&request) {
        Ok(()) => errors::usage(py, reason),
        Err(error) => errors::to_python(py, &error),
    }
}

fn text(value: &Bound<'_, PyAny>) -> String {
    value.repr().map_or_else(|_| "?".to_owned(), |repr| repr.to_string())
}

fn splits_from(splits: &Bound<'_, PyAny>) -> Result<Vec<u64>, String> {
    let refusal = || format!("splits={} is not a list of whole numbers from 0", text(splits));
    let mut values = Vec::new();
    for item in splits.try_iter().map_err(|_| refusal())? {
        let value = item.and_then(|item| item.extract::<i64>()).map_err(|_| refusal())?;
        values
            .push(u64::try_from(value).map_err(|_| format!("a split is {value}; splits are not negative"))?);
    }
    Ok(values)
}

/// The memory of one call.
#[derive(Default)]
pub(crate) struct Views {
    pub(crate) inputs: Vec<Array>,
    /// Null where the engine is to allocate; empty where it allocates all.
    pub(crate) outputs: Vec<*mut u8>,
    pub(crate) keeps: Vec<Keep>,
    /// Where they are, if not on the host.
    pub(crate) device: Option<OnDevice>,
}

impl Views {
    /// Notes where one more array is.
    fn add(&mut self, py: Python<'_>, source: Option<Source>, is_first: bool) -> Result<(), String> {
        match (source, &mut self.device) {
            (None, None) => Ok(()),
            (Some(source), Some(device)) => device.add(py, source),
            (Some(source), device) if is_first => device.insert(OnDevice::default()).add(py, source),
            _ => Err("one array is in host memory, another on a CUDA device; an operation is in one place, \
                      with the arrays for its results"
                .to_owned()),
        }
    }

    /// The stream that makes them, and the number of the device.
    fn place(&self) -> Result<Option<(u64, Option<i32>)>, String> {
        let Some(device) = &self.device else { return Ok(None) };
        Ok(Some((device.gather()?, device.device())))
    }
}

pub(crate) fn outs_for<T>(outs: Option<Vec<T>>, inputs: usize) -> Result<Vec<T>, String> {
    match outs {
        Some(outs) if outs.len() != inputs => {
            Err(format!("{} outputs were given for {inputs} inputs", outs.len()))
        }
        outs => Ok(outs.unwrap_or_default()),
    }
}

pub(crate) fn view_all(
    py: Python<'_>,
    tensors: &[Bound<'_, PyAny>],
    outs: &[Option<Bound<'_, PyAny>>],
    call: &Understood,
    set: u32,
) -> Result<Views, String> {
    let mut views = Views::default();
    for (i, tensor) in tensors.iter().enumerate() {
        let (mut input, keep) = array::view(tensor)?;
        views.add(py, input.source.take(), i == 0)?;
        views.keeps.push(keep);
        if let Some(out) = outs.get(i) {
            let mut data = std::ptr::null_mut();
            if let Some(out) = out {
                let (mut output, keep) = array::view(out)?;
                views.add(py, output.source.take(), false)?;
                check_output(&output, &input, call.collective, set)?;
                data = writable(output.data);
                views.keeps.push(keep);
            }
            views.outputs.push(data);
        }
        views.inputs.push(input);
    }
    Ok(views)
}

/// The memory of a call, as the runtime takes it.
pub(crate) fn arguments<'a>(inputs: &'a [Array], outputs: &[*mut u8]) -> Vec<TensorArg<'a>> {
    let argument = |(i, input): (usize, &'a Array)| TensorArg {
        input: input.data,
        output: outputs.get(i).copied().unwrap_or(std::ptr::null_mut()),
        dtype: input.dtype,
        shape: &input.shape,
    };
    inputs.iter().enumerate().map(argument).collect()
}

fn check_output(output: &Array, input: &Array, collective: Collective, set: u32) -> Result<(), String> {
    if output.read_only {
        return Err("the array for the result is read-only; pass a writable one".to_owned());
    }
    let expected = output_shape(&input.shape, collective, set)?;
    if output.dtype != input.dtype || output.shape != expected {
        return Err(format!(
            "the array for the result is {}{:?}, and the result is {}{:?}",
            output.dtype, output.shape, input.dtype, expected
        ));
    }
    let bytes = |array: &Array| {
        let len = array.shape.iter().product::<u64>() as usize * array.dtype.size();
        array.data.addr()..array.data.addr() + len
    };
    let (from, to) = (bytes(input), bytes(output));
    if from != to && from.start < to.end && to.start < from.end {
        return Err("input and result overlap without being the same memory".to_owned());
    }
    Ok(())
}

/// Null means "allocate it for me", so an empty array's null becomes any other address.
fn writable(data: *mut u8) -> *mut u8 {
    if data.is_null() { std::ptr::NonNull::dangling().as_ptr() } else { data }
}

fn output_shape(input: &[u64], collective: Collective, set: u32) -> Result<Vec<u64>, String> {
    let mut shape = input.to_vec();
    if matches!(collective, Collective::Reducescatter | Collective::Scatter) {
        let info = runtime::process_set(SetId(set)).map_err(|error| error.to_string())?;
        let (members, me) = (info.ranks.len() as u64, u64::from(info.me.unwrap_or(0)));
        if let Some(rows) = shape.first_mut() {
            *rows = *rows / members + u64::from(me < *rows % members);
        }
    }
    Ok(shape)
}
